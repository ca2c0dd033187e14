"""Masked and grouped reductions: pure, shape in the name of each argument's description."""

from __future__ import annotations

import torch
from torch import Tensor

QUANTILE_LIMIT = 2**24
"""torch.quantile refuses more elements than this."""


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Mean of `values` where `mask` is set; 0 where it never is.

    Args:
        values: [...] float.
        mask: same shape, 0 or 1.
        dim: the dimension to reduce; all of them when None.
        keepdim: keep the reduced dimension with size 1.
    """
    mask = mask.to(values.dtype)
    kept = torch.where(mask > 0, values, torch.zeros_like(values))
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1.0)
    return kept.sum(dim, keepdim=keepdim) / mask.sum(dim, keepdim=keepdim).clamp(min=1.0)


def quantile(values: Tensor, q: float) -> Tensor:
    """The `q`-quantile of a flat tensor by linear interpolation, for any number of elements.

    Args:
        values: [n] float, n >= 1.
        q: in [0, 1].

    Returns:
        A scalar, equal to `torch.quantile(values, q)` wherever that is defined.
    """
    if values.numel() <= QUANTILE_LIMIT:
        return torch.quantile(values, q)
    ordered = values.sort().values
    position = q * (ordered.numel() - 1)
    below = int(position)
    above = min(below + 1, ordered.numel() - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)


def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """Mean of each row's group, NaN left out; a group of nothing but NaN has mean NaN.

    Args:
        values: [B, ...] float.
        group: [B] long: rows of one group share a number.

    Returns:
        [B, ...].
    """
    _, index = group.unique(return_inverse=True)
    known = ~values.isnan()
    total = values.new_zeros(int(index.max()) + 1, *values.shape[1:]).index_add(0, index, values.nan_to_num(0.0))
    count = torch.zeros_like(total).index_add(0, index, known.to(values.dtype))
    return (total / count)[index]


def gate_by_success(shaped: Tensor, rewards: Tensor, correct: Tensor, group: Tensor) -> Tensor:
    """Let shaping change correct answers only, and never to below a wrong one, so that failing fast does not pay.

    Args:
        shaped: [B] float: what a shape stage made of `rewards`.
        rewards: [B] float, NaN where there is none.
        correct: [B] bool.
        group: [B] long: rows of one group share a number.

    Returns:
        [B]: a wrong answer keeps its reward; a correct one has its shaped reward, but at least the highest reward of a
        wrong answer of its group.
    """
    _, index = group.unique(return_inverse=True)
    wrong = rewards.masked_fill(correct | rewards.isnan(), -torch.inf)
    highest = rewards.new_full((int(index.max()) + 1,), -torch.inf).scatter_reduce(0, index, wrong, "amax")[index]
    return torch.where(correct, shaped.maximum(highest), rewards)
