"""Masked and grouped reductions: pure, shape in the name of each argument's description."""

from __future__ import annotations

import math

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


def nearest_rank(values: Tensor, q: float) -> Tensor:
    """The `q`-quantile of a flat tensor by nearest rank: the smallest value that a share `q` of them does not exceed.

    Args:
        values: [n] float, n >= 1.
        q: in (0, 1].

    Returns:
        A scalar, one of the values.
    """
    rank = math.ceil(q * values.numel() - 1e-9)  # 0.1 * 30 is a little above 3
    return values.kthvalue(max(1, rank)).values


def top_share(values: Tensor, mask: Tensor, segment: Tensor, share: float) -> Tensor:
    """The largest `share` of the values of each segment of rows: of n values max(1, round(share n)), halves to even.

    Args:
        values: [B, T] float.
        mask: [B, T] 0 or 1: the values that are looked at.
        segment: [B] long: rows of one segment share a number.
        share: in (0, 1].

    Returns:
        [B, T] bool; of equal values the first ones in order of rows and tokens.
    """
    chosen = torch.zeros_like(mask, dtype=torch.bool)
    for number in segment.unique():
        rows = (segment == number).nonzero().squeeze(1)
        looked_at = mask[rows].bool()
        own = values[rows][looked_at]
        top = own.sort(descending=True, stable=True).indices[: max(1, round(share * len(own)))]
        picked = torch.zeros_like(own, dtype=torch.bool).index_fill(0, top, True)
        chosen[rows] = looked_at.masked_scatter(looked_at, picked)
    return chosen


def over_kept(weights: Tensor, mask: Tensor) -> Tensor:
    """Scale up `weights` so that a mean over the tokens of `mask` is one over those that they keep.

    Args:
        weights: [B, T] float, 0 or 1, 0 wherever `mask` is.
        mask: [B, T] 0 or 1.
    """
    return weights * ((mask > 0).sum() / weights.sum().clamp(min=1))


def token_noise(mask: Tensor, rng: torch.Generator) -> Tensor:
    """[B, T] numbers drawn uniformly from [0, 1) where `mask` [B, T] is set, 0 elsewhere.

    They are drawn token by token, so that neither padding nor the number of ranks changes what is drawn.
    """
    noise = torch.zeros(mask.shape, device=mask.device)
    noise[mask.bool()] = torch.rand(int(mask.sum()), generator=rng, device=mask.device)
    return noise


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


def group_sum(values: Tensor, group: Tensor, among: Tensor | None = None) -> Tensor:
    """Sum over each row's group, NaN left out; 0 for a group without a value.

    Args:
        values: [B, ...] float.
        group: [B] long: rows of one group share a number.
        among: bool, of the shape of `values`: what counts; everything when None.

    Returns:
        [B, ...].
    """
    _, index = group.unique(return_inverse=True)
    kept = values.nan_to_num(0.0) if among is None else values.nan_to_num(0.0).masked_fill(~among, 0.0)
    return kept.new_zeros(int(index.max()) + 1, *kept.shape[1:]).index_add(0, index, kept)[index]


def group_std(values: Tensor, group: Tensor, among: Tensor | None = None, *, correction: int = 1) -> Tensor:
    """Standard deviation of each row's group, NaN left out; 0 for a group of fewer than two values.

    Args:
        values: [B] float; `group` and `among`: as in `group_sum`.
        correction: 1 divides by the number of values less one, 0 by their number.

    Returns:
        [B].
    """
    kept = values if among is None else values.masked_fill(~among, torch.nan)
    count = group_sum((~kept.isnan()).to(values.dtype), group)
    squares = group_sum((kept - group_mean(kept, group)).square(), group)
    return (squares / (count - correction).clamp(min=1.0)).sqrt()


def group_amax(values: Tensor, group: Tensor, among: Tensor | None = None) -> Tensor:
    """Largest value of each row's group; -inf where the group has none.

    Args:
        values: [B] float; NaN is left out.
        group: [B] long: rows of one group share a number.
        among: [B] bool: the rows to look at; all of them when None.

    Returns:
        [B], the same for all rows of a group.
    """
    _, index = group.unique(return_inverse=True)
    left_out = values.isnan() if among is None else values.isnan() | ~among
    most = values.new_full((int(index.max()) + 1,), -torch.inf)
    return most.scatter_reduce(0, index, values.masked_fill(left_out, -torch.inf), "amax")[index]


def group_amin(values: Tensor, group: Tensor, among: Tensor | None = None) -> Tensor:
    """Smallest value of each row's group; inf where the group has none. Arguments as in `group_amax`."""
    return -group_amax(-values, group, among)


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
    return torch.where(correct, shaped.maximum(group_amax(rewards, group, ~correct)), rewards)
