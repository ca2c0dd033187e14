"""A rank that is killed, stopped or held up is named by the one that waits for it, and the run goes on exactly."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers import Trainer
from trl import GRPOTrainer

from rltoken import train, watch
from rltoken.errors import UserError
from rltoken.trainer import TokenGRPOTrainer
from rltoken.watch import Doing, Watch, doing

ROOT = Path(__file__).resolve().parents[2]
C10D = "site-packages/torch/distributed/distributed_c10d.py"


def cells(tmp_path, cache, *arguments):
    """The output of scripts/lost_ranks.py, every cell of which went on exactly."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/lost_ranks.py", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RLTOKEN_CACHE": str(cache), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_a_rank_that_is_stopped_or_killed_is_named_and_the_run_goes_on_exactly(tmp_path, cache):
    told = cells(tmp_path, cache, "--limit", "2")
    assert "no answer within trainer.ddp_timeout=8 s; rank 1 gives no sign of life since" in told
    assert "rank 1 leaves at step 2" in told and "a peer is lost (connection" in told
    assert "2 of 2 cells went on exactly" in told


@pytest.mark.slow
def test_every_fault_in_every_phase(tmp_path, cache):
    assert "24 of 24 cells went on exactly" in cells(tmp_path, cache)


def test_what_a_rank_is_at_is_read_off_its_stack():
    stack = [(C10D, "all_gather"), ("x.py", "gather"), ("x.py", "_calculate_rewards"), ("x.py", "make_window")]
    assert doing(stack, 3) == Doing(3, "grading", "all_gather")
    assert str(doing(stack, 3)) == "step 3, grading, waiting in all_gather"
    assert doing([("mine.py", "judge"), *stack[2:]], 3) == Doing(3, "grading")
    assert doing([("site-packages/torch/autograd/graph.py", "_engine_run_backward"), ("x.py", "backward")], 1) == (
        Doing(1, "backward", "reduction of gradients")
    )
    assert str(doing([(C10D, "barrier"), ("x.py", "assemble")], 0)) == "loading, waiting in barrier"
    assert str(doing([("x.py", "write"), ("x.py", "_save_checkpoint")], 3)) == "step 2, saving"
    rebuilding = [("site-packages/torch/nn/parallel/distributed.py", "_pre_forward"), ("x.py", "compute_loss")]
    assert doing(rebuilding, 2) == Doing(2, "forward", "_pre_forward"), "the buckets of DDP, in the second step"


def test_the_functions_that_tell_the_phase_are_there():
    import accelerate

    from rltoken import ranks, train

    places = (TokenGRPOTrainer, GRPOTrainer, Trainer, accelerate.Accelerator, train, ranks)
    assert [name for name in watch.PHASES if not any(hasattr(place, name) for place in places)] == []


@pytest.fixture
def left(monkeypatch):
    """What watches said as they ended the process, which they do not here."""
    said = []
    monkeypatch.setattr(Watch, "leave", lambda self, at, why: said.append(self.told(at, why)))
    return said


def all_gather(seconds):
    """Waits in C code, as a collective operation does, in a function of its name and file."""
    held = threading.Lock()
    held.acquire()
    threading.Timer(seconds, held.release).start()
    scope = {"held": held}
    exec(compile("def all_gather():\n    held.acquire()", C10D, "exec"), scope)
    scope["all_gather"]()


def test_who_stands_in_an_operation_is_ended_and_says_where_its_peers_are(tmp_path, left):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank0.json").write_text(
        json.dumps({"beat": 7, "step": 4, "phase": "sampling", "operation": None})
    )
    with Watch(tmp_path, rank=1, ranks=3, seconds=0.4) as watching:
        watching.step = lambda: 4
        all_gather(1.2)
    assert left[0].startswith(
        "rank 1 leaves at step 4, between its phases, waiting in all_gather: no answer within tra"
    )
    assert (
        "; rank 0 gives no sign of life since 0 s, when it was at step 4, sampling; rank 2 has not begun; the"
        in left[0]
    )
    assert json.loads((tmp_path / "logs/rank1.json").read_text())["operation"] == "all_gather"


def test_the_setting_is_how_long_an_operation_may_take(cli, monkeypatch):
    def watched(run, seconds):
        raise UserError(f"watched for {seconds} s")

    monkeypatch.setattr(train, "watched", watched)
    assert "error: watched for 7 s\n" in cli("+exp=grpo", "trainer.ddp_timeout=7").err


def test_who_works_or_waits_time_and_again_goes_on(tmp_path, left):
    (tmp_path / "logs").mkdir()
    with Watch(tmp_path, rank=0, ranks=2, seconds=0.5):
        time.sleep(1.0)  # long, but not for another rank
        for _ in range(8):
            all_gather(0.1)
            time.sleep(0.05)
    assert left == []


@pytest.mark.parametrize(
    ("file", "text", "ends"),
    [
        (C10D, "[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1", True),
        (C10D, "Timed out waiting 1800000ms for recv operation to complete", True),
        (C10D, "Tensor list must be non-empty", False),
        ("mine.py", "Connection closed by peer", False),
    ],
)
def test_an_operation_that_fails_ends_the_rank_only_where_a_peer_is_gone(tmp_path, left, file, text, ends):
    (tmp_path / "logs").mkdir()
    scope = {}
    exec(compile("def all_reduce(text):\n    raise RuntimeError(text)", file, "exec"), scope)
    raised = contextlib.nullcontext() if ends else pytest.raises(RuntimeError, match=r"\w")
    with Watch(tmp_path, rank=0, ranks=2, seconds=0.2) as watching, raised, watching.peers():
        scope["all_reduce"](text)
    assert len(left) == ends and all("waiting in all_reduce: a peer is lost (" in line for line in left)
