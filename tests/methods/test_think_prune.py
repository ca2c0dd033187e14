"""ThinkPrune's schedule, prompt and reward: literal numbers and settings."""

import pytest
import torch

from rltoken.methods.think_prune import PAPER, limit_prompt, think_prune, within_limit
from rltoken.types import Progress
from tests.methods.configured import assert_defaults, assert_refused, built, composed
from tests.methods.worked import CORRECT, GROUP, LENGTHS, REWARDS, assert_close, grpo

GATES = [False, True]


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


@pytest.mark.parametrize("gated", GATES)
def test_within_limit(gated):
    shaped = within_limit(REWARDS, CORRECT, GROUP, LENGTHS, limit=2500, gated=gated)
    assert_close(shaped, [1.0, 0.0, 0.0, 1.0])
    assert_close(grpo(shaped), [0.865875, -0.865875, -0.865875, 0.865875])
    as_share = within_limit(REWARDS, CORRECT, GROUP, LENGTHS, limit=0.625, gated=gated)
    assert_close(as_share, shaped.tolist())  # 2500 of 4000


def test_within_limit_gates_what_would_fall_below_a_wrong_answer_with_a_reward():
    partly = torch.tensor([1.0, 1.0, 0.25, 1.0])
    assert_close(within_limit(partly, CORRECT, GROUP, LENGTHS, limit=2500), [1.0, 0.25, 0.25, 1.0])
    assert_close(within_limit(partly, CORRECT, GROUP, LENGTHS, limit=2500, gated=False), [1.0, 0.0, 0.0, 1.0])


def test_configurations_have_the_papers_settings():
    pipeline = built("+control=think_prune", "+prompt=think_prune", "trainer.max_completion_length=4000")
    (stage,) = pipeline["controls"]
    assert_defaults(stage, "method.controls.think_prune", think_prune)
    (stage,) = pipeline["prompts"]
    assert_defaults(stage, "method.prompts.think_prune", limit_prompt)
    assert composed("+shape=think_prune").method.shapes.think_prune.limit == 0.5


@pytest.mark.parametrize(
    ("choice", "setting"),
    [
        ("+control=think_prune", "method.controls.think_prune.stages=[[10,40]]"),
        ("+control=think_prune", "method.controls.think_prune.stages=[[0,40],[180,30],[180,20]]"),
        ("+control=think_prune", "method.controls.think_prune.stages=[[0,40],[1.5,30]]"),
        ("+control=think_prune", "method.controls.think_prune.stages=[[0,1.0],[9,0.001]]"),
        ("+control=think_prune", "method.controls.think_prune.stages=[[0,1.0],[9,4000]]"),
        ("+control=think_prune", "method.controls.think_prune.stages=[[0,1.5]]"),
        ("+control=think_prune", "method.controls.think_prune.stages=[40]"),
        ("+control=think_prune", "method.controls.think_prune.stages=[]"),
        ("+shape=think_prune", "method.shapes.think_prune.limit=1.5"),
        ("+shape=think_prune", "method.shapes.think_prune.limit=4000"),
    ],
)
def test_settings_out_of_range_are_refused(choice, setting):
    assert_refused(choice, setting)
