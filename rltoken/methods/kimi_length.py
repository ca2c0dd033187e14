"""Kimi k1.5's length reward: the shorter within its group the better, and no prize for a short wrong answer.

Paper: Kimi Team, "Kimi k1.5: Scaling Reinforcement Learning with LLMs", 2025 (arXiv 2501.12599). The formula is
recalled and agrees with its re-implementations in hkust-nlp/Laser and open-r1.

    lambda_i = 1/2 - (n_i - min n) / (max n - min n), over the group; 0 where all lengths are equal
    r_i     <- c_i + weight lambda_i             correct
               c_i + weight min(0, lambda_i)     wrong

c_i is the reward, n_i the tokens of the whole completion; a row without a reward is left out of min and max. The
paper's weight is not known (it is warmed up from 0); LASER's re-implementation takes 0.4.

As published, a wrong answer that is longer than the middle of its group loses; gated, its length does not matter.
"""

from typing import Annotated

import torch
from torch import Tensor

from rltoken.ops import gate_by_success, group_amax, group_amin
from rltoken.ranges import Range


def kimi_length(
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    lengths: Tensor,
    *,
    weight: Annotated[float, Range(least=0)] = 1.0,
    gated: bool = True,
) -> Tensor:
    """[B] rewards with the length reward of each answer within its group.

    Args:
        rewards: [B]; `correct`: [B] bool; `group`: [B].
        lengths: [B] tokens of the whole completion.
        weight: of the length reward, which lies between -1/2 and 1/2.
        gated: shape correct answers only, and never to below a wrong one; False: all, as published.
    """
    shaped = rewards + weight * length_reward(lengths.to(rewards.dtype), correct, group, ~rewards.isnan())
    return gate_by_success(shaped, rewards, correct, group) if gated else shaped


def length_reward(lengths: Tensor, correct: Tensor, group: Tensor, among: Tensor) -> Tensor:
    """[B] lambda_i, and at most 0 for wrong answers.

    Args:
        lengths: [B] float, in whole units.
        correct: [B] bool; `group`: [B].
        among: [B] bool: the rows that set the shortest and the longest length of their group.
    """
    shortest, longest = group_amin(lengths, group, among), group_amax(lengths, group, among)
    relative = 0.5 - (lengths - shortest) / (longest - shortest).clamp(min=1)
    relative = torch.where(longest > shortest, relative, 0.0)
    return torch.where(correct, relative, relative.clamp(max=0.0))
