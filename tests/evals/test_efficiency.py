"""Accuracy against tokens in one number: the worked numbers of the papers, and what must hold of any curve."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltoken.evals.efficiency import area, e3, normalised_regret, tokens_to_reach

POINTS = ([1000, 2000, 6000], [0.25, 0.5, 0.75])
CURVES = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=6).map(
    lambda pairs: ([10 * sum(step for step, _ in pairs[: i + 1]) for i in range(len(pairs))], [y for _, y in pairs])
)
"""Tokens that ascend, and accuracies that need not."""
EACH = settings(max_examples=50, deadline=None)


def test_normalised_regret():
    # inside the curve: (0 .. 1000) 125, (1000 .. 2000) 375, (2000 .. 4096) 2096 (.5 + .631) / 2 = 1185.288
    assert normalised_regret(*POINTS, 4096) == pytest.approx(0.588553, abs=1e-6)
    # beyond it the last accuracy is kept: 125 + 375 + 2500 + 2192 * .75 = 4644 of 8192
    assert normalised_regret(*POINTS, 8192) == pytest.approx(0.433105, abs=1e-6)
    assert area(*POINTS, 6000) == pytest.approx(0.5)
    assert area([10], [0.8], 5) == pytest.approx(0.2), "half of the way to .8, and a triangle below it"


def test_tokens_to_reach():
    assert tokens_to_reach(*POINTS, 0.375) == pytest.approx(1500)
    assert tokens_to_reach(*POINTS, 0.75) == 6000 and tokens_to_reach(*POINTS, 0.1) == 1000
    assert tokens_to_reach(*POINTS, 0.751) is None
    assert tokens_to_reach([10, 20, 30], [0.2, 0.6, 0.4], 0.4) == pytest.approx(15), "the first crossing"


def test_e3():
    assert e3(0.7, 2000) == pytest.approx(2.45)
    assert e3(0.7, 2000, unit="share") == pytest.approx(2.45e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: area([], [], 5), "a curve of 0 tokens"),
        (lambda: area([10, 20], [0.5], 5), "a curve of 2 tokens and 1 accuracies"),
        (lambda: tokens_to_reach([0, 20], [0.5, 0.6], 0.5), r"tokens: \[0, 20\] do not ascend from above 0"),
        (lambda: normalised_regret([20, 20], [0.5, 0.6], 5), "do not ascend"),
        (lambda: area([10], [0.5], 0), "horizon: 0 is not possible"),
        (lambda: e3(0.5, 0), "tokens: 0 is not possible"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@EACH
@given(curve=CURVES, horizon=st.floats(1, 1000))
def test_area_is_a_mean_of_accuracies(curve, horizon):
    found = area(*curve, horizon)
    assert 0 <= found <= max(curve[1]) + 1e-12
    assert normalised_regret(*curve, horizon) == pytest.approx(1 - found)
    tokens, accuracy = curve
    assert area([2 * x for x in tokens], accuracy, 2 * horizon) == pytest.approx(found), (
        "tokens have no unit of their own"
    )


@EACH
@given(curve=CURVES, reference=st.floats(0, 1))
def test_a_reference_is_reached_where_the_curve_gets_there_first(curve, reference):
    tokens, accuracy = curve
    found = tokens_to_reach(tokens, accuracy, reference)
    assert (found is None) == (max(accuracy) < reference)
    if found is not None:
        assert tokens[0] <= found <= tokens[-1]
        assert all(y < reference for x, y in zip(tokens, accuracy, strict=True) if x < found)
