"""Random number generators: seeded ones, and the global ones put aside while something must not consume them."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def seeded(*parts: object) -> random.Random:
    """A generator of its own for what the parts name, such as (seed, step, prompt): alike on every rank and resumed."""
    return random.Random(" ".join(map(str, parts)))


def request_seed(*parts: object) -> int:
    """A seed for a generator outside of Python, below 2**63, from what the parts name."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def put_back(found: Mapping[str, Any]) -> None:
    """Set the global generators to what `states` gave."""
    random.setstate(found["python"])
    np.random.set_state(found["numpy"])
    torch.set_rng_state(found["cpu"])
    torch.cuda.set_rng_state_all(found["cuda"])


@contextlib.contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Run the body with its own random state (seeded, if `seed` is given) and restore Python's, NumPy's and torch's."""
    before = states()
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
    try:
        yield
    finally:
        put_back(before)
