"""Memory that is used up, broken weights, a tracker that is down, a clock that jumps: each as docs/faults.md says."""

import json
import math
import time

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from rltoken import faults
from rltoken.callbacks import tolerate
from rltoken.errors import UserError
from tests.resume.phases import at_call, logged
from tests.resume.test_preemption import RUN

LEAN = (*RUN, "eval.after=false", "trainer.save_steps=1")


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (
            "transformers.GenerationMixin.generate",
            "trainer.per_device_train_batch_size: out of memory at step 2, sampling; lower it",
        ),
        (
            "torch.Tensor.backward",
            "rollout.pack_tokens: out of memory at step 2, backward; set it to fewer tokens than now",
        ),
    ],
)
def test_memory_that_is_used_up_ends_in_one_line_that_says_what_to_lower(cli, monkeypatch, function, told):
    with monkeypatch.context() as patch:
        at_call(patch, function, 2, no_memory)
        found = cli(*LEAN)
    assert found.status == 2 and "Traceback" not in found.err
    line = found.err.splitlines()[-1]
    assert line.startswith(f"error: {told}") and line.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB.)")
    assert "OutOfMemoryError" in (found.runs / "x/traceback.txt").read_text()
    again = cli(*LEAN, "resume=auto")
    assert again.status == 0 and [line["step"] for line in logged(found.runs / "x")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("shapes differ"), False),
        (UserError("model.path: there is none"), False),
    ],
)
def test_what_counts_as_memory_that_is_used_up(error, told):
    with pytest.raises(UserError if told else type(error)) as raised, faults.memory_told(lambda: 0):
        raise error
    assert ("out of memory" in str(raised.value)) is told


def test_sampling_that_fails_on_broken_weights_says_so(cli, monkeypatch):
    from rltoken.trl_compat import SeamTrainer

    work = SeamTrainer._generate_single_turn

    def poisoned(self, *args, **kwargs):
        if self.state.global_step == 1:
            with torch.no_grad():
                self.model.model.norm.weight.fill_(math.nan)
        return work(self, *args, **kwargs)

    monkeypatch.setattr(SeamTrainer, "_generate_single_turn", poisoned)
    found = cli(*LEAN)
    assert found.status == 2, found.err
    assert "error: trainer.learning_rate: at step 2 weights are not finite (model.norm.weight); lower it" in found.err


@pytest.mark.parametrize("slot", ["credits", "weights"])
def test_a_stage_that_gives_what_is_not_finite_is_named(run, slot):
    def divides(rewards):
        return rewards / 0.0 * 0.0

    with pytest.raises(UserError, match=rf"^method\.{slot}\.divides: a value on a trained token is not finite"):
        run({slot: {"divides": divides}}, max_steps=1)


class Down(TrainerCallback):
    """A tracker that comes up and then loses its server."""

    def __init__(self):
        self.calls = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.calls.append("begin")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.calls.append("log")
        raise ConnectionError("tracker.example: no route to host")


def test_a_tracker_that_is_down_is_told_once_and_left_out(cli, monkeypatch, caplog):
    made = []
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", type("Mine", (Down,), {}))
    monkeypatch.setattr(Down, "__new__", lambda cls: made.append(object.__new__(cls)) or made[-1])
    whole = cli(*LEAN, "runs_dir=whole")
    assert whole.status == 0
    found = cli(*LEAN, "trainer.report_to=tensorboard")
    assert found.status == 0, found.err
    assert made[-1].calls == ["begin", "log"]
    assert (
        caplog.text.count("tracker Mine failed (ConnectionError: tracker.example: no route to host): the run goes on")
        == 1
    )
    assert logged(found.runs / "x") == logged(found.cwd / "whole/x")


def test_a_tracker_that_works_gets_everything():
    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            found.append((args, logs))

    found, tracker = [], Tracker()
    tolerate(tracker)
    tracker.on_log(1, None, None, logs={"loss": 2.0})
    tracker.on_save(1, None, None)
    assert found == [(1, {"loss": 2.0})]


def test_a_clock_that_jumps_changes_nothing(cli, monkeypatch):
    whole = cli(*LEAN, "runs_dir=whole", "trainer.max_hours=1")
    assert whole.status == 0
    jumps, now = iter([*[-86400, 86400 * 365] * 500]), time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps, 0))
    found = cli(*LEAN, "trainer.max_hours=1")
    assert found.status == 0, found.err
    one, other = (folder / "x" for folder in (found.runs, found.cwd / "whole"))
    assert (one / "final/model.safetensors").read_bytes() == (other / "final/model.safetensors").read_bytes()
    assert logged(one) == logged(other) and json.loads((one / "report.json").read_text())["steps"] == 3
