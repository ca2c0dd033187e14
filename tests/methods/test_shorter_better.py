"""ShorterBetter's reward: literal numbers and settings."""

from rltoken.methods.shorter_better import shorter_better
from tests.methods.configured import assert_refused, composed
from tests.methods.worked import CORRECT, GROUP, LENGTHS, REWARDS, assert_close, grpo


def test_shorter_better():
    shaped = shorter_better(REWARDS, CORRECT, GROUP, LENGTHS, gated=False)
    assert_close(shaped, [2.0, 0.0, -3.0, 1.0])
    assert_close(grpo(shaped), [0.925777, 0.0, -1.388666, 0.462889])
    assert_close(shorter_better(REWARDS, CORRECT, GROUP, LENGTHS), [2.0, 0.0, 0.0, 1.0])


def test_shorter_better_aims_at_the_mean_length_where_nothing_is_correct():
    # the mean of 1000, 3000, 4000, 2000 is 2500
    shaped = shorter_better(REWARDS * 0, REWARDS < 0, GROUP, LENGTHS, gated=False)
    assert_close(shaped, [-1.5, -0.5, -1.5, -0.5])


def test_configurations_have_the_papers_settings():
    shape = composed("+shape=shorter_better").method.shapes.shorter_better
    assert (shape.alpha, shape.beta) == (2.0, 0.001)


def test_a_setting_out_of_range_is_refused():
    assert_refused("+shape=shorter_better", "method.shapes.shorter_better.alpha=0")
