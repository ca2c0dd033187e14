"""Correct answers are worth less the longer the thinking was; wrong answers are worth nothing.

Source: the length-regularised control of the embedded world, a form used by many papers (Yeo et al. 2025 and others).

    r_i <- r_i * (1 - weight * min(n_i, longest) / longest)     n_i thinking tokens

The penalty is gated by success: failing fast never pays, and a correct answer always beats a wrong one for weight < 1.
"""

from typing import Annotated

from torch import Tensor

from rltoken.ranges import Count, Range


def length_regularised(
    rewards: Tensor,
    thinking_lengths: Tensor,
    *,
    weight: Annotated[float, Range(least=0, below=1)] = 0.4,
    longest: Count = 64,
) -> Tensor:
    """[B] rewards scaled down by thinking length.

    Args:
        rewards: [B], 0 for a wrong answer.
        thinking_lengths: [B] thinking tokens.
        weight: share of the reward that a trace of `longest` tokens loses, in [0, 1).
        longest: thinking tokens from which on nothing more is lost.
    """
    return rewards * (1 - weight * thinking_lengths.clamp(max=longest) / longest)
