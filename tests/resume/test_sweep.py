"""A sweep that was killed or told to leave: the same command finishes what is missing, and nothing is trained twice."""

import json
import signal

import pytest

from rltoken.resume import newest_whole
from tests.resume.phases import logged, started

ENDED = """
from pytest import MonkeyPatch
from tests.resume.phases import PHASES, at_call, send
at_call(MonkeyPatch(), PHASES["grading"], 5, lambda: send({number}))
"""
"""Three steps to a job: the fifth grading is in the second step of the second one."""
SWEEP = (
    "seed=1,2,3", "resume=auto", "name='s${seed}'", "eval.before=false", "eval.after=false",
    "trainer.learning_rate=0.01", "trainer.max_steps=3", "reward.funcs.accuracy._target_=tests.resume.phases.parity",
    "--multirun",
)  # fmt: skip


def swept(cwd, cache, number=None):
    """The sweep in a process of its own, which sends itself a signal in its second job, or does not."""
    return started(cwd, cache, SWEEP, "" if number is None else ENDED.format(number=int(number)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The directory of runs of a sweep in one piece."""
    folder = tmp_path_factory.mktemp("whole")
    done = swept(folder, cache)
    assert done.returncode == 0, done.stderr
    return folder / "runs"


@pytest.mark.parametrize(
    ("number", "status", "step"),
    [(signal.SIGTERM, 75, 2), pytest.param(signal.SIGKILL, -signal.SIGKILL, 1, marks=pytest.mark.slow)],
)
def test_the_same_command_finishes_a_sweep(whole, tmp_path, cache, number, status, step):
    ended = swept(tmp_path, cache, number)
    runs = tmp_path / "runs"
    assert ended.returncode == status, ended.stderr
    assert newest_whole(runs / "s2")[0].name == f"checkpoint-{step}" and not (runs / "s3").exists()
    files = {path: path.stat().st_mtime_ns for path in (runs / "s1").rglob("*") if path.is_file()}
    again = swept(tmp_path, cache)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is finished; its results:") == 1
    assert files == {path: path.stat().st_mtime_ns for path in (runs / "s1").rglob("*") if path.is_file()}
    for name in ("s1", "s2", "s3"):
        one, other = (folder / name / "final/model.safetensors" for folder in (runs, whole))
        assert one.read_bytes() == other.read_bytes()
        assert logged(runs / name) == logged(whole / name)
        assert json.loads((runs / name / "report.json").read_text())["steps"] == 3


def test_a_job_with_a_mistake_ends_no_sweep(cli):
    quick = ("name='h${trainer.max_hours}'", "eval.before=false", "eval.after=false", "--multirun")
    found = cli("trainer.max_hours=0,1", *quick)
    assert found.status == 2 and "error: trainer.max_hours: 0" in found.err
    assert (found.runs / "h1.0/report.json").exists()
