"""Self-rewards at evaluation: agreement with the grader, votes, and the log-probability they are made of."""

import math

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rltoken.evals.verification import appended_logps, auroc, verification, vote, voted
from rltoken.tiny.model import build_model
from rltoken.tiny.tokenizer import build_tokenizer
from rltoken.tiny.world import World

NAN = math.nan


def test_agreement_by_hand():
    """Above .5: three, two of them right; right are three. Of 3 x 2 pairs the wrong .6 beats .2."""
    found = verification([0.9, 0.7, 0.6, 0.2, -0.4, NAN], [True, True, False, True, False, True])
    assert found == {"accuracy": 3 / 5, "f1": pytest.approx(4 / 6), "auroc": pytest.approx(5 / 6), "n": 5}


def test_agreement_on_the_worked_self_rewards():
    """.95, .3, .05 and -.1 of right, wrong, right, wrong: one right answer is missed; three of four pairs in order."""
    assert verification([0.95, 0.3, 0.05, -0.1], [True, False, True, False]) == {
        "accuracy": 0.75, "f1": pytest.approx(2 / 3), "auroc": 0.75, "n": 4
    }  # fmt: skip


def test_ties_count_half_and_one_class_has_no_auroc():
    assert auroc([0.5, 0.5, 0.5], [True, False, False]) == 0.5
    assert auroc([1.0, 0.5, 0.5], [True, True, False]) == 0.75
    assert math.isnan(auroc([0.1, 0.2], [True, True]))


def test_without_a_score_or_a_hit():
    none = verification([NAN], [True])
    assert none["n"] == 0 and math.isnan(none["accuracy"]) and math.isnan(none["auroc"])
    assert verification([0.1, 0.2], [False, False])["f1"] == 0.0


def test_votes():
    answers = [4, 2, 4, 2, 2, -1]
    assert vote(answers) == 1
    assert vote(answers, [0.9, 0.2, 0.8, 0.1, NAN, 1.0]) == 0
    assert vote(answers, [7.0, 0.5, -3.0, 0.4, 0.3, 0.0]) == 1, "weights are brought into [0, 1]: 1 against 1.2"
    assert vote(answers, [0.0] * 6) == 1, "without any weight the majority decides"
    assert vote([3, 8]) == 0 and vote([-1, -1]) == -1 and vote([]) == -1


def test_votes_of_a_table():
    table = pd.DataFrame(
        {
            "id": ["b", "b", "b", "a", "a"],
            "answer": [0, 1, 1, -1, -1],
            "correct": [True, False, False, False, False],
            "self_reward": [0.9, 0.2, 0.3, NAN, NAN],
        }
    )
    assert voted(table) == [False, False]
    assert voted(table, "self_reward") == [True, False]


@given(
    st.lists(st.tuples(st.integers(-1, 3), st.floats(0, 1)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_equal_weights_are_a_majority_and_order_does_not_choose_another_sum(pairs, random):
    answers = [answer for answer, _ in pairs]
    assert vote(answers, [0.5] * len(answers)) == vote(answers)
    shuffled = random.sample(pairs, len(pairs))

    def largest(rows):
        chosen = vote(*map(list, zip(*rows, strict=True)))
        return None if chosen < 0 else math.fsum(weight for answer, weight in rows if answer == rows[chosen][0])

    assert largest(pairs) == pytest.approx(largest(shuffled))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=20))
def test_auroc_is_the_share_of_pairs_in_order(pairs):
    right = [score for score, correct in pairs if correct]
    wrong = [score for score, correct in pairs if not correct]
    found = auroc(*zip(*pairs, strict=True))
    if not right or not wrong:
        assert math.isnan(found)
        return
    wins = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    assert found == pytest.approx(wins / (len(right) * len(wrong)))


def test_the_log_probability_does_not_depend_on_the_rows_beside_it():
    model = build_model(build_tokenizer(World()), seed=0).eval()
    rows = [[3, 5, 7, 9, 11], [4, 6], [8, 3, 1]]
    found = appended_logps(model, rows, 2, temperature=0.7)
    for row, value in zip(rows, found, strict=True):
        logits = model(input_ids=torch.tensor([row])).logits[0, -1] / 0.7
        torch.testing.assert_close(value, logits.log_softmax(-1)[2], rtol=0, atol=1e-5)
