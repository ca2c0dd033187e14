"""After O1-Pruner: literal numbers of the reward and its credit, and settings."""

import torch

from rltoken.methods.o1_pruner_style import length_harmonised, standardised
from tests.methods.configured import assert_defaults, assert_refused, built
from tests.methods.worked import CORRECT, GROUP, LENGTHS, REWARDS, assert_close


def test_o1_pruner_style():
    for gated in (True, False):
        weights = length_harmonised(REWARDS, CORRECT, LENGTHS, GROUP, gated=gated)
        assert_close(weights, [2.75, 1.083333, -2.0, 1.5])
    assert_close(standardised(weights), [1.097106, 0.143101, -1.621808, 0.381602])


def test_o1_pruner_style_gates_a_short_wrong_answer():
    """Mean 2050: the wrong one gets 19.5 - 2.5, clipped to 4, or without its length -2.5, clipped to -2."""
    correct, lengths, group = torch.tensor([True, False]), torch.tensor([4000, 100]), torch.tensor([0, 0])
    assert_close(length_harmonised(correct.float(), correct, lengths, group, gated=False), [2.0125, 4.0])
    assert_close(length_harmonised(correct.float(), correct, lengths, group), [2.0125, -2.0])


def test_configurations_have_the_papers_settings():
    pipeline = built("+shape=o1_pruner_style", "+credit=o1_pruner_style")
    (stage,) = pipeline["shapes"]
    assert_defaults(stage, "method.shapes.o1_pruner_style", length_harmonised)
    (stage,) = pipeline["credits"]
    assert_defaults(stage, "method.credits.o1_pruner_style", standardised)


def test_a_setting_out_of_range_is_refused():
    assert_refused("+shape=o1_pruner_style", "method.shapes.o1_pruner_style.least=1")
