"""Correct answers are worth less the longer the thinking was; wrong answers are worth nothing.

Source: the length-regularised control of the embedded world, a form used by many papers (Yeo et al. 2025 and others).

    gated    r_i <- r_i (1 - weight min(n_i, longest) / longest)     n_i thinking tokens
    ungated  r_i <- r_i - weight min(n_i, longest) / longest         wrong answers pay too

Gated by success, failing fast never pays, and a correct answer always beats a wrong one for weight < 1. Ungated, a
short wrong answer beats a long one, and by up to `weight` it can make up for being wrong.
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
    gated: bool = True,
) -> Tensor:
    """[B] rewards scaled down by thinking length, or less a penalty for it.

    Args:
        rewards: [B], 0 for a wrong answer.
        thinking_lengths: [B] thinking tokens.
        weight: what a trace of `longest` tokens loses, in [0, 1): gated a share of the reward.
        longest: thinking tokens from which on nothing more is lost.
        gated: correct answers alone pay; False: every answer pays alike.
    """
    penalty = weight * thinking_lengths.clamp(max=longest) / longest
    return rewards * (1 - penalty) if gated else rewards - penalty
