"""Signals to oneself in the middle of a chosen phase of a run, a process for it, and what two runs are compared by."""

import itertools
import json
import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import TINY
from tests.trl.conftest import WALL_CLOCK

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"time", *WALL_CLOCK}
"""Fields of metrics.jsonl that hold wall-clock times."""
PHASES = {
    "generation": "rltoken.trl_compat.SeamTrainer._generate_single_turn",
    "grading": "tests.resume.phases.grading",
    "forced answers": "rltoken.methods.brpo.sample_answers",
    "backward": "accelerate.Accelerator.backward",
    "saving": "rltoken.resume.write_manifest",
    "loading": "rltoken.parts.model",
    "evaluation": "rltoken.evals.generators.TransformersGenerator.complete",
}
"""Phase -> the function that is called in it."""


def grading():
    """Called by `parity`, so that a test can let something happen there."""


def parity(completion_ids, **_):
    """A reward that varies within every group: the share of even token ids."""
    grading()
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def at_call(monkeypatch, target, count, act):
    """Let the `count`-th call of a function, from 1 on, begin with `act()`."""
    calls = itertools.count(1)
    work = pkgutil.resolve_name(target)

    def patched(*args, **kwargs):
        if next(calls) == count:
            act()
        return work(*args, **kwargs)

    monkeypatch.setattr(target, patched)


def send(number=signal.SIGTERM):
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


def logged(run):
    """The metrics of a run without wall-clock fields."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def started(cwd, cache, arguments, program="", launcher=()):
    """The entry in a session of its own, with the lines of a program before it."""
    cwd.mkdir(exist_ok=True)
    (cwd / "program.py").write_text(f"from rltoken import train\n{program}\ntrain.main()\n")
    return subprocess.run(
        [sys.executable, *launcher, "program.py", "+exp=grpo", *itertools.chain(*TINY.values()), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}", "RLTOKEN_CACHE": str(cache)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
