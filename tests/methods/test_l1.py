"""L1's prompts and both rewards: literal numbers and settings."""

import pytest
import torch

from rltoken.methods.l1 import l1_exact, l1_max, l1_prompt
from rltoken.pipeline import build
from tests.methods.configured import assert_refused, composed
from tests.methods.worked import CORRECT, GROUP, GROUPS, LENGTHS, PROMPTS, REWARDS, assert_close, by_group, grpo, rows

GATES = [False, True]


def test_l1_exact():
    shaped = l1_exact(rows(budget=2000), REWARDS, CORRECT, GROUP, LENGTHS, gated=False)
    assert_close(shaped, [0.7, 0.7, -0.6, 1.0])
    assert_close(grpo(shaped), [0.350021, 0.350021, -1.470088, 0.770046])
    assert_close(l1_exact(rows(budget=2000), REWARDS, CORRECT, GROUP, LENGTHS), [0.7, 0.7, 0.0, 1.0])


L1_MAX = {
    "paper": ([0.8, 0.2, 0.0, 0.5], [1.213939, -0.499857, -1.071123, 0.357041]),
    "code": ([0.65, 0.35, 0.0, 0.5], [0.987474, -0.08977, -1.346556, 0.448852]),
}


@pytest.mark.parametrize("gated", GATES)
@pytest.mark.parametrize("reading", L1_MAX)
def test_l1_max(reading, gated):
    inputs = rows(budget=2000, budget_kind="maximum")
    shaped = l1_max(inputs, REWARDS, CORRECT, GROUP, LENGTHS, reading=reading, gated=gated)
    assert_close(shaped, L1_MAX[reading][0])
    assert_close(grpo(shaped), L1_MAX[reading][1])


def test_l1_max_gives_prompts_for_an_exact_length_the_exact_reward():
    shaped = l1_max(rows(budget=2000, budget_kind="exact"), REWARDS, CORRECT, GROUP, LENGTHS, gated=False)
    assert_close(shaped, [0.7, 0.7, -0.6, 1.0])


def test_l1_max_of_both_kinds_in_one_window_and_of_prompts_that_name_no_kind():
    inputs = [{"budget": 2000, "budget_kind": kind} for kind in ("exact", "maximum", "exact")] + [{"budget": 2000}]
    groups = torch.arange(4)
    assert_close(l1_max(inputs, REWARDS, CORRECT, groups, LENGTHS, gated=False), [0.7, 0.2, -0.6, 0.5])
    assert_close(l1_max(inputs, REWARDS, CORRECT, groups, LENGTHS), [0.7, 0.2, 0.0, 0.5])


@pytest.mark.parametrize("ask", ["exact", "maximum", "both"])
def test_l1_prompts_draw_a_length_per_group(ask):
    changed = l1_prompt(PROMPTS, GROUPS, torch.Generator().manual_seed(0), least=100, most=4000, ask=ask)
    budgets, kinds = by_group(changed, "budget"), by_group(changed, "budget_kind")
    assert all(100 <= budget <= 4000 for budget in budgets) and len(set(budgets)) > 30
    assert set(kinds) == ({"exact", "maximum"} if ask == "both" else {ask})
    sentence = {"exact": "Think for {} tokens.", "maximum": "Think for maximum {} tokens."}[kinds[0]]
    assert changed[0]["prompt"][-1]["content"] == "q0 " + sentence.format(budgets[0])


def test_an_empty_range_of_lengths_is_refused():
    with pytest.raises(ValueError, match="least=9 to most=8; raise most"):
        l1_prompt(PROMPTS, GROUPS, torch.Generator(), least=9, most=8)
    assert l1_prompt(PROMPTS, GROUPS, torch.Generator(), least=8, most=8)[0]["budget"] == 8


def test_a_missing_column_says_what_fills_it():
    with pytest.raises(ValueError, match=r"no column 'budget'; add \+prompt=l1"):
        l1_exact(rows(), REWARDS, CORRECT, GROUP, LENGTHS)
    assert build({"shapes": {"mine": l1_exact}})["shapes"][0].needs[0] == "inputs"


def test_configurations_have_the_papers_settings():
    exact, most = (composed(f"+shape={name}").method.shapes[name] for name in ("l1_exact", "l1_max"))
    assert (exact.alpha, exact.gated) == (3e-4, True)
    assert (most.alpha, most.delta, most.reading) == (3e-4, 0.5, "paper")


@pytest.mark.parametrize(
    ("choice", "setting"),
    [
        ("+shape=l1_exact", "method.shapes.l1_exact.alpha=-1"),
        ("+shape=l1_exact", "method.shapes.l1_exact.gated=maybe"),
        ("+shape=l1_max", "method.shapes.l1_max.reading=papr"),
        ("+shape=l1_max", "method.shapes.l1_max.delta=2"),
        ("+prompt=l1", "method.prompts.l1.ask=often"),
        ("+prompt=l1", "method.prompts.l1.least=0"),
    ],
)
def test_settings_out_of_range_are_refused(choice, setting):
    assert_refused(choice, setting)
