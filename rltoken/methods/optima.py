"""Optima's reward: the task's score less the share of the longest trajectory's tokens.

Paper: Chen et al., "Optima: Optimizing Effectiveness and Efficiency for LLM-Based Multi-Agent System", 2024 (arXiv
2410.08115); code: thunlp/Optima. The formula is that of the code; the paper's own text was not read.

    R   = R_task - weight R_token + weight_loss / R_loss
    R_token = n_i / max n, over the group

c_i, the reward, stands for R_task; n_i counts the tokens of the whole completion. From the code: at most `fewest` (40)
tokens cost 1 instead of the weighted share, so that saying nothing does not pay, and more than `most` (2000) cost 1
more. weight is 0.4 to 0.6 by task, 0.4 for most runs on MATH and GSM8K.

Deviations: Optima rewards dialogues of two agents and trains on the best by SFT and DPO; here it shapes the reward of
single completions. The readability term (R_loss, the loss of a message under the base model) is left out, since nothing
has scored a completion when rewards are shaped; with it go the rules for repeated messages. As published, wrong answers
pay for their length too.
"""

from typing import Annotated

import torch
from torch import Tensor

from rltoken.ops import gate_by_success, group_amax
from rltoken.ranges import Count, Range


def optima(
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    lengths: Tensor,
    *,
    weight: Annotated[float, Range(least=0)] = 0.4,
    fewest: Annotated[int, Range(least=0, whole=True)] = 40,
    most: Count = 2000,
    gated: bool = True,
) -> Tensor:
    """[B] rewards less the cost of the tokens.

    Args:
        rewards: [B]; `correct`: [B] bool; `group`: [B].
        lengths: [B] tokens of the whole completion.
        weight: what the longest completion of a group costs.
        fewest: a completion of at most so many tokens costs 1; 0 switches this off.
        most: a completion of more tokens costs 1 more.
        gated: shape correct answers only, and never to below a wrong one; False: all, as published.
    """
    n = lengths.to(rewards.dtype)
    longest = group_amax(n, group, ~rewards.isnan()).clamp(min=1)
    cost = torch.where(lengths <= fewest, 1.0, weight * n / longest)
    shaped = rewards - cost - (lengths > most).to(rewards.dtype)
    return gate_by_success(shaped, rewards, correct, group) if gated else shaped
