"""Literal numbers of the shapes and credits at advantage level, and that their configurations compose and build."""

import functools
import inspect
import math

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from rltoken.config import check_keys, register_schemas
from rltoken.errors import UserError
from rltoken.methods.arora_zanette import arora_zanette
from rltoken.methods.dler import dler, unfinished
from rltoken.methods.grpo_lead import concise, difficulty_weighted, mean_of_shortest
from rltoken.methods.hbpo import budget_reward, hbpo, subgroup_prompt
from rltoken.methods.o1_pruner_style import length_harmonised, standardised
from rltoken.methods.rloo import rloo
from rltoken.methods.think_prune import PAPER, limit_prompt, think_prune
from rltoken.ops import group_std, group_sum
from rltoken.pipeline import build
from rltoken.types import Progress

NAN = torch.nan
CORRECT = torch.tensor([True, True, False, True])
REWARDS = CORRECT.float()
LENGTHS = torch.tensor([1000, 3000, 4000, 2000])
NONE_CUT = torch.zeros(4, dtype=torch.bool)
GROUP = torch.tensor([5, 5, 5, 5])


def assert_close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-5, atol=2e-6, equal_nan=True)


def test_arora_zanette_and_rloo():
    shaped = arora_zanette(REWARDS, CORRECT, LENGTHS, NONE_CUT, GROUP, alpha=0.2)
    assert_close(shaped, [0.954579, 0.845421, 0.0, 0.9])
    assert_close(rloo(shaped, GROUP), [0.372773, 0.227227, -0.9, 0.3])


def test_arora_zanette_of_a_single_success_and_of_a_cut_one():
    correct, cut = torch.tensor([True, False, True, False]), torch.tensor([False, False, True, True])
    assert_close(arora_zanette(correct.float(), correct, LENGTHS, cut, GROUP, alpha=0.2), [0.9, 0.0, 0.0, 0.0])


def test_rloo_leaves_ungraded_rows_out_and_has_no_baseline_for_one_alone():
    rewards, group = torch.tensor([1.0, 0.0, NAN, 4.0, 7.0]), torch.tensor([0, 0, 0, 0, 1])
    assert_close(rloo(rewards, group), [1 - 4 / 2, 0 - 5 / 2, NAN, 4 - 1 / 2, 0.0])


def test_dler_whitens_over_tokens():
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1])
    group, mask = torch.arange(8) // 4, torch.ones(8, 1).expand(8, 20_000)
    expected = torch.tensor([1.069045, -1.069045, -1.069045, 1.069045, -0.534522, -0.534522, -0.534522, 1.603567])
    assert_close(dler(rewards, rewards > 0, group, mask, boost=0.0), expected.tolist())
    assert_close(dler(rewards, rewards > 0, group, mask), (expected + 0.1 * rewards).tolist())


def test_dler_weighs_a_response_by_its_tokens_with_the_unbiased_variance():
    """d = .5, -.5 on 3 and 1 tokens: mean .25, variance (3 * .0625 + .5625) / 3 = .25."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]])
    found = dler(torch.tensor([1.0, 0.0]), torch.tensor([True, False]), torch.tensor([0, 0]), mask, boost=0.0)
    assert_close(found, [0.5, -1.5])


def test_dler_takes_nine_tenths_from_what_was_cut():
    rewards, cut = torch.tensor([1.0, 1.0, 0.0, NAN]), torch.tensor([False, True, True, True])
    assert_close(unfinished(rewards, cut), [1.0, 0.1, 0.0, NAN])


def test_grpo_lead():
    shaped = concise(REWARDS, CORRECT, LENGTHS, GROUP, longer_than=0)
    assert_close(shaped, [1.051271, 0.951229, -1.0, 1.0])
    assert_close(difficulty_weighted(shaped, CORRECT, GROUP), [0.52246, 0.427539, -2.237091, 0.473813])
    unweighted = difficulty_weighted(shaped, CORRECT, GROUP, lowest=1.0, highest=1.0)
    ratio = difficulty_weighted(shaped, CORRECT, GROUP) / unweighted
    assert_close(ratio, [0.95, 0.95, 1.492638, 0.95])


def test_grpo_lead_leaves_length_out_where_the_three_shortest_are_short():
    assert_close(concise(REWARDS, CORRECT, LENGTHS, GROUP), [1.0, 1.0, -1.0, 1.0])
    assert_close(concise(REWARDS, CORRECT, LENGTHS, GROUP, longer_than=2000), [1.0, 1.0, -1.0, 1.0])
    assert_close(concise(REWARDS, CORRECT, LENGTHS, GROUP, longer_than=1999)[:1], [1.051271])
    lengths = torch.tensor([4.0, 8, NAN, 2, 6, NAN])
    assert_close(mean_of_shortest(lengths, torch.tensor([0, 0, 0, 0, 0, 1])), [4.0, 4, 4, 4, 4, NAN])


def asked_for(*budgets):
    return [{"budget": budget} for budget in budgets]


def test_hbpo():
    inputs = asked_for(1000, 1000, 2500, 2500)
    shaped = budget_reward(REWARDS, CORRECT, LENGTHS, inputs, GROUP, alpha=1e-4, beta=1.0, gated=False)
    assert_close(shaped, [0.927363, 0.208044, 0.0, 0.574553])
    assert_close(hbpo(shaped, inputs, GROUP, beta=1.0), [0.86184, -0.895902, -1.3319, 0.07209])


def test_hbpos_constants_follow_the_longest_completion():
    """At half the paper's length: 4 cos(1500 pi / 4096) - (1500 - 512) / 2048 = 1.151764, budgets of 256 to 1280."""
    one, zero = torch.tensor([True]), torch.tensor([0])
    found = budget_reward(one.float(), one, torch.tensor([1500]), asked_for(512), zero, longest=2048)
    assert_close(found, [4 * math.cos(1500 * math.pi / 4096) - 988 / 2048])
    inputs = [{"prompt": [{"role": "user", "content": "q"}]} for _ in range(4)]
    for longest, expected in ((4096, [512, 1024, 2048, 2560]), (2048, [256, 512, 1024, 1280]), (112, [14, 28, 56, 70])):
        assert [row["budget"] for row in subgroup_prompt(inputs, GROUP, longest=longest)] == expected


def test_hbpo_as_in_the_released_code():
    """4 cos(pi / 8192) - 511 / 4096 = 3.875244 is less than 4 cos(512 pi / 8192) = 3.923141; A_intra counts twice."""
    one, long, zero = torch.tensor([True]), torch.tensor([1]), torch.tensor([0])
    inputs = asked_for(512)
    assert_close(budget_reward(one.float(), one, long, inputs, zero), [3.923141])
    assert_close(budget_reward(one.float(), one, long, inputs, zero, form="code"), [3.875244])
    rewards, inputs = torch.tensor([3.0, 1.0]), asked_for(512, 512)
    paper, code = (hbpo(rewards, inputs, torch.tensor([0, 0]), form=form) for form in ("paper", "code"))
    assert_close(code - paper, [2 - 3.923141] * 2)


def test_hbpo_gates_what_would_fall_below_a_wrong_answer():
    """n = 4000, b = 512: 4 cos(4000 pi / 8192) - 3488 / 4096 = -.704333."""
    correct, lengths = torch.tensor([True, False]), torch.tensor([4000, 10])
    settings = correct.float(), correct, lengths, asked_for(512, 512), torch.tensor([0, 0])
    assert_close(budget_reward(*settings, gated=False), [-0.704333, 0.0])
    assert_close(budget_reward(*settings), [0.0, 0.0])
    # a wrong answer that has a reward keeps it, and lifts the correct one; as published it has none
    partly = (torch.tensor([1.0, 0.25]), *settings[1:])
    assert_close(budget_reward(*partly), [0.25, 0.25])
    assert_close(budget_reward(*partly, gated=False), [-0.704333, 0.0])


def test_hbpo_splits_a_group_evenly_over_the_budgets():
    inputs = [{"prompt": [{"role": "user", "content": "q"}]} for _ in range(8)]
    changed = subgroup_prompt(inputs, torch.arange(8) // 4, budgets=[512, 1024])
    assert [example["budget"] for example in changed] == [512, 512, 1024, 1024] * 2
    assert changed[0]["prompt"][-1]["content"] == "q I will answer the question within 512 tokens."
    assert inputs[0] == {"prompt": [{"role": "user", "content": "q"}]}, "the data set's own rows stay as they are"
    with pytest.raises(ValueError, match="num_generations a multiple of 3"):
        subgroup_prompt(inputs, torch.arange(8) // 4, budgets=[1, 2, 3])
    with pytest.raises(ValueError, match=r"\+prompt=hbpo"):
        hbpo(REWARDS, inputs[:4], GROUP)


def test_o1_pruner_style():
    for gated in (True, False):
        weights = length_harmonised(REWARDS, CORRECT, LENGTHS, GROUP, gated=gated)
        assert_close(weights, [2.75, 1.083333, -2.0, 1.5])
    assert_close(standardised(weights), [1.097106, 0.143101, -1.621808, 0.381602])


def test_o1_pruner_style_gates_a_short_wrong_answer():
    """Mean 2050: the wrong one gets 19.5 - 2.5, clipped to 4, or without its length -2.5, clipped to -2."""
    correct, lengths, group = torch.tensor([True, False]), torch.tensor([4000, 100]), torch.tensor([0, 0])
    assert_close(length_harmonised(correct.float(), correct, lengths, group, gated=False), [2.0125, 4.0])
    assert_close(length_harmonised(correct.float(), correct, lengths, group), [2.0125, -2.0])


def test_think_prune_shortens_at_its_steps():
    lengths = [think_prune(Progress(step, 500))["max_completion_length"] for step in (0, 179, 180, 359, 360, 499)]
    assert lengths == [4000, 4000, 3000, 3000, 2000, 2000]
    for stages in (((0, 112), (20, 84)), ((0, 1.0), (20, 0.75)), ((0, 1.0), (20, 84))):
        lengths = [think_prune(Progress(step, 60), stages=stages, longest=112) for step in (0, 19, 20)]
        assert [found["max_completion_length"] for found in lengths] == [112, 112, 84]


def test_think_prune_tells_the_limit_in_force():
    user, system = {"role": "user", "content": "q"}, {"role": "system", "content": "Be exact."}
    inputs = [{"prompt": [user]}, {"prompt": [system, user]}]
    bare, added = (row["prompt"] for row in limit_prompt(inputs, Progress(200, 500), stages=PAPER))
    told = "The output of the assistant should be within 3000 tokens."
    assert bare == [{"role": "system", "content": told}, user]
    assert added == [{"role": "system", "content": f"Be exact. {told}"}, user]
    assert inputs[1]["prompt"] == [system, user], "the data set's own rows stay as they are"


def test_group_reductions():
    values, group = torch.tensor([1.0, 3.0, NAN, 6.0, 5.0]), torch.tensor([4, 4, 4, 4, 9])
    among = torch.tensor([True, True, True, False, False])
    assert_close(group_sum(values, group), [10.0, 10, 10, 10, 5])
    assert_close(group_sum(values, group, among), [4.0, 4, 4, 4, 0])
    assert_close(group_std(values, group), [2.516611] * 4 + [0.0])
    assert_close(group_std(values, group, among, correction=0), [1.0] * 4 + [0.0])


METHODS = {
    "arora_zanette": {"shape": [arora_zanette]},
    "rloo": {"credit": [rloo]},
    "dler": {"shape": [unfinished], "credit": [dler]},
    "grpo_lead": {"shape": [concise], "credit": [difficulty_weighted]},
    "hbpo": {"prompt": [subgroup_prompt], "shape": [budget_reward], "credit": [hbpo]},
    "o1_pruner_style": {"shape": [length_harmonised], "credit": [standardised]},
    "think_prune": {"control": [think_prune], "prompt": [limit_prompt]},
}


@functools.cache
def composed(*overrides):
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))


def built(*overrides):
    cfg = composed(*overrides)
    check_keys(cfg)
    return build(instantiate(cfg.method, _convert_="object"))


def plain(value):
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


LONGEST = {"hbpo": 4096, "think_prune": 4000}
"""The papers' longest completions, which the constants of these two follow."""


@pytest.mark.parametrize("name", METHODS)
def test_configurations_compose_and_build_with_the_papers_settings(name):
    slots = METHODS[name]
    longest = [f"trainer.max_completion_length={LONGEST[name]}"] if name in LONGEST else []
    pipeline = built(*(f"+{slot}={name}" for slot in slots), *longest)
    for slot, (function,) in slots.items():
        (stage,) = pipeline[f"{slot}s"]
        assert stage.key == f"method.{slot}s.{name}" and stage.call.func is function
        defaults = {
            key: plain(parameter.default)
            for key, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        assert {key: plain(value) for key, value in stage.call.keywords.items()} == defaults


@pytest.mark.parametrize(
    ("group", "setting"),
    [
        ("shape=arora_zanette", "method.shapes.arora_zanette.alpha=1.5"),
        ("shape=dler", "method.shapes.dler.factor=-1"),
        ("credit=dler", "method.credits.dler.boost=-0.1"),
        ("shape=grpo_lead", "method.shapes.grpo_lead.wrong=0.5"),
        ("credit=grpo_lead", "method.credits.grpo_lead.midpoint=2"),
        ("prompt=hbpo", "method.prompts.hbpo.budgets=[0]"),
        ("prompt=hbpo", "method.prompts.hbpo.budgets=[512,1024]"),  # of completions of 112
        ("prompt=hbpo", "method.prompts.hbpo.budgets=[0.5,0.25]"),
        ("prompt=hbpo", "method.prompts.hbpo.template=hurry"),
        ("shape=hbpo", "method.shapes.hbpo.alpha=-1"),
        ("shape=hbpo", "method.shapes.hbpo.form=book"),
        ("shape=hbpo", "method.shapes.hbpo.gated=1"),
        ("shape=o1_pruner_style", "method.shapes.o1_pruner_style.least=1"),
        ("control=think_prune", "method.controls.think_prune.stages=[[10,40]]"),
        ("control=think_prune", "method.controls.think_prune.stages=[[0,40],[180,30],[180,20]]"),
        ("control=think_prune", "method.controls.think_prune.stages=[[0,40],[1.5,30]]"),
        ("control=think_prune", "method.controls.think_prune.stages=[[0,1.0],[9,0.001]]"),
        ("control=think_prune", "method.controls.think_prune.stages=[[0,1.0],[9,4000]]"),
        ("control=think_prune", "method.controls.think_prune.stages=[[0,1.5]]"),
        ("control=think_prune", "method.controls.think_prune.stages=[40]"),
        ("control=think_prune", "method.controls.think_prune.stages=[]"),
    ],
)
def test_a_wrong_value_gets_one_error_that_names_its_key(group, setting):
    with pytest.raises(UserError) as refused:
        built(f"+{group}", setting)
    assert str(refused.value).startswith(setting.partition("=")[0] + ":")
