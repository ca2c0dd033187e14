"""ShorterBetter: the shortest correct answer of the group is the length to aim at.

Paper: Yi, Wang and Li, "ShorterBetter: Guiding Reasoning Models to Find Optimal Inference Length for Efficient
Reasoning", 2025 (arXiv 2504.21370); code: JingyangYi/ShorterBetter, in which the formula and both constants were read.

    SOL  = the shortest correct length of the group; the mean length where no answer is correct
    r_i <- alpha c_i - beta |n_i - SOL|

c_i is the reward, n_i the tokens of the whole completion; a row without a reward is left out of SOL. alpha = 2,
beta = 0.001: at the default, a correct answer 2000 tokens longer than the shortest is worth nothing.

As published, wrong answers are drawn towards SOL too, and a long correct one falls below a wrong one of the right
length. Gated, a wrong answer keeps its reward and a correct one never falls below it.
"""

from typing import Annotated

import torch
from torch import Tensor

from rltoken.ops import gate_by_success, group_amin, group_mean
from rltoken.ranges import Range


def shorter_better(
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    lengths: Tensor,
    *,
    alpha: Annotated[float, Range(above=0)] = 2.0,
    beta: Annotated[float, Range(least=0)] = 0.001,
    gated: bool = True,
) -> Tensor:
    """[B] scaled rewards less the distance to the group's shortest correct length.

    Args:
        rewards: [B]; `correct`: [B] bool; `group`: [B].
        lengths: [B] tokens of the whole completion.
        alpha: factor of the reward.
        beta: what a token costs.
        gated: shape correct answers only, and never to below a wrong one; False: all, as published.
    """
    n = lengths.to(rewards.dtype)
    shortest = group_amin(n, group, correct)
    mean = group_mean(n.masked_fill(rewards.isnan(), torch.nan), group)
    optimal = torch.where(shortest.isfinite(), shortest, mean)
    shaped = alpha * rewards - beta * (n - optimal).abs()
    return gate_by_success(shaped, rewards, correct, group) if gated else shaped
