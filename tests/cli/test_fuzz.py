"""`scripts/fuzz.py`: what it draws, how it judges, and that every configuration trains or is refused in one line."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("fuzz")


def test_configurations_are_drawn_by_seed_and_number(fuzz):
    found = [tuple(fuzz.drawn(0, number)) for number in range(100)]
    assert found == [tuple(fuzz.drawn(0, number)) for number in range(100)]
    assert len(set(found)) == 100 and fuzz.drawn(1, 0) != fuzz.drawn(0, 0)
    keys = {item.partition("=")[0].lstrip("+") for overrides in found for item in overrides}
    assert fuzz.CHOICES.keys() | set(fuzz.STAGES) <= keys, "every group and setting occurs"


@pytest.mark.parametrize(
    ("status", "log", "told"),
    [
        (2, "a warning\nerror: trainer.beta: no.\n", ("refused", "error: trainer.beta: no.")),
        (2, "error: one\nerror: two\n", ("failed", "2 lines say why")),
        (2, "Traceback (most recent call last):\nerror: one\n", ("failed", "status 2: error: one")),
        (1, "ValueError: x\n", ("failed", "status 1: ValueError: x")),
        (-11, "", ("failed", "status -11: no output")),
    ],
)
def test_what_counts_as_refused(fuzz, tmp_path, status, log, told):
    (tmp_path / "log.txt").write_text(log)
    assert fuzz.outcome(tmp_path, status) == told


@pytest.mark.parametrize(
    ("steps", "logged", "told"),
    [
        (2, 2, ("trained", "")),
        (1, 1, ("failed", "ended at step 1, logged 1")),
        (2, 1, ("failed", "ended at step 2, logged 1")),
    ],
)
def test_what_counts_as_trained(fuzz, tmp_path, steps, logged, told):
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "log.txt").write_text("step 2/2\n")
    (tmp_path / "runs/x/metrics.jsonl").write_text(f'{{"step": {logged}}}\n')
    (tmp_path / "runs/x/report.json").write_text(f'{{"steps": {steps}}}')
    assert fuzz.outcome(tmp_path, 0) == told


@pytest.mark.slow
def test_five_hundred_configurations_train_or_say_why_not(tmp_path, cache):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/fuzz.py", "--count", "500", "--seed", "2", "--out", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RLTOKEN_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=4 * 3600,
    )
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if ": failed: " in line)
    assert " refused, 0 failed; " in done.stdout
