"""What every length reward must keep: success comes first, rows and groups have no order, what was graded is finite."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltoken.methods.fast_math_r1 import fast_math_r1
from rltoken.methods.hapo_history import HapoHistory
from rltoken.methods.hawkeye import hawkeye
from rltoken.methods.kimi_length import kimi_length
from rltoken.methods.l1 import l1_exact, l1_max
from rltoken.methods.laser import LaserD, laser
from rltoken.methods.optima import optima
from rltoken.methods.shorter_better import shorter_better
from rltoken.methods.think_prune import within_limit
from rltoken.methods.tldr_style import LEVELS, tldr_style
from rltoken.pipeline import build
from rltoken.signals import rows_of

GATED = {
    "tldr_style": functools.partial(tldr_style, longest=300, short=3.0),
    "l1_exact": functools.partial(l1_exact, alpha=0.01),
    "l1_max": functools.partial(l1_max, alpha=0.01),
    "l1_max_code": functools.partial(l1_max, alpha=0.01, reading="code"),
    "kimi_length": functools.partial(kimi_length, weight=4.0),
    "shorter_better": functools.partial(shorter_better, beta=0.05),
    "within_limit": functools.partial(within_limit, limit=100),
    "fast_math_r1": functools.partial(fast_math_r1, longest=300),
    "fast_math_r1_characters": functools.partial(fast_math_r1, unit="characters", longest=300),
    "hawkeye": functools.partial(hawkeye, weight=1e-3),
    "hawkeye_ratio": functools.partial(hawkeye, weight=3.0, unit="ratio"),
    "optima": functools.partial(optima, weight=2.0, most=200),
}
CLASSES = {
    "hapo_history": functools.partial(HapoHistory, weight=3.0),
    "laser_d": functools.partial(LaserD, lowest=50, highest=400, interval=50),
}
UNGATED = {f"{name}_ungated": functools.partial(call, gated=False) for name, call in GATED.items()}
UNGATED_CLASSES = {f"{name}_ungated": functools.partial(call, gated=False) for name, call in CLASSES.items()}
ALL = [*GATED, *UNGATED, *CLASSES, *UNGATED_CLASSES, "laser"]
HISTORY = {"q0": 120, "q2": 30}


def stage_of(name):
    """The stage, with its state as a run would have it after some windows, chosen targets included."""
    if name in CLASSES or name in UNGATED_CLASSES:
        call = (CLASSES | UNGATED_CLASSES)[name]()
        if isinstance(call, HapoHistory):
            call.load_state_dict(HISTORY)
        else:
            call.load_state_dict({**call.state_dict(), "windows": 1, "targets": [400, 200, 100]})
    else:
        call = (GATED | UNGATED | {"laser": functools.partial(laser, target=150)})[name]
    return build({"shapes": {name: call}})["shapes"][0]


def window(seed, groups=3, size=4, *, correct=None, equal_lengths=False, ungraded=0.0):
    """Random signals of a window; `correct` is the share of correct answers, random when None."""
    generator = torch.Generator().manual_seed(seed)
    n = groups * size
    drawn = torch.rand(n, generator=generator)
    right = drawn < (torch.rand((), generator=generator) if correct is None else correct)
    lengths = torch.randint(1, 500, (n,), generator=generator)
    if equal_lengths:
        lengths = torch.full_like(lengths, 77)
    missing = torch.rand(n, generator=generator) < ungraded
    budgets = torch.randint(1, 400, (groups,), generator=generator).tolist()
    group = torch.arange(groups).repeat_interleave(size)
    columns = [
        {
            "budget": budgets[g],
            "budget_kind": ("exact", "maximum")[g % 2],
            "length_level": LEVELS[g % 3],
            "original_tokens": 2 * budgets[g],
        }
        for g in group.tolist()
    ]
    endings = ("", r"\boxed{1}</think>", "so it is thus. " * 3)
    return {
        "inputs": columns,
        "texts": [endings[i] + "x" * int(length) for i, length in zip((drawn * 3).long(), lengths, strict=True)],
        "rewards": right.float().masked_fill(missing, torch.nan),
        "correct": right & ~missing,
        "group": group,
        "prompt_id": [f"q{g}" for g in group.tolist()],
        "lengths": lengths,
        "thinking_lengths": (lengths * 0.8).long(),
    }


def assert_finite_where_graded(shaped, rewards):
    assert torch.equal(shaped.isnan(), rewards.isnan()) and shaped[~rewards.isnan()].isfinite().all()


@pytest.mark.parametrize("name", [*GATED, *CLASSES, "laser"])
@given(seed=st.integers(0, 10_000), ungraded=st.sampled_from([0.0, 0.3]))
@settings(max_examples=15, deadline=None)
def test_a_wrong_answer_never_beats_a_correct_one_of_its_group(name, seed, ungraded):
    signals = window(seed, ungraded=ungraded)
    shaped = stage_of(name).run(signals)
    for number in range(3):
        mine = (signals["group"] == number) & ~signals["rewards"].isnan()
        right, wrong = shaped[mine & signals["correct"]], shaped[mine & ~signals["correct"]]
        assert not right.numel() or not wrong.numel() or right.min() >= wrong.max()


@pytest.mark.parametrize("name", [*GATED, *CLASSES, "laser"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_the_length_of_a_wrong_answer_alone_is_nothing_to_it(name, seed):
    """Of two wrong answers with the same text but for its length, neither gains by it."""
    signals = window(seed, correct=0.0)
    signals["texts"] = ["x" * int(length) for length in signals["lengths"]]
    shaped = stage_of(name).run(signals)
    assert len(set(shaped.tolist())) == 1


CASES = {
    "all correct": {"correct": 1.0},
    "all wrong": {"correct": 0.0},
    "equal lengths": {"equal_lengths": True},
    "few successes": {"correct": 0.1},
    "groups of one": {"size": 1},
    "some ungraded": {"ungraded": 0.5},
    "none graded": {"ungraded": 1.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=3, deadline=None)
def test_what_was_graded_stays_finite(name, case, seed):
    signals = window(seed, **CASES[case])
    assert_finite_where_graded(stage_of(name).run(signals), signals["rewards"])


@pytest.mark.parametrize("name", ALL)
def test_a_single_success_is_finite_and_first(name):
    signals = window(3, groups=1)
    signals["correct"] = torch.tensor([False, True, False, False])
    signals["rewards"] = signals["correct"].float()
    shaped = stage_of(name).run(signals)
    assert_finite_where_graded(shaped, signals["rewards"])
    assert "ungated" in name or shaped[1] >= shaped.max()


@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 10_000), ungraded=st.sampled_from([0.0, 0.3]))
@settings(max_examples=6, deadline=None)
def test_rows_and_groups_have_no_order(name, seed, ungraded):
    signals = window(seed, ungraded=ungraded)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    names = torch.tensor([7, 0, 3])
    shuffled = rows_of({**signals, "group": names[signals["group"]]}, order)
    expected = stage_of(name).run(signals)[order]
    torch.testing.assert_close(stage_of(name).run(shuffled), expected, equal_nan=True)
    assert len(expected) == 12


@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 10_000), ungraded=st.sampled_from([0.0, 0.3]))
@settings(max_examples=6, deadline=None)
def test_groups_have_nothing_to_do_with_each_other(name, seed, ungraded):
    signals = window(seed, ungraded=ungraded)
    together = stage_of(name).run(signals)
    alone = [stage_of(name).run(rows_of(signals, torch.arange(i, i + 4))) for i in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(alone), together, equal_nan=True)
    assert len(together) == 12


@pytest.mark.parametrize("name", [*CLASSES, *UNGATED_CLASSES])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=6, deadline=None)
def test_state_does_not_depend_on_the_order_of_rows(name, seed):
    """So that ranks, which see the same rows in the same window, and runs on other numbers of ranks agree."""
    signals = window(seed, groups=4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    one, other = stage_of(name), stage_of(name)
    one.run(signals)
    other.run(rows_of(signals, order))
    assert one.call.state_dict() == other.call.state_dict()
