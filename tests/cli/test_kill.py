"""A trainer that is ended while it grades, with graders stuck in C code, leaves no process behind."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cli.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]
REWARD = """
from pathlib import Path

from rltoken.rewards.grader import shared


def forever(item):
    return 7 ** 10**9


def score(completions, **_):
    pool = shared(workers=2, seconds=600)
    Path("grading").touch()
    return [result.value for result in pool.map(forever, list(range(len(completions))))]
"""


def wait_for(condition, seconds):
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_grader_outlives_the_trainer(tmp_path, cache, number):
    (tmp_path / "stuck.py").write_text(REWARD)
    command = [sys.executable, "-m", "rltoken.train", "+exp=grpo", *itertools.chain(*TINY.values())]
    trainer = subprocess.Popen(
        [*command, "reward.funcs.accuracy._target_=stuck.score", "eval.before=false"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RLTOKEN_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    process = psutil.Process(trainer.pid)

    def graders():
        return [child for child in process.children(recursive=True) if "worker" in " ".join(child.cmdline())]

    assert wait_for((tmp_path / "grading").exists, 120), trainer.stderr.read().decode()
    assert wait_for(lambda: sum(child.cpu_times().user > 0.5 for child in graders()) == 2, 60), "both are stuck in C"
    children = graders()
    trainer.send_signal(number)
    assert wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), 2)
    assert trainer.wait(timeout=30) != 0
