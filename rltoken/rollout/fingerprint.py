"""What tells two copies of a model's weights apart, however they name, order, fuse or pad them.

vLLM fuses projections and pads the vocabulary, so that no tensor of its own equals one of the trainer's. Sums over a
layer do not change with that: per layer the sum of the numbers, of their magnitudes and of their squares, in float64.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Fingerprint = dict[str, list[float]]
"""Layer, or what stands outside of layers -> the sums of x, |x| and x squared."""

OUTSIDE = "embeddings, head and last norm"
TOLERANCE = 1e-10
"""Of the sum of magnitudes, or of squares: rounding of float64 is below, a step of 1e-6 per weight above."""
PLAIN = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose numbers are the weights; those of quantised tensors mean something else."""
_CHUNK = 2**24


def add(sums: Fingerprint, name: str, tensor: Tensor) -> None:
    """Add the numbers of the tensor called `name` to the sums of its layer."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    total = torch.zeros(3, dtype=torch.float64, device=tensor.device)
    for part in tensor.detach().reshape(-1).split(_CHUNK):
        numbers = part.double()
        total += torch.stack([numbers.sum(), numbers.abs().sum(), numbers.square().sum()])
    layer = sums.setdefault(f"layer {found[1]}" if found else OUTSIDE, [0.0, 0.0, 0.0])
    layer[:] = [before + more for before, more in zip(layer, total.tolist(), strict=True)]


def of_model(tensors: Iterable[tuple[str, Tensor]]) -> Fingerprint | None:
    """The fingerprint of named weights; None where some are quantised, whose numbers cannot be compared."""
    sums: Fingerprint = {}
    for name, tensor in tensors:
        if tensor.dtype not in PLAIN:
            return None
        add(sums, name, tensor)
    return sums


def noted(tensors: Iterable[tuple[str, Tensor]], sums: Fingerprint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Hand named weights on and add each, rounded to `dtype`, to `sums`."""
    for name, tensor in tensors:
        add(sums, name, tensor.to(dtype))
        yield name, tensor


def difference(ours: Fingerprint, theirs: Fingerprint) -> str | None:
    """The first part in which two copies differ, None where they are one."""
    for part in sorted(ours.keys() | theirs.keys()):
        if part not in ours or part not in theirs:
            return part
        (a, magnitude, a2), (b, _, b2) = ours[part], theirs[part]
        if not (abs(a - b) <= TOLERANCE * magnitude and abs(a2 - b2) <= TOLERANCE * a2):
            return part
    return None
