"""O1-Pruner's weights, on-policy: shorter than the group's mean and more often right than it.

Paper: Luo et al., "O1-Pruner: Length-Harmonizing Fine-Tuning for O1-Like Reasoning Pruning", 2025 (arXiv 2501.12570);
code: StarDewXXX/O1-Pruner, whose formulas these are. With means over the group:

    w_i = (mean n - n_i) / n_i + a (c_i - mean c), clipped to [-2, 4]                                shape
    A_i = (w_i - mean of w) / std0 of w, over the window                                             credit

Not O1-Pruner itself, hence the name. The original is off-policy: the means come from K = 12 samples of a frozen
reference model, two of which are trained per problem, in one epoch on fixed data; its weights are standardised over
that whole data set, and the clipped ratio is that of whole sequences to the reference, normalised by length (near to
it: trainer.importance_sampling_level=sequence). Here the group is its own reference, every response is trained, and the
window stands for the data set.

In the published form a wrong answer gains by being short. `gated` gives a wrong answer the second term alone, clipped,
and keeps a correct one at or above it; gated=False is the published form. The paper writes the first term with the
reference's length, L_ref / L - 1, and a as lambda; the paper's form is quoted from memory, as is the equality of the
two.
"""

from typing import Annotated

import torch
from torch import Tensor

from rltoken.ops import gate_by_success, group_mean
from rltoken.ranges import Range


def length_harmonised(
    rewards: Tensor,
    correct: Tensor,
    lengths: Tensor,
    group: Tensor,
    *,
    accuracy_weight: Annotated[float, Range(least=0)] = 5.0,
    least: Annotated[float, Range(most=0)] = -2.0,
    most: Annotated[float, Range(least=0)] = 4.0,
    gated: bool = True,
) -> Tensor:
    """[B] weights in the place of rewards.

    Args:
        rewards: [B] float, of which only NaN counts: nothing was graded, which stays, and no mean counts the row.
        correct: [B] bool.
        lengths: [B] completion tokens.
        group: [B].
        accuracy_weight: a, what being right when the others are not is worth against being short.
        least, most: the weights are clipped to these.
        gated: the length of a wrong answer does not count.
    """
    graded = ~rewards.isnan()
    n = lengths.double().clamp(min=1).where(graded, torch.nan)
    c = correct.double().where(graded, torch.nan)
    accuracy = accuracy_weight * (c - group_mean(c, group))
    weight = (group_mean(n, group) / n - 1 + accuracy).clamp(least, most)
    if gated:
        weight = gate_by_success(weight, accuracy.clamp(least, most), correct & graded, group)
    return weight.to(rewards.dtype)


def standardised(rewards: Tensor) -> Tensor:
    """[B] rewards less their mean over the window, by their standard deviation (std0); 0 where they are all equal.

    Args:
        rewards: [B] float; NaN where nothing was graded, whose advantage is NaN.
    """
    r = rewards.double()
    centred = r - r.nanmean()
    spread = centred.square().nanmean().sqrt()
    return (centred / spread.where(spread > 1e-9, torch.inf)).to(rewards.dtype)
