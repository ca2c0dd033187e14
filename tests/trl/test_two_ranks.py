"""Two ranks under gloo give the weights of one rank on the same rollouts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).with_name("two_ranks.py")
ROOT = SCRIPT.parents[2]


def started(script, ranks, tiny, tmp_path, *arguments):
    """What a script saves that trains 16 rows, split over so many ranks."""
    folder, _, dataset = tiny
    data, out = tmp_path / "data", tmp_path / f"{ranks}.pt"
    if not data.exists():
        dataset.save_to_disk(data)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*launcher, script, folder, data, out, str(16 // ranks), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


def train(ranks, tiny, tmp_path, method, loss_type, pack_tokens=0):
    return started(SCRIPT, ranks, tiny, tmp_path, method, loss_type, str(pack_tokens))


def distance(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.mark.parametrize(
    ("method", "loss_type", "pack_tokens"),
    [
        ("tokens", "dapo", 0),
        ("thr", "dapo", 0),
        ("marks", "dapo", 60),
        ("self_reward", "dr_grpo", 60),
        ("rows", "grpo", 60),
        ("brpo", "dr_grpo", 60),
        ("mrt", "dapo", 60),
        ("hapo", "dapo", 0),
        ("spine", "dapo", 0),
        ("campo", "dapo", 0),
        ("kdrl", "dapo", 0),
        pytest.param("rows", "dapo", 0, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one(tiny, tmp_path, method, loss_type, pack_tokens):
    one = train(1, tiny, tmp_path, method, loss_type)
    two = train(2, tiny, tmp_path, method, loss_type, pack_tokens)
    assert distance(one, two) < 1e-6
    start = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32).state_dict()
    assert distance(start, one) > 1e-5
    assert (method == "hapo") == ("method.controls.hapo.pivot" in one), "the state of stages is compared too"
    if method == "campo":
        assert one["method.controls.campo.stage"] == 1 and one["method.controls.campo.lengths"].numel() == 1


@pytest.mark.slow
def test_dynamic_sampling_runs_on_two_ranks(tiny, tmp_path):
    """Its prompt stream is split over ranks, so weights differ from one rank's: it must agree on the rounds and end."""
    weights = train(2, tiny, tmp_path, "dynamic", "grpo")
    assert all(value.isfinite().all() for value in weights.values())


def test_every_shape_and_credit_sees_its_whole_groups_on_two_ranks(tiny, tmp_path):
    """Rewards and advantages of all ranks' windows; a window of two ranks holds the same prompts in the same order."""
    script = SCRIPT.with_name("two_ranks_stages.py")
    one, two = (started(script, ranks, tiny, tmp_path) for ranks in (1, 2))
    assert one.keys() == two.keys() and len(one) > 20
    for name in one:
        assert len(one[name]) == 2, name
        for alone, together in zip(one[name], two[name], strict=True):
            for a, b in zip(alone, together, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
        assert any(advantages.abs().max() > 0.01 for _, advantages in one[name]), name
