"""MRT: where episodes end, both baselines, the bonus, and progress that telescopes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rltoken.methods.mrt import best_cut, episode_credit, episode_ends, mrt, mrt_progress, token_progress
from tests.methods.configured import assert_refused

MARKERS = ["Wait", "But wait", "Alternatively"]
REWARDS = torch.tensor([1.0, 0, 0, 0, 1, 0, 1, 1])
KIND = ["summary"] * 4 + ["thinking"] * 4
ONE = torch.zeros(8, dtype=torch.long)
SCORES = torch.tensor([[0.0, 0.25, 0.75, 0.75, 0.5]])


def test_termination_baseline():
    assert mrt(REWARDS, ONE, KIND).tolist() == [0.75, -0.25, -0.25, -0.25, 0.75, -0.25, 0.75, 0.75]


def test_joint_baseline():
    high, low = 0.935239, -0.935239
    expected = torch.tensor([high, low, low, low, high, low, high, high])
    assert_close(mrt(REWARDS, ONE, KIND, baseline="joint"), expected, rtol=0, atol=1e-6)


def test_terminations_of_other_groups_do_not_count():
    group = torch.tensor([0, 0, 1, 1])
    found = mrt(torch.tensor([1.0, 1.0, 0.0, 1.0]), group, ["summary", "thinking"] * 2)
    assert found.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_explicit_bonus():
    progress = torch.tensor([1.0, 0.25, 0.75, 1.0]) - 0.25
    assert mrt_progress(torch.tensor([1.0, 0.0, 1.0, 1.0]), progress).tolist() == [1.75, 0.0, 1.5, 1.75]
    assert mrt_progress(torch.ones(4), progress, alpha=0.0).tolist() == [1.0] * 4


def test_progress_of_each_token_of_an_episode():
    """Episodes of 2, 2, 2 and 1 tokens, and two tokens of the answer."""
    found = token_progress(torch.tensor([[0, 2, 4, 6, 7]]), SCORES, 9)
    assert found.tolist() == [[0.25, 0.25, 0.5, 0.5, 0.0, 0.0, -0.25, 0.0, 0.0]]


def test_progress_of_the_worked_scores():
    """One token an episode; the sum is the last score less the first."""
    progress = token_progress(torch.arange(5).unsqueeze(0), SCORES, 4)
    assert progress.tolist() == [[0.25, 0.5, 0.0, -0.25]] and progress.sum() == 0.5


def test_credit_adds_to_what_was_there():
    found = episode_credit(torch.full((1, 9), 0.5), torch.tensor([[0, 2, 4, 6, 7]]), SCORES, alpha=2.0)
    assert found.tolist() == [[1.0, 1.0, 1.5, 1.5, 0.5, 0.5, 0.0, 0.5, 0.5]]


@pytest.mark.parametrize(
    ("scores", "episode"),
    [([0, 0.25, 0.75, 0.75, 0.5], 2), ([0.0, 0.5, 1.0], 1), ([0.5, 0.5, 0.25], None), ([1.0], None), ([], None)],
)
def test_a_trace_is_cut_after_the_episode_of_most_progress(scores, episode):
    assert best_cut(scores) == episode


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_progress_telescopes(scores):
    """One token an episode: the sum over a trace is J_end - J_0, which is why it is credit per token only."""
    given, ends = torch.tensor([scores]), torch.arange(len(scores)).unsqueeze(0)
    total = token_progress(ends, given, len(scores) + 3).sum()
    assert_close(total, given[0, -1] - given[0, 0], rtol=0, atol=1e-6)


def test_episodes_that_pad_others_have_no_progress():
    assert token_progress(torch.tensor([[0, 3, 3, 3]]), torch.tensor([[0.2, 0.7, 0.7, 0.7]]), 5)[0, 3:].eq(0).all()


def test_ends_at_blank_lines_before_markers():
    """Steps 0 1 2 Wait But-wait Hm Alternatively: a marker among an episode's first three steps begins none."""
    pieces = ["Let", " me", ".\n\n", "So", " x\n\n", "Then", "\n\n", "Wait", ", no", "\n\n"]
    pieces += ["But", " wait", "\n\n", "Hm", "\n\n", "Alternatively", "?"]
    assert episode_ends(pieces, separator="\n\n", markers=MARKERS) == [7, 15, 17]
    assert episode_ends(pieces, separator="\n\n", markers=MARKERS, most=2) == [7, 17]
    assert episode_ends(pieces, separator="\n\n", markers=MARKERS, most=1) == [17]


@pytest.mark.parametrize("pieces", [["Let me"], ["Wait", " Wait", " Wait"], ["a\n\nWait\n\nb"]])
def test_one_episode_where_no_step_opens_another(pieces):
    assert episode_ends(pieces, separator="\n\n", markers=MARKERS) == [len(pieces)]


def test_no_thinking_has_no_episode():
    assert episode_ends([], separator="\n\n", markers=MARKERS) == []


@pytest.mark.parametrize("markers", ["[]", "wait", "[wait,'']", "null", "[1]"])
@pytest.mark.parametrize("exp", ["mrt", "mrt/episodes"])
def test_markers_that_open_no_episode_are_refused(exp, markers):
    stage = "mrt_episodes" if "/" in exp else "mrt"
    assert_refused(f"+exp={exp}", f"method.rows.{stage}.markers={markers}")


def test_markers_in_the_middle_of_a_step_are_none():
    pieces = ["a\n\n", "b\n\n", "c\n\n", "so", " Wait", "\n\n", "Wait"]
    assert episode_ends(pieces, separator="\n\n", markers=MARKERS) == [6, 7]


def test_without_separator_each_token_is_a_step():
    assert episode_ends(["A", "1", "B", "wait", "check", "wait"], separator=None, markers=["wait"]) == [3, 6]


@given(st.lists(st.sampled_from(["Wait", " and", "\n\n", ".\n", "\nBut", " wait"]), max_size=30), st.integers(1, 5))
def test_ends_ascend_to_the_last_token(pieces, most):
    ends = episode_ends(pieces, separator="\n\n", markers=MARKERS, most=most)
    assert ends == sorted(set(ends)) and len(ends) <= most
    assert ends[-1:] == ([len(pieces)] if pieces else [])
