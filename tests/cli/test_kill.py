"""A trainer that is ended while it grades, with graders stuck in C code, leaves no process behind."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rltoken.preemption import ECHO_SECONDS, EXIT_CODE
from rltoken.resume import newest_whole
from tests.cli.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]
REWARD = """
from pathlib import Path

from rltoken.rewards.grader import shared


def forever(item):
    return 7 ** 10**9


def score(completions, **_):
    pool = shared(workers=2, seconds=float(Path("bound").read_text()))
    Path("grading").touch()
    return [float(result.failure == "timed_out") for result in pool.map(forever, list(range(len(completions))))]
"""


def wait_for(condition, seconds):
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def stuck(tmp_path, cache):
    """stuck(seconds): a trainer, and its graders, which are stuck in C code and are killed after so many seconds."""
    started = []

    def start(seconds):
        (tmp_path / "stuck.py").write_text(REWARD)
        (tmp_path / "bound").write_text(str(seconds))
        command = [sys.executable, "-m", "rltoken.train", "+exp=grpo", *itertools.chain(*TINY.values()), "name=x"]
        settings = ["reward.funcs.accuracy._target_=stuck.score", "eval.before=false", "data.train.n=4"]
        trainer = subprocess.Popen(
            [*command, *settings],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "RLTOKEN_CACHE": str(cache)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(trainer)
        process = psutil.Process(trainer.pid)

        def graders():
            children = [child for child in process.children(recursive=True) if child.status() != "zombie"]
            return [child for child in children if "worker" in " ".join(child.cmdline())]

        assert wait_for((tmp_path / "grading").exists, 120), trainer.stderr.read()
        assert wait_for(lambda: sum(child.cpu_times().user > 0.5 for child in graders()) == 2, 60), "stuck in C"
        return trainer, process, graders()

    yield start
    for trainer in started:
        trainer.kill()


def gone(children):
    return not any(child.is_running() and child.status() != "zombie" for child in children)


@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT,), (signal.SIGKILL,)])
def test_no_grader_outlives_the_trainer(stuck, signals):
    """The first SIGTERM waits for the step, and so for the graders; the second one waits for nothing."""
    trainer, _, children = stuck(600)
    for number in signals[:-1]:
        trainer.send_signal(number)
        time.sleep(ECHO_SECONDS + 0.2)
        assert trainer.poll() is None
    trainer.send_signal(signals[-1])
    assert wait_for(lambda: gone(children), 2)
    assert trainer.wait(timeout=30) == (130 if signals[-1] == signal.SIGINT else -signals[-1])


def test_sigterm_waits_for_the_bound_of_stuck_graders_and_leaves_none(stuck, tmp_path):
    trainer, process, children = stuck(3)
    trainer.send_signal(signal.SIGTERM)
    while trainer.poll() is None:  # killed graders are replaced until the step is over
        with contextlib.suppress(psutil.NoSuchProcess):
            children = {*children, *process.children(recursive=True)}
        time.sleep(0.05)
    assert wait_for(lambda: gone(children), 2)
    assert trainer.returncode == EXIT_CODE, trainer.stderr.read()
    assert newest_whole(tmp_path / "runs/x")[0].name == "checkpoint-1"
