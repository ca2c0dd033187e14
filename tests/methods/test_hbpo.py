"""HBPO's prompts, reward and credit: literal numbers in both forms, and settings."""

import math

import pytest
import torch

from rltoken.methods.hbpo import budget_reward, hbpo, subgroup_prompt
from tests.methods.configured import assert_defaults, assert_refused, built
from tests.methods.worked import CORRECT, GROUP, LENGTHS, REWARDS, assert_close


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


def test_configurations_have_the_papers_settings():
    pipeline = built("+prompt=hbpo", "+shape=hbpo", "+credit=hbpo", "trainer.max_completion_length=4096")
    (stage,) = pipeline["prompts"]
    assert_defaults(stage, "method.prompts.hbpo", subgroup_prompt)
    (stage,) = pipeline["shapes"]
    assert_defaults(stage, "method.shapes.hbpo", budget_reward)
    (stage,) = pipeline["credits"]
    assert_defaults(stage, "method.credits.hbpo", hbpo)


@pytest.mark.parametrize(
    ("choice", "setting"),
    [
        ("+prompt=hbpo", "method.prompts.hbpo.budgets=[0]"),
        ("+prompt=hbpo", "method.prompts.hbpo.budgets=[512,1024]"),  # of completions of 112
        ("+prompt=hbpo", "method.prompts.hbpo.budgets=[0.5,0.25]"),
        ("+prompt=hbpo", "method.prompts.hbpo.template=hurry"),
        ("+shape=hbpo", "method.shapes.hbpo.alpha=-1"),
        ("+shape=hbpo", "method.shapes.hbpo.form=book"),
        ("+shape=hbpo", "method.shapes.hbpo.gated=1"),
    ],
)
def test_settings_out_of_range_are_refused(choice, setting):
    assert_refused(choice, setting)
