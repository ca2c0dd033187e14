"""Hawkeye's length term: literal numbers and settings."""

import pytest
import torch

from rltoken.methods.hawkeye import hawkeye
from rltoken.pipeline import build
from tests.methods.configured import assert_refused, composed
from tests.methods.worked import CORRECT, GROUP, LENGTHS, REWARDS, assert_close, rows

HAWKEYE = {"tokens": [1.0, 0.9, -0.1, -3.9], "ratio": [1.0, 0.99, -0.01, 0.51]}


@pytest.mark.parametrize("unit", HAWKEYE)
def test_hawkeye(unit):
    rewards, lengths = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([250, 400, 400, 1000])
    settings = {"unit": unit, "weight": {"tokens": 1e-5, "ratio": 1.0}[unit]}
    inputs = rows(original_tokens=1000)
    assert_close(hawkeye(inputs, rewards, CORRECT, GROUP, lengths, **settings, gated=False), HAWKEYE[unit])
    gated = [max(value, 0.0) for value in HAWKEYE[unit]]
    assert_close(hawkeye(inputs, rewards, CORRECT, GROUP, lengths, **settings), gated)


def test_a_missing_column_says_what_fills_it():
    with pytest.raises(ValueError, match=r"no column 'original_tokens'; add it to the data set"):
        hawkeye(rows(), REWARDS, CORRECT, GROUP, LENGTHS)
    assert build({"shapes": {"mine": hawkeye}})["shapes"][0].needs[0] == "inputs"


def test_configurations_have_the_papers_settings():
    shape = composed("+shape=hawkeye").method.shapes.hawkeye
    assert (shape.share, shape.unit) == (0.3, "tokens")


def test_a_setting_out_of_range_is_refused():
    assert_refused("+shape=hawkeye", "method.shapes.hawkeye.share=-1")
