"""DLER's reward and credit: literal numbers and settings."""

import pytest
import torch

from rltoken.methods.dler import dler, unfinished
from tests.methods.configured import assert_defaults, assert_refused, built
from tests.methods.worked import assert_close

NAN = torch.nan


def test_dler_whitens_over_tokens():
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1])
    group, mask = torch.arange(8) // 4, torch.ones(8, 1).expand(8, 20_000)
    expected = torch.tensor([1.069045, -1.069045, -1.069045, 1.069045, -0.534522, -0.534522, -0.534522, 1.603567])
    assert_close(dler(rewards, rewards > 0, group, mask, boost=0.0), expected.tolist())
    assert_close(dler(rewards, rewards > 0, group, mask), (expected + 0.1 * rewards).tolist())


def test_dler_weighs_a_response_by_its_tokens_with_the_unbiased_variance():
    """d = .5, -.5 on 3 and 1 tokens: mean .25, variance (3 * .0625 + .5625) / 3 = .25."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]])
    found = dler(torch.tensor([1.0, 0.0]), torch.tensor([True, False]), torch.tensor([0, 0]), mask, boost=0.0)
    assert_close(found, [0.5, -1.5])


def test_dler_takes_nine_tenths_from_what_was_cut():
    rewards, cut = torch.tensor([1.0, 1.0, 0.0, NAN]), torch.tensor([False, True, True, True])
    assert_close(unfinished(rewards, cut), [1.0, 0.1, 0.0, NAN])


def test_configurations_have_the_papers_settings():
    pipeline = built("+shape=dler", "+credit=dler")
    (stage,) = pipeline["shapes"]
    assert_defaults(stage, "method.shapes.dler", unfinished)
    (stage,) = pipeline["credits"]
    assert_defaults(stage, "method.credits.dler", dler)


@pytest.mark.parametrize(
    ("choice", "setting"),
    [
        ("+shape=dler", "method.shapes.dler.factor=-1"),
        ("+credit=dler", "method.credits.dler.boost=-0.1"),
    ],
)
def test_settings_out_of_range_are_refused(choice, setting):
    assert_refused(choice, setting)
