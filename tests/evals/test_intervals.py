"""Intervals and the paired test: worked numbers, what must hold of any data, and coverage on data of known truth."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from rltoken.evals.intervals import (
    Comparison,
    Estimate,
    clustered_share,
    compare,
    paired_p,
    share_ends,
    share_interval,
    told,
)
from rltoken.evals.samples import pass_at_k

ROOT = Path(__file__).resolve().parents[2]
SHARES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=2, max_size=40)
EACH = settings(max_examples=60, deadline=None)
SIMULATIONS = 4000
"""The standard error of a coverage near 0.95 is 0.0034, and that of a false-alarm rate near 0.05 the same."""


def ends(estimate):
    return [estimate.low, estimate.high]


def test_the_interval_of_shares():
    # 8 problems that are all wrong: m = v = 0, so n = 8, t(.975, 7) = 2.364624: high = (t^2 / 8) / (1 + t^2 / 8)
    assert ends(share_interval([0.0] * 8)) == pytest.approx([0.0, 0.411395], abs=1e-6)
    assert ends(share_interval([1.0] * 8)) == pytest.approx([0.588605, 1.0], abs=1e-6)
    # 0 1 1 .5: m = .625, m (1 - m) = .234375, v = .229167, a = 1/32: n = 4 * .265625 / .260417 = 4.08;
    # t(.975, 3) = 3.182446, t^2 = 10.127964: centre (.625 + 1.241172) / 3.482344 = .535896,
    # spread 3.182446 sqrt(.234375 / 4.08 + 10.127964 / 66.5856) / 3.482344 = .418343
    assert ends(share_interval([0.0, 1.0, 1.0, 0.5])) == pytest.approx([0.117552, 0.954238], abs=2e-6)


def test_samples_that_agree_are_one():
    """Four samples of each problem that are all alike say no more than one of each."""
    one = pd.DataFrame({"id": list("abcdef"), "correct": [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]})
    assert clustered_share(pd.concat([one] * 4), "correct") == clustered_share(one, "correct")


def test_rewards_outside_the_unit_interval_have_a_t_interval():
    table = pd.DataFrame({"id": list("abc"), "correct": [1.0, 2.0, 3.0]})
    assert ends(clustered_share(table, "correct")) == pytest.approx([2 - 2.484138, 2 + 2.484138], abs=1e-6)
    with pytest.raises(ValueError, match=r"values outside \[0, 1\]"):
        share_interval([0.5, 1.5])


def test_the_paired_test():
    # differences 1/4, 1/4, 0, 1/2, 0, 1/4, 1/4, 1/4, 0: m = 7/36, s = .166667, t = .194444 / (.166667 / 3) = 3.5;
    # with 8 degrees of freedom p = .00808, but six of nine differ: 2 / 2^6 = .03125
    differences = [0.25, 0.25, 0, 0.5, 0, 0.25, 0.25, 0.25, 0]
    assert float(paired_p(differences)) == pytest.approx(0.03125)
    # -1, 0, 1, 2, 3: m = 1, s = 1.581139, t = sqrt(2); with 4 degrees of freedom p = .230200
    assert float(paired_p([-1, 0, 1, 2, 3])) == pytest.approx(0.2302, abs=1e-5)
    assert float(paired_p([0.0] * 9)) == 1.0 and float(paired_p([1.0])) == 1.0
    assert float(paired_p([1.0, 1.0])) == 0.5, "the t statistic is infinite, but two problems prove nothing"
    found = compare({"a": 1.0, "b": 0.5, "c": 0.0}, {"c": 0.0, "b": 0.0, "a": 0.5})
    assert found.difference.mean == pytest.approx(1 / 3) and found.p == 0.5
    with pytest.raises(ValueError, match="different problems"):
        compare({"a": 1.0}, {"b": 1.0})


def test_what_a_comparison_says():
    shown = told(Comparison(Estimate(0.1, 0.02, 0.18, 50), 0.0123), "b", "a", "accuracy")
    assert shown == (
        "b - a, accuracy: +0.100 (95 % interval +0.020 to +0.180, p = 0.012, paired over 50 problems): a difference; "
        "two equal models would differ at least as much in about 12 of 1000 such comparisons."
    )
    assert "no evidence of a difference; two" in told(Comparison(Estimate(0.1, -0.1, 0.3, 50), 0.3), "b", "a", "x")
    assert "p < 0.001" in (least := told(Comparison(Estimate(9, 8, 10, 50), 1e-9), "b", "a", "tokens", ".1f"))
    assert "tokens: +9.0 (" in least and "fewer than 1 of 1000" in least
    alone = told(Comparison(Estimate(1.0, -np.inf, np.inf, 1), 1.0), "b", "a", "accuracy")
    assert alone == "b - a, accuracy: +1.000; one problem alone says nothing about others."


@EACH
@given(values=SHARES, data=st.data())
def test_an_interval_of_shares_is_in_range_whatever_the_order_and_shrinks_with_more_problems(values, data):
    found = share_interval(values)
    assert 0 <= found.low <= found.mean <= found.high <= 1 and found.half_width > 0
    moved = share_interval(data.draw(st.permutations(values)))
    assert ends(moved) == pytest.approx(ends(found), abs=1e-12)
    assert share_interval(values * 2).half_width < found.half_width
    mirrored = share_interval([1 - value for value in values])
    assert [1 - mirrored.high, 1 - mirrored.low] == pytest.approx(ends(found), abs=1e-12)
    assert share_interval(values, 0.5).half_width < found.half_width


@EACH
@given(
    pairs=st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0])] * 2), min_size=2, max_size=30), data=st.data()
)
def test_the_paired_test_is_antisymmetric_and_knows_no_order(pairs, data):
    after, before = ({i: pair[side] for i, pair in enumerate(pairs)} for side in (0, 1))
    found, opposite = compare(after, before), compare(before, after)
    assert found.p == pytest.approx(opposite.p) and 0 <= found.p <= 1
    assert found.difference.mean == -opposite.difference.mean
    assert found.difference.low == pytest.approx(-opposite.difference.high, abs=1e-12)
    order = data.draw(st.permutations(range(len(pairs))))
    moved = compare({i: after[i] for i in order}, before)
    assert moved.p == pytest.approx(found.p) and moved.difference.mean == found.difference.mean


def simulated(seed, problems, accuracy, spread, samples):
    """[SIMULATIONS, problems] right samples of problems whose difficulty is drawn from a beta distribution."""
    rng = np.random.default_rng(seed)
    chances = rng.beta(accuracy * spread, (1 - accuracy) * spread, (SIMULATIONS, problems))
    return rng.binomial(samples, chances)


def covered(shares, truth):
    low, high = share_ends(shares)
    return ((low <= truth) & (truth <= high)).mean()


@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize("spread", [0.5, 2])
@pytest.mark.parametrize("accuracy", [0.2, 0.5, 0.8, 0.95])
def test_from_100_problems_on_the_interval_covers_the_truth(accuracy, spread, samples):
    right = simulated(0, 100, accuracy, spread, samples)
    assert 0.93 <= covered(right / samples, accuracy) <= 0.97
    # with its own noise the standard error per problem would be what a sample's is: far too narrow
    if samples == 16 and spread == 0.5:
        mean = right.mean(-1) / samples
        naive = 1.96 * np.sqrt(mean * (1 - mean) / (100 * samples))
        assert (np.abs(mean - accuracy) <= naive).mean() < 0.6


@pytest.mark.parametrize(("accuracy", "lowest"), [(0.5, 0.94), (0.8, 0.94), (0.95, 0.925), (0.98, 0.95)])
def test_at_30_problems_it_covers_no_less(accuracy, lowest):
    found = [covered(simulated(1, 30, accuracy, 0.5, k) / k, accuracy) for k in (1, 4, 16)]
    print(f"30 problems, accuracy {accuracy}: coverage {found} with 1, 4 and 16 samples")
    assert min(found) >= lowest


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
def test_pass_at_k_is_unbiased_and_its_interval_covers(k):
    a, b = 0.5 * 2, 0.5 * 2
    truth = 1 - np.exp(special.betaln(a, b + k) - special.betaln(a, b))
    found = pass_at_k(simulated(2, 100, 0.5, 2, 16), 16, k)
    means = found.mean(-1)
    assert abs(means.mean() - truth) < 4 * means.std() / SIMULATIONS**0.5
    assert 0.93 <= covered(found, truth) <= 0.97


def test_putting_the_share_of_right_samples_into_the_formula_would_be_biased():
    truth = 1 - np.exp(special.betaln(1, 9) - special.betaln(1, 1))
    naive = 1 - (1 - simulated(2, 100, 0.5, 2, 16) / 16) ** 8
    assert naive.mean() - truth < -0.02


@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize("problems", [30, 100])
def test_equal_systems_differ_one_time_in_twenty_and_better_ones_more_often(problems, samples):
    rng = np.random.default_rng(3)
    chances = rng.beta(1, 1, (SIMULATIONS, problems))
    before = rng.binomial(samples, chances) / samples
    # on half of the problems the other model is another one, as good on average
    other = np.where(rng.random(chances.shape) < 0.5, chances, rng.beta(1, 1, chances.shape))
    for equal in (chances, other):
        assert 0.03 <= (paired_p(rng.binomial(samples, equal) / samples - before) < 0.05).mean() <= 0.06
    better = rng.binomial(samples, chances + 0.2 * (1 - chances)) / samples
    power = (paired_p(better - before) < 0.05).mean()
    assert power > {(30, 1): 0.1, (30, 4): 0.4, (30, 16): 0.9}.get((problems, samples), 0.3)


def test_the_script_prints_its_three_tables():
    command = [sys.executable, ROOT / "scripts/coverage.py", "--simulations", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    documented = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8").splitlines()
    heads = [line for line, below in pairwise(found) if below.startswith("| ---")]
    assert len(heads) == 3 and all(head in documented for head in heads)
    assert len(found) == 16 + 5 + 9 + 3 * 3 and not found[0]
