"""Random number generators: seeded ones, and the global ones put aside while something must not consume them."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seeded(*parts: object) -> random.Random:
    """A generator of its own for what the parts name, such as (seed, step, prompt): alike on every rank and resumed."""
    return random.Random(" ".join(map(str, parts)))


def request_seed(*parts: object) -> int:
    """A seed for a generator outside of Python, below 2**63, from what the parts name."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


@contextlib.contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Run the body with its own random state (seeded, if `seed` is given) and restore Python's, NumPy's and torch's."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
