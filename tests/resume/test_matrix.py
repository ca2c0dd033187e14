"""`scripts/resume_matrix.py`: what its cells cover, when they are killed, what a comparison finds, and a few cells."""

import importlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
SLIM = (
    "grpo-g4-i2-p1-full-eval-log3-inside_a_window",
    "brpo-g4-i1-p2-lora-log1-while_saving",
    "hapo_history-g2-i2-p1-full-log1-after_training",
    "dynamic_sampling-g2-i1-p1-full-eval-log1-epoch_edge",
)


@pytest.fixture
def script(monkeypatch):
    """script(name): a module of scripts/, which is no package."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


def test_every_pair_of_settings_occurs(script):
    matrix = script("resume_matrix")
    found = matrix.cells(0)
    assert len({cell.name for cell in found}) == len(found) >= 40
    assert {cell.method for cell in found[:4]} == set(matrix.METHODS)
    axes = ("method", "per_generation", "iterations", "ranks", "lora", "evaluation", "logging")
    for one, other in itertools.combinations(axes, 2):
        values = [{getattr(cell, axis) for cell in found} for axis in (one, other)]
        pairs = {(getattr(cell, one), getattr(cell, other)) for cell in found}
        assert pairs == set(itertools.product(*values)), (one, other)
    assert all(sum(cell.kill == kill for cell in found) >= 6 for kill in matrix.KILLS)


@pytest.mark.parametrize("seed", range(20))
def test_kills_fall_where_their_names_say(script, seed):
    matrix = script("resume_matrix")
    for cell in matrix.cells(0):
        fatal = matrix.fatal_call(cell, random.Random(seed))
        if cell.kill == "random moment":
            assert fatal is None
            continue
        function, call, rank = fatal
        assert 0 <= rank < cell.ranks
        if function != matrix.TRAINING_STEP:
            assert rank == 0 and cell.kill == ("while saving" if function in matrix.SAVING else "after training")
            continue
        done = call - 1
        checkpoint = done // matrix.ACCUMULATION * matrix.ACCUMULATION
        assert {
            "inside a window": checkpoint % cell.window or (cell.window <= matrix.ACCUMULATION < done),
            "window edge": done % cell.window == 0 == done % matrix.ACCUMULATION and done > 0,
            "epoch edge": done == matrix.EPOCH,
            "last step": done == matrix.BATCHES - 1,
        }[cell.kill], cell.name


def test_a_random_moment_that_comes_too_late_is_drawn_earlier(script, tmp_path, monkeypatch):
    matrix, moments = script("resume_matrix"), []
    cell = next(cell for cell in matrix.cells(0) if cell.kill == "random moment")

    def run(work, folder, ranks, seconds):
        folder.mkdir()
        moments.append(seconds)
        return [0] if len(moments) < 3 else [-signal.SIGKILL]

    monkeypatch.setattr(matrix, "run", run)
    assert matrix.killed(cell, tmp_path / "run", random.Random(0), seconds=8.0) == 0
    assert all(0.1 * most <= moment <= 0.9 * most for moment, most in zip(moments, (8, 4, 2), strict=True))


def test_values_are_compared_bit_for_bit(script):
    compare = script("compare_runs")
    leaves = compare.leaves({"loss": [1.0, {"eval_runtime": 3.0, "step_time": 1.0, "timely": 2}], "none": ()})
    assert leaves == {"length": 2, "loss / length": 2, "loss / 0": 1.0, "loss / 1 / length": 3, "loss / 1 / timely": 2,
                      "none / length": 0}  # fmt: skip
    ones = torch.ones(2)
    assert compare.same(ones, ones.clone()) and compare.same(ones * torch.nan, ones * torch.nan)
    assert compare.same(float("nan"), float("nan")) and compare.same("a", "a")
    for other in (ones.double(), torch.ones(3), ones + 2**-23, 1.0):
        assert not compare.same(ones, other)
    assert not compare.same(1, 1.0)


@pytest.fixture
def finished(tmp_path):
    """A finished run of nothing but one number in every kind of file."""
    folder = tmp_path / "one"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "final").mkdir()
    (folder / "report.json").write_text('{"steps": 2}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": 5.0, "loss": 0.5}\n')
    save_file({"head": torch.ones(2)}, folder / "final/model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rltoken_0.pt"):
        torch.save({"value": torch.ones(2)}, folder / "checkpoint-2" / name)
    (folder / "checkpoint-2/trainer_state.json").write_text('{"epoch": 1.5}')
    return folder


def test_differences_say_what_differs_first_and_how(script, finished):
    differences, other = script("compare_runs").differences, finished.with_name("other")
    shutil.copytree(finished, other)
    (other / "metrics.jsonl").write_text('{"step": 1, "time": 6.0, "loss": 0.5}\n')
    assert differences(finished, other) == []
    (other / "metrics.jsonl").write_text('{"step": 1, "time": 6.0, "loss": 0.25}\n')
    save_file({"head": torch.tensor([1.0, 1.5])}, other / "final/model.safetensors")
    torch.save({"value": torch.ones(2)}, other / "checkpoint-2/rltoken_1.pt")
    (other / "checkpoint-2/trainer_state.json").write_text(json.dumps({"epoch": 2}))
    assert differences(finished, other) == [
        "metrics: 1 of 4 values, first line 1, step 1 / loss: 0.5 and 0.25",
        "weights: 1 of 3 values, first model.safetensors / head: the largest difference is 0.5",
        "window and stages: 3 of 5 values, first length: 1 and 2",
        "trainer state: 1 of 2 values, first epoch: 1.5 and 2",
    ]


def test_processes_end_together(script, tmp_path, capfd):
    forks = script("forks")

    def fail_on_the_second_rank():
        if os.environ["RANK"] == "1":
            raise ValueError("the reason")
        time.sleep(60)

    assert forks.run(lambda: time.sleep(60), tmp_path / "late", 2, seconds=0.2) == [-signal.SIGKILL] * 2
    with capfd.disabled():  # pytest's own stderr would not follow the descriptor into the log
        assert forks.run(fail_on_the_second_rank, tmp_path / "failed", 2) == [-signal.SIGKILL, 1]
    assert forks.told(tmp_path / "failed").startswith("ValueError: the reason (")
    assert forks.run(lambda: None, tmp_path / "well", 1) == [0]


def test_the_other_processes_have_so_long_to_end_by_themselves(script, tmp_path, capfd):
    forks = script("forks")

    def fail(seconds):
        """One fails at once, the other ends by itself after so long."""
        if os.environ["RANK"] == "0":
            os._exit(3)
        time.sleep(seconds)

    with capfd.disabled():
        assert forks.run(lambda: fail(0.5), tmp_path / "in_time", 2, grace=30) == [3, 0]
        assert forks.run(lambda: fail(60), tmp_path / "late", 2, grace=0.3) == [3, -signal.SIGKILL]


def test_every_method_goes_on_exactly(tmp_path):
    chosen = ["--cells", f"^({'|'.join(SLIM)})$", "--quick", "--out", tmp_path / "out", "model.source.steps=100"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/resume_matrix.py", *chosen],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RLTOKEN_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{len(SLIM)} of {len(SLIM)} cells are identical" in done.stdout


@pytest.mark.slow
def test_four_processes_survive_random_kills_of_all_of_them(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts/resume_matrix.py", "--kills", "10", "--method", "brpo", "--ranks", "4"),
            *("--out", tmp_path / "out", "trainer.max_steps=50"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RLTOKEN_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "10/10: brpo, 4 processes, " in done.stdout
