"""TTRL: worked votes, and the vote against counting by hand."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rltoken.methods.ttrl import majority_vote, majority_vote_with_extra
from rltoken.ops import group_mean, group_std
from rltoken.rewards.math import classes


def vote(answers, group=None, rewards=None, correct=None, **settings):
    """Rewards as a list, and the metrics."""
    n = len(answers)
    found, metrics = majority_vote(
        torch.zeros(n) if rewards is None else torch.tensor(rewards),
        torch.zeros(n, dtype=torch.bool) if correct is None else torch.tensor(correct),
        torch.zeros(n, dtype=torch.long) if group is None else torch.tensor(group),
        torch.tensor(answers),
        **settings,
    )
    return found.tolist(), metrics


def test_the_worked_example():
    """Answers 7, 7, 3, none, 7, 3, 9, 7: the label is 7, its share 4 of 8."""
    rewards, metrics = vote([0, 0, 1, -1, 0, 1, 2, 0])
    assert rewards == [1, 1, 0, 0, 1, 0, 0, 1]
    assert metrics["ttrl/majority_share"] == 0.5
    first, group = torch.tensor(rewards[:4]), torch.zeros(4, dtype=torch.long)
    # by the population's spread; TRL's own advantages divide by sqrt(n - 1): 0.866
    advantages = (first - group_mean(first, group)) / group_std(first, group, correction=0)
    assert advantages.tolist() == [1, 1, -1, -1]


def test_half_of_the_worked_votes_are_trained():
    """The first four of 7, 7, 3, none, 7, 3, 9, 7 are trained, the others vote: label and share stay as they are."""
    first, rest = torch.tensor([0, 0, 1, -1]), torch.tensor([[0, 1, 2, 0]]).expand(4, 4)
    zeros = torch.zeros(4)
    found, metrics = majority_vote_with_extra(zeros, zeros > 0, zeros.long(), first, rest)
    assert found.tolist() == [1, 1, 0, 0] and metrics["ttrl/majority_share"] == 0.5
    turned, _ = majority_vote_with_extra(zeros, zeros > 0, zeros.long(), first, torch.ones_like(rest))
    assert turned.tolist() == [0, 0, 1, 0]


def test_leave_one_out_of_two_against_three_is_all_zeros():
    """a a b b b: an a is outvoted by the others, and a b leaves a tie that the a seen first wins."""
    assert vote([0, 0, 1, 1, 1], leave_one_out=True)[0] == [0, 0, 0, 0, 0]
    assert vote([0, 0, 1, 1, 1])[0] == [0, 0, 1, 1, 1]


def test_of_equals_the_first_seen_wins():
    assert vote([0, 1, 1, 0])[0] == [1, 0, 0, 1]


def test_one_alone_has_no_label_without_its_own_vote():
    assert vote([0, -1, -1])[0] == [1, 0, 0]
    assert vote([0, -1, -1], leave_one_out=True)[0] == [0, 0, 0]


def test_empty_answers_vote_only_if_asked_and_never_earn():
    rewards, metrics = vote([0, -1, -1, -1])
    assert rewards == [1, 0, 0, 0] and metrics["ttrl/majority_share"] == 0.25
    rewards, metrics = vote([0, -1, -1, -1], empty_votes=True)
    assert rewards == [0, 0, 0, 0] and metrics["ttrl/majority_share"] == 0.75


def test_no_answers_at_all():
    assert vote([-1, -1, -1], rewards=[0.0, 0.0, 0.0]) == (
        [0, 0, 0],
        {"ttrl/majority_share": 0.0, "ttrl/label_accuracy": 0.0, "ttrl/reward_accuracy": 1.0},
    )


def test_what_gold_says_is_logged_where_there_is_gold():
    """Group 5: the label is right. Group 9: it is wrong, and so are both of its rewards. The last group has no gold."""
    nan = float("nan")
    _, metrics = vote(
        [0, 0, 1, 0, 0, 1, 0, 1, 1],
        group=[5, 5, 5, 9, 9, 9, 2, 2, 2],
        rewards=[1.0, 1.0, 0.0, 0.0, 0.0, 1.0, nan, nan, nan],
        correct=[True, True, False, False, False, True, False, False, False],
    )
    assert metrics["ttrl/label_accuracy"] == 0.5
    assert metrics["ttrl/reward_accuracy"] == 0.5
    assert metrics["ttrl/majority_share"] == pytest.approx(2 / 3)
    assert vote([0, 0], rewards=[nan, nan])[1].keys() == {"ttrl/majority_share"}


def test_of_a_label_that_only_extra_votes_gave_nothing_is_said():
    """Both trained responses say 0, the three that only vote say 1."""
    row = torch.zeros(2)
    wrong, extra = torch.tensor([False, False]), torch.tensor([[1, 1, 1]] * 2)
    rewards, metrics = majority_vote_with_extra(row, wrong, row.long(), row.long(), extra)
    assert rewards.tolist() == [0, 0] and metrics["ttrl/majority_share"] == pytest.approx(3 / 5)
    assert "ttrl/label_accuracy" not in metrics and metrics["ttrl/reward_accuracy"] == 1.0


def test_gold_does_not_change_the_reward():
    answers = [0, 1, 1, 2]
    assert vote(answers, rewards=[1.0, 0.0, 0.0, 0.0], correct=[True, False, False, False])[0] == [0, 1, 1, 0]


def test_equal_answers_in_other_words_vote_together():
    texts = [r"\boxed{\frac{1}{2}}", r"\boxed{3}", r"\boxed{0.5}", r"\boxed{3}", r"\boxed{1/2}", r"\boxed{}"]
    found = classes(texts, [0] * 6, workers=0)
    assert vote(found)[0] == [1, 0, 1, 0, 1, 0]


@given(answers=st.lists(st.integers(-1, 3), min_size=1, max_size=9), others=st.booleans(), empty=st.booleans())
def test_the_vote_is_that_of_counting(answers, others, empty):
    expected = []
    for i, own in enumerate(answers):
        voters = [a for j, a in enumerate(answers) if (a >= 0 or empty) and not (others and j == i)]
        counts = Counter(voters)
        most = max(counts.values(), default=0)
        label = min((a for a, n in counts.items() if n == most), key=lambda a: (a < 0, a), default=None)
        expected.append(float(own >= 0 and own == label))
    assert vote(answers, leave_one_out=others, empty_votes=empty)[0] == expected


@given(seed=st.integers(0, 10_000))
def test_permuting_rows_permutes_rewards(seed):
    generator = torch.Generator().manual_seed(seed)
    answers, group = torch.randint(-1, 3, (12,), generator=generator), torch.arange(12) // 4
    order = torch.randperm(12, generator=generator)
    found = vote(answers.tolist(), group.tolist())[0]
    assert vote(answers[order].tolist(), group[order].tolist())[0] == [found[i] for i in order.tolist()]
