"""GRPO-LEAD's reward and credit: literal numbers and settings."""

import pytest
import torch

from rltoken.methods.grpo_lead import concise, difficulty_weighted, mean_of_shortest
from tests.methods.configured import assert_defaults, assert_refused, built
from tests.methods.worked import CORRECT, GROUP, LENGTHS, REWARDS, assert_close

NAN = torch.nan


def test_grpo_lead():
    shaped = concise(REWARDS, CORRECT, LENGTHS, GROUP, longer_than=0)
    assert_close(shaped, [1.051271, 0.951229, -1.0, 1.0])
    assert_close(difficulty_weighted(shaped, CORRECT, GROUP), [0.52246, 0.427539, -2.237091, 0.473813])
    unweighted = difficulty_weighted(shaped, CORRECT, GROUP, lowest=1.0, highest=1.0)
    ratio = difficulty_weighted(shaped, CORRECT, GROUP) / unweighted
    assert_close(ratio, [0.95, 0.95, 1.492638, 0.95])


def test_grpo_lead_leaves_length_out_where_the_three_shortest_are_short():
    assert_close(concise(REWARDS, CORRECT, LENGTHS, GROUP), [1.0, 1.0, -1.0, 1.0])
    assert_close(concise(REWARDS, CORRECT, LENGTHS, GROUP, longer_than=2000), [1.0, 1.0, -1.0, 1.0])
    assert_close(concise(REWARDS, CORRECT, LENGTHS, GROUP, longer_than=1999)[:1], [1.051271])
    lengths = torch.tensor([4.0, 8, NAN, 2, 6, NAN])
    assert_close(mean_of_shortest(lengths, torch.tensor([0, 0, 0, 0, 0, 1])), [4.0, 4, 4, 4, 4, NAN])


def test_configurations_have_the_papers_settings():
    pipeline = built("+shape=grpo_lead", "+credit=grpo_lead")
    (stage,) = pipeline["shapes"]
    assert_defaults(stage, "method.shapes.grpo_lead", concise)
    (stage,) = pipeline["credits"]
    assert_defaults(stage, "method.credits.grpo_lead", difficulty_weighted)


@pytest.mark.parametrize(
    ("choice", "setting"),
    [
        ("+shape=grpo_lead", "method.shapes.grpo_lead.wrong=0.5"),
        ("+credit=grpo_lead", "method.credits.grpo_lead.midpoint=2"),
    ],
)
def test_settings_out_of_range_are_refused(choice, setting):
    assert_refused(choice, setting)
