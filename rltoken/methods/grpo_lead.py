"""GRPO-LEAD: concise correct answers, an explicit penalty for wrong ones, more weight on difficult problems.

Paper: Zhang and Zuo, "GRPO-LEAD: A Difficulty-Aware Reinforcement Learning Approach for Concise Mathematical Reasoning
in Language Models", EMNLP 2025 (arXiv 2504.09696); code: aeroplanepaper/GRPO-LEAD, whose formulas these are. In the
order of the code below, with mu and std over the lengths n of the group's correct responses, and rho the group's
accuracy:

    z_i = (n_i - mu) / (std1 + 1e-6)
    r_i <- r_i exp(-alpha z_i) if correct, else -1                                                   shape
    A_i = (r_i - mean) / (std1 + 1e-6)                                                               credit
    A_i <- A_i w(rho) if A_i > 0, else A_i w(1 - rho),  w(x) = A + (B - A) / (1 + exp(k (x - x0)))

The length factor is left out (1) for a group whose three shortest responses have 4000 tokens or fewer on average. That
rule is the code's alone. A wrong answer is worth -1 whatever its length, a correct one more than 0, so there is nothing
to gate.

Deviations:
- A group of fewer than three responses takes the mean of those there are (the code: infinity, so never left out).
- A response that is alone in its group has advantage 0 (the code: its bare reward).
- The authors' format score, and their data and stages of supervised fine-tuning, are left out.
"""

from typing import Annotated

import torch
from torch import Tensor

from rltoken.ops import group_mean, group_std
from rltoken.ranges import Range


def concise(
    rewards: Tensor,
    correct: Tensor,
    lengths: Tensor,
    group: Tensor,
    *,
    alpha: Annotated[float, Range(least=0)] = 0.05,
    wrong: Annotated[float, Range(most=0)] = -1.0,
    longer_than: Annotated[float, Range(least=0)] = 4000,
) -> Tensor:
    """[B] rewards: those of correct answers by relative length, wrong answers at `wrong`.

    Args:
        rewards: [B] float, above 0 for a correct answer; NaN where nothing was graded, which stays.
        correct: [B] bool.
        lengths: [B] completion tokens.
        group: [B].
        alpha: how fast a correct answer loses with its standardised length.
        wrong: the reward of a wrong answer.
        longer_than: shape only groups whose three shortest completions have more tokens than this on average; 0: all.
    """
    n = lengths.double().masked_fill(rewards.isnan(), torch.nan)
    right = n.masked_fill(~correct, torch.nan)
    z = (right - group_mean(right, group)) / (group_std(right, group) + 1e-6)
    factor = torch.where(mean_of_shortest(n, group) > longer_than, (-alpha * z).exp(), 1.0)
    shaped = torch.where(correct, rewards * factor, wrong).to(rewards.dtype)
    return torch.where(rewards.isnan(), rewards, shaped)


def mean_of_shortest(lengths: Tensor, group: Tensor, count: int = 3) -> Tensor:
    """[B] mean of the `count` smallest lengths [B] of each row's group, NaN left out."""
    means = torch.empty_like(lengths)
    for number in group.unique():
        rows = group == number
        means[rows] = lengths[rows].sort().values[:count].nanmean()
    return means


def difficulty_weighted(
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    lowest: Annotated[float, Range(least=0)] = 0.4,
    highest: Annotated[float, Range(least=0)] = 1.5,
    midpoint: Annotated[float, Range(least=0, most=1)] = 0.75,
    steepness: Annotated[float, Range(least=0)] = 10.0,
) -> Tensor:
    """[B] GRPO's advantages, those above 0 weighted by w(rho), the others by w(1 - rho).

    Args:
        rewards: [B] float; NaN where nothing was graded, whose advantage is NaN and which no statistic counts.
        correct: [B] bool.
        group: [B].
        lowest, highest: A and B, between which the weight lies.
        midpoint, steepness: x0, the accuracy at which the weight is half way, and k, how fast it falls there.
    """
    r = rewards.double()
    advantages = (r - group_mean(r, group)) / (group_std(r, group) + 1e-6)
    accuracy = group_mean(correct.double().masked_fill(r.isnan(), torch.nan), group)
    ease = torch.where(advantages > 0, accuracy, 1 - accuracy)
    weight = lowest + (highest - lowest) * (-steepness * (ease - midpoint)).sigmoid()
    return (advantages * weight).to(rewards.dtype)
