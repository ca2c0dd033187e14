"""CAMPO in training: DAPO without its parts, each part alone, resumed, split, the objective's worked numbers."""

import functools

import pytest
import torch

from rltoken.methods.campo import StagedLength, without_loops
from rltoken.methods.dynamic_sampling import dynamic_sampling
from tests.trl.losses import loss_of

CLIP = (0.02, 0.028)
TRAINER = {"loss_type": "dapo", "num_iterations": 2, "delta": 10.0}
LOOPING = {"temperature": 0.1}
"""The random model falls into loops when it is sampled almost greedily."""
DAPO = TRAINER | {"epsilon": CLIP[0], "epsilon_high": CLIP[1]}


def some_success(completion_ids, **_):
    """1 for every third first token: whole groups are often alike."""
    return [float(ids[0] % 3 == 0) for ids in completion_ids]


def campo(*, stages=((0, 12),), clips=(CLIP,), windows=None, penalty=True, **settings):
    """The stages of CAMPO, fresh ones since the control keeps state."""
    control = StagedLength(stages=stages, clips=clips, longest=12, windows=windows, rise=settings.pop("rise", 0.02))
    return {
        "controls": {"campo": control},
        "rows": {"dynamic": functools.partial(dynamic_sampling, max_rounds=2)},
        "shapes": {"campo": functools.partial(without_loops, **settings)} if penalty else {},
    }


OWN = ("control/", "campo/", "rewards/shaped/")
"""How the metrics begin that only CAMPO logs."""


def test_with_one_stage_and_without_the_penalty_it_is_dapo(run):
    sampled = {"rows": campo()["rows"]}
    dapo = run(sampled, reward=some_success, **DAPO)
    bare = run(campo(penalty=False), reward=some_success, **TRAINER)
    nothing_loops = run(campo(min_repeats=12), reward=some_success, **TRAINER)
    assert dapo.distance(bare) == dapo.distance(nothing_loops) == 0.0
    for theirs, ours in zip(dapo.metrics, nothing_loops.metrics, strict=True):
        assert theirs == {key: value for key, value in ours.items() if not key.startswith(OWN)}


def test_without_dynamic_sampling_it_is_stock_trl(run):
    stages = campo(penalty=False) | {"rows": {}}
    assert run(**DAPO).distance(run(stages, **TRAINER)) == 0.0


PARTS = {
    "penalty": ({}, LOOPING),
    "stage": ({"penalty": False, "stages": ((0, 6), (2, 12))}, {}),
    "clip": ({"penalty": False, "stages": ((0, 12), (2, 12)), "clips": (CLIP, (0.2, 0.3))}, {"learning_rate": 1e-3}),
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_changes_what_is_trained(run, part):
    own, trainer = PARTS[part]
    settings = {"reward": some_success, **trainer}
    dapo = run({"rows": campo()["rows"]}, **settings, **DAPO)
    assert dapo.distance(run(campo(**own), **settings, **TRAINER)) > 1e-5


def test_completions_stop_at_the_limit_of_their_stage(run):
    found = run(campo(stages=((0, 4), (2, 9))), reward=some_success, **TRAINER)
    windows = [line for line in found.metrics if "control/max_completion_length" in line]
    assert [line["control/max_completion_length"] for line in windows] == [4, 9]
    assert [line["completions/max_length"] for line in windows] == [4, 9]


def test_dynamic_sampling_does_not_see_the_penalty(run):
    """No reward has spread but by loops: every group is replaced in every round all the same."""
    flat = LOOPING | {"reward": lambda completions, **_: [1.0] * len(completions), "max_steps": 1}
    found = run(campo(), **flat, **TRAINER).metrics[0]
    assert found["dynamic_sampling/flat"] == 1.0 and found["dynamic_sampling/dropped"] == 2 * 2
    assert found["campo/loop_share"] > 0 and found["reward_std"] > 0


MOVING = {"stages": ((0, 6), (90, 12)), "windows": 1, "rise": 9.0, "clips": (CLIP, (0.2, 0.3))}
"""Any two windows count as saturated."""


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 7])
def test_resume_is_exact(run, tmp_path, step):
    settings = TRAINER | LOOPING | {"reward": some_success, "max_steps": 8}
    settings |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    whole = run(campo(**MOVING), output_dir=tmp_path / "whole", **settings)
    checkpoint = str(tmp_path / f"whole/checkpoint-{step}")
    resumed = run(campo(**MOVING), output_dir=tmp_path / "resumed", resume=checkpoint, **settings)
    assert whole.distance(resumed) == 0.0
    assert whole.metrics[-2:] == resumed.metrics[-2:]
    (state,) = whole.trainer.pipeline.state_dict().values()
    assert state == resumed.trainer.pipeline.state_dict()["method.controls.campo"]
    assert state["stage"] == 1 and len(state["lengths"]) == 1, "it has moved on between two of the checkpoints"


SPLIT = {
    "micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "packs": {"pack_tokens": 40},
}


@pytest.mark.parametrize("name", SPLIT)
def test_however_a_window_is_split_it_is_the_same(run, name):
    settings = TRAINER | {"optim": "sgd", "reward": some_success, "pack_tokens": None}
    one = run(campo(**MOVING), **settings)
    assert one.distance(run(campo(**MOVING), **settings | SPLIT[name])) < 5e-7
    assert one.distance(run(campo(**MOVING), **settings | {"learning_rate": 0.0})) > 1e-6


OBJECTIVE = {(1.5, 1): 1.28, (0.5, 1): 0.5, (1.5, -1): -1.5, (0.5, -1): -0.8, (15, -1): -10.0}
"""(ratio, advantage) -> the clipped objective of a token, with 0.2, 0.28 and the dual clip of 10."""


def test_the_clipped_objective(run):
    trainer = run({}, max_steps=1, **TRAINER | {"epsilon": 0.2, "epsilon_high": 0.28}).trainer
    for (ratio, advantage), expected in OBJECTIVE.items():
        logps, token = torch.tensor([[ratio]]).float().log(), torch.ones(1, 1, dtype=torch.long)
        assert -loss_of(trainer, logps, torch.tensor([float(advantage)]), token).item() == pytest.approx(expected)
