"""The entropy bonus, worked by hand."""

import torch

from rltoken.methods.entropy_bonus import entropy_bonus
from tests.methods.worked import assert_close


def test_entropy_bonus():
    assert_close(entropy_bonus(torch.tensor([[1.0, 2.0]]), coef=0.5), [[-0.5, -1.0]])
