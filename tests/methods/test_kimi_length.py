"""Kimi k1.5's length reward: literal numbers and settings."""

import torch

from rltoken.methods.kimi_length import kimi_length
from tests.methods.configured import assert_refused
from tests.methods.worked import CORRECT, GROUP, LENGTHS, REWARDS, assert_close, grpo


def test_kimi_length():
    shaped = kimi_length(REWARDS, CORRECT, GROUP, LENGTHS, gated=False)
    assert_close(shaped, [1.5, 0.833333, -0.5, 1.166667])
    assert_close(grpo(shaped), [0.85543, 0.095048, -1.425717, 0.475239])
    assert_close(kimi_length(REWARDS, CORRECT, GROUP, LENGTHS), [1.5, 0.833333, 0.0, 1.166667])
    assert_close(kimi_length(REWARDS, CORRECT, GROUP, torch.full((4,), 7), gated=False), [1.0, 1.0, 0.0, 1.0])


def test_a_setting_out_of_range_is_refused():
    assert_refused("+shape=kimi_length", "method.shapes.kimi_length.weight=-1")
