"""Signals to whole groups of processes: graders, the data loader's workers, several ranks and their launcher."""

import pytest

from rltoken.preemption import EXIT_CODE
from rltoken.resume import newest_whole, read_manifest
from tests.resume.phases import logged, started

QUICK = (
    "name=x", "eval.before=false", "eval.after=false", "trainer.max_steps=3", "trainer.save_steps=100",
    "trainer.learning_rate=0.01", "resume=auto",
)  # fmt: skip
PARITY = "reward.funcs.accuracy._target_=tests.resume.phases.parity"
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
GRADED = """
import os, threading, time
from rltoken.rewards.grader import shared


def slow(item):
    time.sleep(0.3)
    return item % 2


def score(completion_ids, trainer_state, **_):
    if trainer_state.global_step == 1:
        threading.Timer(0.5, os.system, ["kill -TERM $PPID; kill -TERM 0"]).start()
    results = shared(workers=2).map(slow, [ids[0] for ids in completion_ids])
    assert not any(result.failure for result in results), results
    return [float(result.value) for result in results]
"""
FROM_RANK = """
import os, time
from pytest import MonkeyPatch
from tests.resume.phases import PHASES, at_call, send
if os.environ["RANK"] == "1":
    at_call(MonkeyPatch(), PHASES["grading"], 2, lambda: [send(), time.sleep(0.5)])
"""
FROM_AGENT = FROM_RANK.replace("send()", "os.kill(os.getppid(), 15)").replace("0.5", "3")


def test_a_signal_to_the_group_is_for_the_trainer_alone(tmp_path, cache):
    """As `timeout` sends it: to the group in which graders and the data loader's workers are, and to the trainer."""
    (tmp_path / "graded.py").write_text(GRADED)
    reward = "reward.funcs.accuracy._target_=graded.score"
    left = started(tmp_path, cache, (*QUICK, reward, "trainer.dataloader_num_workers=1"))
    assert left.returncode == EXIT_CODE, left.stderr
    assert "Traceback" not in left.stderr
    assert newest_whole(tmp_path / "runs/x") == (tmp_path / "runs/x/checkpoint-2", [])


@pytest.mark.slow
@pytest.mark.parametrize("program", [FROM_RANK, FROM_AGENT], ids=["one rank", "the agent"])
def test_two_ranks_stop_after_the_same_step_and_go_on_exactly(tmp_path, cache, program):
    left = started(tmp_path, cache, (*QUICK, PARITY), program, TWO)
    run = tmp_path / "runs/x"
    assert left.returncode == 1, left.stderr
    assert left.stderr.count(" at step 2 of 3, saved in runs/x/checkpoint-2; the same command") == 1, left.stderr
    assert newest_whole(run) == (run / "checkpoint-2", []) and read_manifest(run / "checkpoint-2")["processes"] == 2
    resumed = started(tmp_path, cache, (*QUICK, PARITY), launcher=TWO)
    assert resumed.returncode == 0, resumed.stderr
    whole = started(tmp_path / "whole", cache, (*QUICK, PARITY), launcher=TWO)
    assert whole.returncode == 0, whole.stderr
    expected = tmp_path / "whole/runs/x"
    assert (run / "final/model.safetensors").read_bytes() == (expected / "final/model.safetensors").read_bytes()
    assert logged(run) == logged(expected)
