"""The credit of forced answers, worked by hand."""

import torch

from rltoken.methods.forced_answer import group_centred
from tests.methods.worked import assert_close


def test_group_centred():
    rewards, group = torch.tensor([1.0, 0.0, torch.nan, 3.0]), torch.tensor([7, 7, 2, 2])
    assert_close(group_centred(rewards[:2], group[:2]), [0.5, -0.5])
