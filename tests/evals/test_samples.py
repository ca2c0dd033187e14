"""pass@k, maj@k and the weighted majority: worked numbers, every subset, real completions, and what cannot be."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltoken.evals.metrics import answer_classes, over_samples, summary
from rltoken.evals.samples import majority_at_k, pass_at_k, sample_counts, weighted_majority
from rltoken.rewards import math as rewards
from rltoken.rewards.outcomes import Outcome

GROUPS = st.lists(st.integers(-1, 3), min_size=1, max_size=7)
"""Classes of the samples of one problem; the even ones are right."""


def right_of(classes):
    return [float(name in (0, 2)) for name in classes]


def subsets(items, k):
    return list(itertools.combinations(range(len(items)), k))


def majority_of(classes, right):
    """The definition, for one draw: the mean grade of the classes that have the most votes."""
    named = [name for name in classes if name >= 0]
    most = max((named.count(name) for name in named), default=0)
    winners = {name for name in named if named.count(name) == most}
    grades = [next(r for c, r in zip(classes, right, strict=True) if c == name) for name in winners]
    return sum(grades) / len(grades) if grades else 0.0


def by_subsets(classes, right, k):
    """pass@k and maj@k as means over all draws."""
    draws = [([classes[i] for i in chosen], [right[i] for i in chosen]) for chosen in subsets(classes, k)]
    return (
        sum(max(grades) for _, grades in draws) / len(draws),
        sum(majority_of(*draw) for draw in draws) / len(draws),
    )


def test_pass_at_k():
    # 1 - C(7, k) / C(10, k): 1 - 7/10, 1 - 21/45, 1 - 21/252
    assert [float(pass_at_k(3, 10, k)) for k in (1, 2, 5)] == pytest.approx([0.3, 1 - 21 / 45, 1 - 21 / 252])
    assert pass_at_k([0, 1, 2, 4], 4, 3).tolist() == pytest.approx([0.0, 0.75, 1.0, 1.0])
    # the binomial coefficients themselves would overflow: C(4000, 1000) has about 975 digits
    assert float(pass_at_k(1, 4000, 1000)) == pytest.approx(0.25)


def test_majority_at_k():
    # two of class 0 (right), one of class 1: pairs 00, 01, 01 are worth 1, 1/2, 1/2
    assert majority_at_k([0, 0, 1], [1, 1, 0], 2) == pytest.approx(2 / 3)
    assert majority_at_k([0, 0, 1], [1, 1, 0], 3) == pytest.approx(1.0)
    # three classes of one sample each, one of them right
    assert majority_at_k([0, 1, 2], [1, 0, 0], 3) == pytest.approx(1 / 3)
    # no vote without an answer: of the pairs (0, -) (1, -) (0, 1) the right one wins the first, and half of the last
    assert majority_at_k([0, 1, -1], [1, 0, 0], 2) == pytest.approx(1.5 / 3)
    assert majority_at_k([-1, -1], [0, 0], 2) == 0.0
    # a class that was graded both ways is worth the share of it that is right
    assert majority_at_k([0, 0, 0, 1], [1, 0, 1, 0], 4) == pytest.approx(2 / 3)


def test_the_majority_of_many_samples():
    # all of them are drawn; or two, which are of class 0, or one of them is, and that wins half of its ties
    classes, right = [0] * 1200 + [1] * 800, [1] * 1200 + [0] * 800
    assert majority_at_k(classes, right, 2000) == pytest.approx(1.0)
    assert majority_at_k(classes, right, 2) == pytest.approx((1200 * 1199 + 1200 * 800) / (2000 * 1999))


def test_weighted_majority():
    classes, right = [0, 1, 1], [1, 0, 0]
    assert weighted_majority(classes, right, [0.9, 0.4, 0.4]) == 1.0
    assert weighted_majority(classes, right, [0.9, 0.5, 0.5]) == 0.0
    assert weighted_majority(classes, right, [0.8, 0.4, 0.4]) == 0.5, "a tie"
    assert weighted_majority([0, -1], [1, 0], [0.1, 9.0]) == 1.0, "no answer, no vote"
    assert weighted_majority([-1, -1], [0, 0], [1, 1]) == 0.0
    assert weighted_majority([0, 1, 1, -1], [1, 0, 0, 0], [0, 0, 0, 5]) == 0.0, "without any weight votes are equal"
    # 0.1 + 0.2 is not 0.3 in floating point, but it is a tie
    assert weighted_majority([0, 0, 1], [1, 1, 0], [0.1, 0.2, 0.3]) == 0.5


def test_the_numbers_of_samples_to_look_at():
    assert sample_counts(1) == []
    assert sample_counts(4) == [2, 4] and sample_counts(10) == [2, 4, 8, 10]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k([1, 2], [4, 2], 3), "k = 3 samples cannot be drawn from 2"),
        (lambda: pass_at_k(1, 4, 0), "k = 0 samples cannot be drawn from 4"),
        (lambda: pass_at_k(5, 4, 1), "more right samples than samples"),
        (lambda: majority_at_k([0], [1], 2), "k = 2 samples cannot be drawn from 1"),
        (lambda: majority_at_k([0, 1], [1], 1), "zip"),
        (lambda: weighted_majority([0, 1], [1, 0], [1, -1]), "-1 is no weight"),
        (lambda: weighted_majority([0], [1], [math.nan]), "nan is no weight"),
        (lambda: weighted_majority([0, 1], [1, 0], [1]), "zip"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=50, deadline=None)
@given(classes=GROUPS, data=st.data())
def test_they_are_means_over_every_subset(classes, data):
    k = data.draw(st.integers(1, len(classes)))
    right = right_of(classes)
    any_right, majority = by_subsets(classes, right, k)
    assert float(pass_at_k(int(sum(right)), len(classes), k)) == pytest.approx(any_right)
    assert majority_at_k(classes, right, k) == pytest.approx(majority)


@settings(max_examples=50, deadline=None)
@given(classes=GROUPS, data=st.data())
def test_order_and_names_of_classes_change_nothing(classes, data):
    k, order = data.draw(st.integers(1, len(classes))), data.draw(st.permutations(range(len(classes))))
    right = right_of(classes)
    moved, moved_right = [classes[i] for i in order], [right[i] for i in order]
    renamed = [name if name < 0 else 7 - name for name in moved]
    assert majority_at_k(renamed, moved_right, k) == pytest.approx(majority_at_k(classes, right, k))
    weights = [0.5 + (3 * i) % 4 for i in range(len(classes))]
    expected = weighted_majority(classes, right, weights)
    assert weighted_majority(renamed, moved_right, [weights[i] for i in order]) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(classes=GROUPS)
def test_one_sample_is_the_average_and_equal_weights_are_none(classes):
    right, n = right_of(classes), len(classes)
    assert float(pass_at_k(int(sum(right)), n, 1)) == pytest.approx(sum(right) / n)
    assert majority_at_k(classes, right, 1) == pytest.approx(sum(right) / n)
    assert weighted_majority(classes, right, [0.3] * n) == pytest.approx(majority_at_k(classes, right, n))


@settings(max_examples=50, deadline=None)
@given(right=st.integers(0, 12), n=st.integers(12, 15))
def test_pass_at_k_grows_with_k(right, n):
    each = [float(pass_at_k(right, n, k)) for k in range(1, n + 1)]
    assert each == sorted(each) and each[-1] == (1.0 if right else 0.0)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 9), data=st.data())
def test_all_right_is_one_and_all_wrong_is_nought(n, data):
    k = data.draw(st.integers(1, n))
    classes = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    for grade in (0.0, 1.0):
        assert float(pass_at_k(n * int(grade), n, k)) == grade
        assert majority_at_k(classes, [grade] * n, k) == pytest.approx(grade, abs=1e-12)
        assert weighted_majority(classes, [grade] * n, [1.0] * n) == grade


def test_a_table_with_answers_and_weights():
    table = pd.DataFrame(
        {
            "id": ["a", "b", "a", "b", "a", "b"],
            "correct": [1.0, 0.0, 1.0, 0.0, 0.0, 1.0],
            "answer": ["x", "x", "x", None, "y", "y"],
            "weight": [1.0, 2.0, 1.0, 9.0, 3.0, 1.0],
        }
    )
    found = over_samples(table)
    assert found["k"] == [2, 3]
    # a: 2 of 3 are right, b: 1 of 3: pass@2 is 1 and 1 - C(2, 2) / C(3, 2) = 2/3
    assert found["pass_at_k"] == pytest.approx([5 / 6, 1.0])
    # a: xx, xy, xy give 1, 1/2, 1/2, and x wins among all; b: x against y, which is right, and one without an answer:
    # x-, -y, xy give 0, 1, 1/2, and all of them 1/2
    assert found["majority_at_k"] == pytest.approx([(2 / 3 + 1 / 2) / 2, (1 + 1 / 2) / 2])
    # a: y, b: x
    assert found["weighted_majority"] == 0.0
    classes = answer_classes(table.assign(answer_class=[5.0, 0.0, 5.0, np.nan, 6.0, -1.0]))
    assert classes.tolist() == [5, 0, 5, -1, 6, -1], "classes go before texts"
    assert answer_classes(table.drop(columns="answer")) is None
    assert answer_classes(table.assign(answer=""))[0] == -1
    assert "majority_at_k" not in over_samples(table.drop(columns="answer"))
    assert over_samples(table.iloc[:2]) == {}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_order_of_rows_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    classes = rng.integers(-1, 3, 20)
    table = pd.DataFrame(
        {
            "id": np.repeat(list("abcde"), 4), "correct": (classes == 0).astype(float), "answer_class": classes,
            "thinking_tokens": rng.integers(1, 9, 20), "completion_tokens": 10, "truncated": False, "outcome": "wrong",
            "correct@4": rng.integers(0, 2, 20), "outcome@4": "wrong",
        }
    )  # fmt: skip
    found, moved = summary(table), summary(table.sample(frac=1, random_state=seed))
    assert json.dumps(rounded(found), sort_keys=True) == json.dumps(rounded(moved), sort_keys=True)


def rounded(value):
    """Numbers to ten places: sums in another order differ in the last bits."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 10) if isinstance(value, float) else value


@pytest.fixture(scope="module")
def graded(data_dir):
    """The published completions of 50 problems, 8 of each, graded here, with the published verdicts beside."""
    text = (data_dir / "traces_qwen_math.jsonl").read_text(encoding="utf-8")
    traces = [json.loads(line) for line in text.splitlines()]
    texts, problems = [row["completion"] for row in traces], [row["id"].rpartition("-")[0] for row in traces]
    outcomes = rewards.outcomes(texts, [row["answer"] for row in traces], workers=2, seconds=60.0)
    return pd.DataFrame(
        {
            "id": problems,
            "correct": [float(outcome == Outcome.CORRECT) for outcome in outcomes],
            "published": [float(row["correct"]) for row in traces],
            "answer_class": rewards.classes(
                texts, pd.Series(problems).factorize()[0].tolist(), workers=2, seconds=60.0
            ),
        }
    )


def test_the_numbers_of_real_completions_are_those_of_the_definitions(graded):
    found, each = over_samples(graded), [group for _, group in graded.groupby("id")]
    assert (len(each), {len(group) for group in each}, found["k"]) == (50, {8}, [2, 4, 8])
    assert graded["answer_class"].max() > 2, "the problems have several answers"
    for place, k in enumerate(found["k"]):
        draws = [by_subsets(group["answer_class"].tolist(), group["correct"].tolist(), k) for group in each]
        expected = np.mean(draws, axis=0)
        assert [found["pass_at_k"][place], found["majority_at_k"][place]] == pytest.approx(expected.tolist())
    average = sum(group["correct"].mean() for group in each) / 50
    assert average < found["majority_at_k"][-1] < found["pass_at_k"][-1]


def test_real_completions_get_their_published_verdicts(graded):
    """But for the 8 of one problem that tests/rewards/test_agreement.py names: its gold answer is miswritten."""
    differing = graded[graded["correct"] != graded["published"]]
    assert differing["id"].tolist() == ["qwen-math-003"] * 8
