"""The length-regularised reward, worked by hand."""

import torch

from rltoken.methods.length_regularised import length_regularised
from tests.methods.worked import assert_close


def test_length_regularised():
    rewards, lengths = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 32, 640, 5])
    assert_close(length_regularised(rewards, lengths, weight=0.4, longest=64), [1.0, 0.8, 0.6, 0.0])
    ungated = length_regularised(rewards, lengths, weight=0.4, longest=64, gated=False)
    assert_close(ungated, [1.0, 0.8, 0.6, -0.03125])
