"""What the shapes and credits at advantage level must keep, on random and on degenerate groups."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltoken.methods.arora_zanette import arora_zanette
from rltoken.methods.dler import dler, unfinished
from rltoken.methods.grpo_lead import concise, difficulty_weighted
from rltoken.methods.hbpo import budget_reward, hbpo
from rltoken.methods.o1_pruner_style import length_harmonised, standardised
from rltoken.methods.rloo import rloo
from rltoken.ops import group_std, group_sum
from rltoken.pipeline import build
from rltoken.signals import rows_of

SHAPES = {
    "arora_zanette": functools.partial(arora_zanette, alpha=0.4),
    "dler_shape": unfinished,
    "grpo_lead_shape": functools.partial(concise, longer_than=0),
    "grpo_lead_shape_with_skips": functools.partial(concise, longer_than=30),
    "hbpo_shape": functools.partial(budget_reward, longest=60),
    "hbpo_shape_by_code": functools.partial(budget_reward, longest=60, alpha=0.1, form="code"),
    "hbpo_shape_ungated": functools.partial(budget_reward, longest=60, alpha=0.1, gated=False),
    "o1_pruner_style_shape": length_harmonised,
    "o1_pruner_style_shape_ungated": functools.partial(length_harmonised, gated=False),
}
CREDITS = {
    "rloo": rloo,
    "dler": dler,
    "grpo_lead": difficulty_weighted,
    "hbpo": functools.partial(hbpo, longest=60),
    "hbpo_by_code": functools.partial(hbpo, longest=60, form="code"),
    "o1_pruner_style": standardised,
}
STAGES = {**SHAPES, **CREDITS}
OF_THE_WINDOW = {"dler", "o1_pruner_style"}
GATED = [name for name in SHAPES if not name.endswith("ungated")]
CASES = ("random", "all_correct", "all_wrong", "one_success", "equal_lengths", "ungraded", "nothing_graded", "singles")


def window(seed, case, size=4, groups=3, tokens=50):
    """Random signals of a window, its groups numbered with gaps, with the trait that `case` names."""
    generator = torch.Generator().manual_seed(seed)
    rows = size * groups
    correct = torch.rand(rows, generator=generator) < 0.5
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    group = 10 - 3 * (torch.arange(rows) // (1 if case == "singles" else size))
    if case in ("all_correct", "all_wrong"):
        correct = torch.full_like(correct, case == "all_correct")
    if case == "one_success":
        correct = torch.arange(rows) % size == 1
    if case == "equal_lengths":
        lengths = torch.full_like(lengths, 7)
    ungraded = torch.rand(rows, generator=generator) < {"ungraded": 0.4, "nothing_graded": 2.0}.get(case, -1.0)
    return {
        "rewards": correct.float().masked_fill(ungraded, torch.nan),
        "correct": correct & ~ungraded,
        "lengths": lengths,
        "truncated": torch.rand(rows, generator=generator) < 0.3,
        "inputs": [{"budget": (8, 40)[i % 2]} for i in range(rows)],
        "group": group,
        "mask": (torch.arange(tokens) < lengths[:, None]).long(),
    }


def run(name, signals):
    slot = "shapes" if name in SHAPES else "credits"
    return build({slot: {name: STAGES[name]}})[slot][0].run(signals)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", STAGES)
@given(seed=st.integers(0, 10_000), case=st.sampled_from(CASES))
@settings(max_examples=20, deadline=None)
def test_results_are_finite_where_something_was_graded(name, seed, case):
    signals = window(seed, case)
    found = run(name, signals)
    graded = ~signals["rewards"].isnan()
    assert found.shape == graded.shape and found.dtype == torch.float32
    assert found[graded].isfinite().all() and found[~graded].isnan().all()
    assert (found[graded].abs() < 100).all()


@pytest.mark.parametrize("name", STAGES)
@given(seed=st.integers(0, 10_000), case=st.sampled_from(CASES))
@settings(max_examples=12, deadline=None)
def test_permuting_rows_permutes_results(name, seed, case):
    signals = window(seed, case)
    order = torch.randperm(signals["group"].numel(), generator=torch.Generator().manual_seed(seed))
    assert_same(run(name, rows_of(signals, order)), run(name, signals)[order])
    assert order.numel() == 12


@pytest.mark.parametrize("name", [name for name in STAGES if name not in OF_THE_WINDOW])
@given(seed=st.integers(0, 10_000), case=st.sampled_from(CASES))
@settings(max_examples=12, deadline=None)
def test_every_group_stands_alone(name, seed, case):
    signals = window(seed, case)
    together = run(name, signals)
    numbers = signals["group"].unique()
    for number in numbers:
        rows = (signals["group"] == number).nonzero().squeeze(1)
        assert_same(run(name, rows_of(signals, rows)), together[rows])
    assert len(numbers) in (3, 12)


@given(seed=st.integers(0, 10_000), case=st.sampled_from(CASES), padding=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_masked_tokens_never_matter(seed, case, padding):
    signals = window(seed, case)
    padded = signals | {"mask": torch.nn.functional.pad(signals["mask"], (padding, 2 * padding))}
    assert torch.equal(run("dler", padded).nan_to_num(9.0), run("dler", signals).nan_to_num(9.0))


@pytest.mark.parametrize("name", GATED)
@given(seed=st.integers(0, 10_000), case=st.sampled_from(CASES))
@settings(max_examples=20, deadline=None)
def test_a_wrong_answer_is_never_above_a_correct_one_of_its_group(name, seed, case):
    signals = window(seed, case)
    shaped, correct = run(name, signals), signals["correct"]
    for number in signals["group"].unique():
        rows = (signals["group"] == number) & ~shaped.isnan()
        right, wrong = shaped[rows & correct], shaped[rows & ~correct]
        assert not right.numel() or not wrong.numel() or right.min() >= wrong.max()


@pytest.mark.parametrize("name", GATED)
@given(seed=st.integers(0, 10_000), case=st.sampled_from(CASES))
@settings(max_examples=12, deadline=None)
def test_the_length_of_a_wrong_answer_never_changes_its_reward(name, seed, case):
    signals = window(seed, case) | {"truncated": torch.zeros(12, dtype=torch.bool)}
    wrong = ~signals["correct"]
    other = signals | {"lengths": torch.where(wrong, signals["lengths"] * 3 + 1, signals["lengths"])}
    assert_same(run(name, other)[wrong], run(name, signals)[wrong])
    assert (other["lengths"][wrong] != signals["lengths"][wrong]).all()


@given(seed=st.integers(0, 10_000), case=st.sampled_from(CASES))
@settings(max_examples=20, deadline=None)
def test_credits_without_a_bonus_sum_to_zero(seed, case):
    signals = window(seed, case)
    tokens = signals["mask"].sum(1)
    whitened = dler(signals["rewards"], signals["correct"], signals["group"], signals["mask"], boost=0.0)
    assert abs((tokens * whitened).nansum()) < 1e-2
    assert group_sum(rloo(signals["rewards"], signals["group"]), signals["group"]).abs().max() < 1e-4
    assert abs(standardised(signals["rewards"]).nansum()) < 1e-4


@given(seed=st.integers(0, 10_000), case=st.sampled_from(CASES), correction=st.integers(0, 1))
@settings(max_examples=20, deadline=None)
def test_group_reductions_are_torchs(seed, case, correction):
    signals = window(seed, case)
    values, group, among = signals["rewards"].double(), signals["group"], signals["correct"]
    sums, deviations = group_sum(values, group, among), group_std(values, group, correction=correction)
    for number in group.unique():
        rows = group == number
        kept = values[rows & ~values.isnan()]
        expected = kept.std(correction=correction).item() if kept.numel() > 1 else 0.0
        assert deviations[rows].tolist() == pytest.approx([expected] * int(rows.sum()))
        assert sums[rows].tolist() == pytest.approx([values[rows & among].sum().item()] * int(rows.sum()))
