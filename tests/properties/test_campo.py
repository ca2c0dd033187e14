"""What CAMPO must keep: its stages never go back and are known from their state, its penalty is a share of the text."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltoken.methods.campo import StagedLength, without_loops
from rltoken.types import LastWindow, Progress

SETTINGS = {"stages": [[0, 20], [9, 40], [30, 80]], "longest": 80, "clips": [[0.1, 0.2], [0.2, 0.3], [0.3, 0.4]]}
LENGTHS = st.lists(st.floats(1, 80), min_size=1, max_size=40)
WINDOWS = st.sampled_from([None, 1, 2, 5])
COMPLETION = st.lists(st.integers(0, 2), min_size=1, max_size=30)


def told(stage, step, length):
    """What the control sets for the window after one of this mean length."""
    return stage(Progress(step, 40), LastWindow(length, 0.0, 0.0))


@given(lengths=LENGTHS, windows=WINDOWS)
@settings(max_examples=60, deadline=None)
def test_stages_only_move_on_and_none_begins_after_its_step(lengths, windows):
    stage, seen = StagedLength(**SETTINGS, windows=windows), [0]
    for step, length in enumerate(lengths):
        found = told(stage, step, length)
        limits = [limit for _, limit in SETTINGS["stages"]]
        seen.append(limits.index(found["max_completion_length"]))
        assert [found["epsilon"], found["epsilon_high"]] == SETTINGS["clips"][seen[-1]]
        due = sum(begin <= step for begin, _ in SETTINGS["stages"]) - 1
        assert max(seen[-2], due) <= seen[-1] <= max(seen[-2] + 1, due)
        assert windows is not None or seen[-1] == due


@given(lengths=LENGTHS, windows=WINDOWS, at=st.integers(0, 39))
@settings(max_examples=60, deadline=None)
def test_restored_state_has_the_same_future(lengths, windows, at):
    stage = StagedLength(**SETTINGS, windows=windows)
    for step, length in enumerate(lengths[:at]):
        told(stage, step, length)
    restored = StagedLength(**SETTINGS, windows=windows)
    restored.load_state_dict(copy.deepcopy(stage.state_dict()))
    for step, length in enumerate(lengths[at:], start=at):
        assert told(stage, step, length) == told(restored, step, length)
        assert stage.state_dict() == restored.state_dict()


@given(
    completions=st.lists(COMPLETION, min_size=1, max_size=6),
    reading=st.sampled_from(["paper", "code"]),
    cut=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_completion_pays_for_itself_alone_and_at_most_everything(completions, reading, cut):
    rewards, truncated = torch.ones(len(completions)), torch.full((len(completions),), cut)
    shaped, metrics = without_loops(rewards, completions, truncated, reading=reading)
    alone = [without_loops(rewards[:1], [ids], truncated[:1], reading=reading)[0] for ids in completions]
    assert torch.equal(shaped, torch.cat(alone))
    assert (shaped >= (0 if reading == "paper" else 0.9 - 1e-6)).all() and (shaped <= 1).all()
    assert 0 <= metrics["campo/loop_share"] <= metrics["campo/looping"] <= 1
    if reading == "code" and not cut:
        assert torch.equal(shaped, rewards)


@pytest.mark.parametrize("reading", ["paper", "code"])
@given(completion=COMPLETION)
@settings(max_examples=60, deadline=None)
def test_what_ends_with_a_token_of_its_own_pays_nothing(reading, completion):
    """As a completion does that ends with an end-of-sequence token."""
    ended, one = [*completion, 9], torch.ones(1)
    assert torch.equal(without_loops(one, [ended], torch.tensor([True]), reading=reading)[0], one)
