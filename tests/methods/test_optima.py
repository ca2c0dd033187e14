"""Optima's length term: literal numbers and settings."""

import torch

from rltoken.methods.optima import optima
from tests.methods.configured import assert_refused
from tests.methods.worked import CORRECT, GROUP, REWARDS, assert_close


def test_optima_without_its_readability_term():
    # 200 of 400 tokens cost 0.3; the longest, wrong, costs 0.6
    shaped = optima(REWARDS, CORRECT, GROUP, torch.tensor([200, 40, 400, 41]), weight=0.6, gated=False)
    assert_close(shaped, [0.7, 0.0, -0.6, 0.9385])
    # 2100 of 2100 tokens cost 0.6, and 1 for being more than 2000
    shaped = optima(REWARDS, CORRECT, GROUP, torch.tensor([2100, 2000, 2100, 1050]), weight=0.6, gated=False)
    assert_close(shaped, [-0.6, 0.428571, -1.6, 0.7])
    assert_close(
        optima(REWARDS, CORRECT, GROUP, torch.tensor([2100, 2000, 2100, 1050]), weight=0.6), [0.0, 0.428571, 0.0, 0.7]
    )


def test_a_setting_out_of_range_is_refused():
    assert_refused("+shape=optima", "method.shapes.optima.fewest=-1")
