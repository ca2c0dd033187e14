"""Weigh what raises a response and what lowers it apart.

Paper: Zhu et al., "The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning", 2025 (arXiv 2506.01347),
whose W-REINFORCE has lambda = 0.1 for correct responses and 1 for wrong ones.

    A_t <- positive * A_t  where A_t > 0
           negative * A_t  where A_t < 0

Above 1 and below 1 it is the plain control of THR: positive = 1 + p with negative = 1 - p is THR's asymmetry without
its tokens (`+exp=thr/asymmetric`).

Deviation: the paper's rewards are +1 and -1 and there is no baseline. Here the sign is that of the advantages so far,
GRPO's unless another credit stands before it. With rewards of 0 and 1 that is the same sign, but a group of equal
rewards teaches nothing.
"""

from typing import Annotated

import torch
from torch import Tensor

from rltoken.ranges import Range

Factor = Annotated[float, Range(least=0)]


def signed_advantage(advantages: Tensor, *, positive: Factor = 0.1, negative: Factor = 1.0) -> Tensor:
    """[B, T] advantages, each times the factor of its sign.

    Args:
        advantages: [B, T] float; NaN stays.
        positive: factor of those above 0.
        negative: factor of those below 0.
    """
    return advantages * torch.where(advantages > 0, positive, negative)
