"""Advantage shaping by entropy: tokens at which the policy was undecided get more credit.

Paper: Cheng et al., "Reasoning with Exploration: An Entropy Perspective", 2025 (arXiv 2506.14758).

    psi_t = min(alpha * sg[H_t], |A_t| / kappa)
    A_t  <- A_t + psi_t

kappa > 1, so the sign of an advantage never turns. Paper's settings: alpha 0.4 (GRPO) or 0.1 (PPO), kappa 2.
Deviation: the entropy is that of the policy that sampled, fixed for the window, so that accumulation changes nothing.
"""

from typing import Annotated

import torch
from torch import Tensor

from rltoken.ranges import Range


def entropy_advantage(
    advantages: Tensor,
    old_entropy: Tensor,
    *,
    alpha: Annotated[float, Range(least=0)] = 0.4,
    kappa: Annotated[float, Range(above=1)] = 2.0,
) -> Tensor:
    """[B, T] shaped advantages from [B, T] advantages and entropies in nats.

    Raises:
        ValueError: kappa <= 1, with which the sign of an advantage could turn.
    """
    assert advantages.shape == old_entropy.shape
    if kappa <= 1:
        raise ValueError(f"kappa must be above 1, got {kappa}")
    return advantages + torch.minimum(alpha * old_entropy, advantages.abs() / kappa)
