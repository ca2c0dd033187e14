"""Dynamic sampling: which groups have no spread."""

import torch

from rltoken.methods.dynamic_sampling import flat_groups


def test_flat_groups():
    nan = torch.nan
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, nan, nan, nan, 1.0])
    assert flat_groups(rewards, 2) == [0, 2, 3]
