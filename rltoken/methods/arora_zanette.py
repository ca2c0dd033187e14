"""Correct answers are worth less the longer they are among the correct ones of their group.

Paper: Arora and Zanette, "Training Language Models to Reason Efficiently", NeurIPS 2025 (arXiv 2502.04463); code:
Zanette-Labs/efficient-reasoning. With mu and std over the lengths n of the group's correct responses:

    z_i = (n_i - mu) / (std0 + 1e-7)
    r_i <- c_i * (1 - alpha * sigmoid(z_i))      0 for a response without end of sequence

Its credit is RLOO (`rltoken.methods.rloo`, +credit=rloo). With rewards of 0 and 1, a wrong answer is worth 0 whatever
its length and a correct one never less, so there is nothing to gate. One correct response alone has z = 0 and is worth
1 - alpha / 2.

Settings: alpha 0.1 in the authors' script; their sweep up to 0.4 is quoted from memory, not read.

Deviations:
- n counts completion tokens; the authors tokenise the answer's text anew, without special tokens.
- c is the reward itself, so that rewards other than 0 and 1 can be shaped: a correct one is scaled, a wrong one kept.
- A response that was cut counts as wrong in mu and std. How the authors' code treats it there could not be read.
"""

from typing import Annotated

import torch
from torch import Tensor

from rltoken.ops import group_mean, group_std
from rltoken.ranges import Range


def arora_zanette(
    rewards: Tensor,
    correct: Tensor,
    lengths: Tensor,
    truncated: Tensor,
    group: Tensor,
    *,
    alpha: Annotated[float, Range(least=0, most=1)] = 0.1,
) -> Tensor:
    """[B] rewards of correct answers scaled down by their relative length.

    Args:
        rewards: [B] float, NaN where nothing was graded, which stays.
        correct, truncated: [B] bool.
        lengths: [B] completion tokens.
        group: [B].
        alpha: share of the reward that a very long correct answer loses; a very short one loses nothing.
    """
    finished = correct & ~truncated & ~rewards.isnan()
    n = lengths.double().masked_fill(~finished, torch.nan)
    z = (n - group_mean(n, group)) / (group_std(n, group, correction=0) + 1e-7)
    scale = torch.where(finished, 1 - alpha * z.sigmoid(), (~truncated).double())
    return (rewards * scale).to(rewards.dtype)
