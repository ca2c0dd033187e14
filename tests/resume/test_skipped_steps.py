"""A step whose loss or gradient is not finite changes nothing but the step number, is counted, and can be looked at."""

import json
import math
import os
import resource
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from trl import SFTTrainer

from rltoken import trl_steps
from rltoken.errors import SharedError
from rltoken.trainer import TokenGRPOTrainer
from rltoken.trl_steps import KEPT, FiniteSteps, not_finite, write_batches
from tests.resume.phases import started
from tests.resume.test_faults import limited
from tests.resume.test_preempted_processes import PARITY, QUICK, TWO

SAVED = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}


def root_of_nothing(loss):
    """The same loss, with a gradient that is infinite times zero."""
    return loss + (loss * 0).sqrt()


def broken(monkeypatch, *steps, by=lambda loss: loss * math.nan):
    """Let the loss of these optimizer steps, from 1 on, be what `by` makes of it."""
    work = TokenGRPOTrainer.step_loss

    def step_loss(self, model, inputs):
        loss = work(self, model, inputs)
        return by(loss) if self.state.global_step + 1 in steps else loss

    monkeypatch.setattr(TokenGRPOTrainer, "step_loss", step_loss)


@pytest.mark.parametrize("by", [lambda loss: loss * math.nan, lambda loss: loss + math.inf, root_of_nothing])
@pytest.mark.parametrize("clipping", [1.0, 0.0])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(run, monkeypatch, by, clipping):
    settings = {"lr_scheduler_type": "constant", "max_grad_norm": clipping}
    before = run({}, max_steps=2, **settings)
    broken(monkeypatch, 3, by=by)
    after = run({}, max_steps=3, **settings)
    assert before.distance(after) == 0.0
    moments = [result.trainer.optimizer.state_dict()["state"] for result in (before, after)]
    assert all(
        torch.equal(moments[0][i][name], value) for i, each in moments[1].items() for name, value in each.items()
    )
    counts = [line.get("skipped_steps") for line in after.metrics if "loss" in line]
    assert counts == [None, None, 1]


def test_training_goes_on_after_a_skipped_step(run, monkeypatch):
    broken(monkeypatch, 2)
    found = run({}, max_steps=4, lr_scheduler_type="linear")
    lines = [line for line in found.metrics if "loss" in line]
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 1, 1]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert math.isfinite(lines[2]["grad_norm"]) and not not_finite(found.trainer.model)


def test_so_many_in_a_row_end_the_run(run, tmp_path, monkeypatch):
    broken(monkeypatch, 1, 3, 4, 5)
    with pytest.raises(
        SharedError, match=r"^trainer\.max_skipped_steps: 3 optimizer steps in a row, up to step 5, were"
    ):
        run({}, max_steps=9, output_dir=tmp_path / "run", max_skipped_steps=3)
    written = sorted(path.name for path in (tmp_path / "run/skipped").iterdir())
    assert written == [f"step-{step}-rank-0.safetensors" for step in (1, 3, 4, 5)]


def test_the_count_is_resumed(run, tmp_path, monkeypatch):
    broken(monkeypatch, 2, 3, 4, 5, 6, 7)
    with pytest.raises(SharedError, match="5 optimizer steps in a row, up to step 6"):
        run({}, max_steps=9, output_dir=tmp_path / "run", **SAVED)
    settings = {"output_dir": tmp_path / "run", "resume": str(tmp_path / "run/checkpoint-4"), **SAVED}
    with pytest.raises(SharedError, match="5 optimizer steps in a row, up to step 6"):
        run({}, max_steps=9, **settings)


def test_the_batch_can_be_read_without_unpickling(run, tiny, tmp_path, monkeypatch):
    broken(monkeypatch, 2)
    run({}, max_steps=2, output_dir=tmp_path / "run", gradient_accumulation_steps=2)
    with safe_open(tmp_path / "run/skipped/step-2-rank-0.safetensors", "pt") as file:
        facts = {name: json.loads(value) for name, value in file.metadata().items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    assert facts["step"] == 2 and facts["rank"] == 0 and facts["weights_not_finite"] == [] == facts["not_finite"]
    assert [math.isnan(loss) for loss in facts["losses"]] == [True, True] and math.isnan(facts["gradient_norm"])
    assert {
        "0.prompt_ids",
        "0.completion_ids",
        "0.completion_mask",
        "0.advantages",
        "1.completion_ids",
    } <= tensors.keys()
    assert tensors["0.completion_ids"].dtype == torch.int32
    assert tiny[1].decode(tensors["0.completion_ids"][0])


def test_only_the_micro_batches_that_are_broken_are_written_and_few_files_stay(tmp_path):
    seen = [({"x": torch.tensor([1.0, math.nan])}, torch.tensor(math.inf)), ({"x": torch.ones(2)}, torch.tensor(1.0))]
    for step in range(1, KEPT + 3):
        write_batches(tmp_path / f"skipped/step-{step}-rank-1.safetensors", seen, {"step": step})
    write_batches(tmp_path / "skipped/step-1-rank-0.safetensors", seen[1:], {"step": 1})
    names = {path.name for path in (tmp_path / "skipped").iterdir()}
    assert len(names) == KEPT + 1 and "step-1-rank-0.safetensors" in names and "step-2-rank-1.safetensors" not in names
    with safe_open(tmp_path / f"skipped/step-{KEPT}-rank-1.safetensors", "pt") as file:
        assert list(file.keys()) == ["0.x"] and json.loads(file.metadata()["not_finite"]) == ["0.x"]
    with safe_open(tmp_path / "skipped/step-1-rank-0.safetensors", "pt") as file:
        assert list(file.keys()) == ["0.x"] and json.loads(file.metadata()["losses"]) == [1.0]


def test_the_batch_of_this_step_stays_where_the_clock_went_back(tmp_path):
    seen = [({"x": torch.ones(2)}, torch.tensor(math.nan))]
    for step in range(1, KEPT + 2):
        write_batches(tmp_path / f"skipped/step-{step}-rank-0.safetensors", seen, {"step": step})
        os.utime(tmp_path / f"skipped/step-{step}-rank-0.safetensors", (4e9 + step, 4e9 + step))
    write_batches(tmp_path / "skipped/step-99-rank-0.safetensors", seen, {"step": 99})
    names = {path.name for path in (tmp_path / "skipped").iterdir()}
    assert len(names) == KEPT and "step-99-rank-0.safetensors" in names and "step-2-rank-0.safetensors" not in names


def test_a_batch_that_cannot_be_written_ends_nothing(run, tmp_path, monkeypatch, caplog):
    work = trl_steps.write_batches

    def full(*arguments):
        with limited(resource.RLIMIT_FSIZE, 100):
            work(*arguments)

    monkeypatch.setattr(trl_steps, "write_batches", full)
    broken(monkeypatch, 2)
    found = run({}, max_steps=3, output_dir=tmp_path / "run")
    assert [line.get("skipped_steps") for line in found.metrics if "loss" in line] == [None, 1, 1]
    assert "The batch of a skipped step could not be written" in caplog.text


def test_what_the_scaler_of_fp16_skips_does_not_end_a_run(tmp_path):
    """An overflow of the gradient is how it finds its scale; a loss that is not finite is not its doing."""
    model = torch.nn.Linear(2, 1)

    class Stub(FiniteSteps):
        max_skipped_steps = 2

        def __init__(self):
            super().__init__()
            self.accelerator = SimpleNamespace(gather=lambda x: x, scaler=object(), device="cpu", process_index=0)
            self.args = SimpleNamespace(output_dir=tmp_path)
            self.state, self._metrics = SimpleNamespace(global_step=0), {"train": {}}

    trainer = Stub()
    for _ in range(3):
        trainer._seen = [({}, torch.tensor(1.0))]
        trainer._mind(model, math.inf, unknown=False)
    assert trainer._metrics["train"]["skipped_steps"] == [3]
    trainer._seen = [({}, torch.tensor(math.nan))]
    trainer._mind(model, math.inf, unknown=False)
    trainer._seen = [({}, torch.tensor(math.nan))]
    with pytest.raises(SharedError, match="2 optimizer steps in a row"):
        trainer._mind(model, math.inf, unknown=False)


def test_weights_that_are_not_finite_end_the_run_at_once(run, monkeypatch):
    def poison(self, model, inputs):
        with torch.no_grad():
            model.model.norm.weight[0] = math.inf
        return work(self, model, inputs)

    work = TokenGRPOTrainer.step_loss
    monkeypatch.setattr(TokenGRPOTrainer, "step_loss", poison)
    with pytest.raises(SharedError, match=r"at step 1 weights are not finite \(model\.norm\.weight\); lower it"):
        run({}, max_steps=2)


def test_the_command_ends_with_one_line_and_the_run_can_go_on(cli, monkeypatch):
    quick = ("name=x", "eval.before=false", "eval.after=false", "trainer.max_steps=4", "trainer.save_steps=1")
    with monkeypatch.context() as patch:
        broken(patch, 2, 3, 4)
        found = cli(*quick, "trainer.max_skipped_steps=2")
    assert found.status == 2 and found.err.splitlines()[-1].startswith("error: trainer.max_skipped_steps: 2 optimizer")
    lines = [json.loads(line) for line in (found.runs / "x/metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped_steps") for line in lines] == [None, 1], "null where it is not finite, and valid JSON"
    assert (
        lines[1]["grad_norm"] is None and "2 optimizer steps in a row" in (found.runs / "x/logs/rank0.log").read_text()
    )
    again = cli(*quick, "trainer.max_skipped_steps=3", "resume=auto")
    assert again.status == 0, again.err


@pytest.mark.parametrize("value", ["0", "-1", "null"])
def test_a_bound_that_makes_no_sense_is_refused(cli, value):
    found = cli(f"trainer.max_skipped_steps={value}")
    assert found.status == 2 and found.err.startswith("error: trainer.max_skipped_steps: ")


def test_a_supervised_stage_skips_too(cli, monkeypatch):
    work = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *args, **kwargs: work(*args, **kwargs) * math.nan)
    found = cli("sft=tiny", "data.traces.n=64", "sft.trainer.max_steps=3", "trainer.max_skipped_steps=2")
    assert found.status == 2 and "in a row, up to step 2, were skipped" in found.err, found.err


ONE_RANK = """
import os
from pytest import MonkeyPatch
from tests.resume.test_skipped_steps import broken
if os.environ["RANK"] == "1":
    broken(MonkeyPatch(), {steps}, by=lambda loss: loss.detach() * 0 + float("inf") + loss)
"""


@pytest.mark.slow
def test_all_ranks_skip_what_one_of_them_has_to(tmp_path, cache):
    found = started(tmp_path, cache, (*QUICK, PARITY), ONE_RANK.format(steps="2"), TWO)
    assert found.returncode == 0, found.stderr
    run = tmp_path / "runs/x"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 1]
    assert {path.name for path in (run / "skipped").iterdir()} == {f"step-2-rank-{rank}.safetensors" for rank in (0, 1)}
    settings = (*QUICK, PARITY, "trainer.max_skipped_steps=2")
    ended = started(tmp_path / "more", cache, settings, ONE_RANK.format(steps="2, 3"), TWO)
    assert ended.returncode == 1 and ended.stderr.count("error: trainer.max_skipped_steps: 2 optimizer steps") == 1


def test_a_log_probability_that_is_not_finite_costs_the_steps_that_use_it_and_is_named(run, tmp_path, monkeypatch):
    work = TokenGRPOTrainer.make_window

    def make_window(self, inputs):
        window = work(self, inputs)
        if self.state.global_step == 0:
            window["old_per_token_logps"][0, 0] = math.nan
        return window

    monkeypatch.setattr(TokenGRPOTrainer, "make_window", make_window)
    found = run({}, max_steps=4, num_iterations=2, output_dir=tmp_path / "run")
    assert [line.get("skipped_steps") for line in found.metrics if "loss" in line] == [1, 2, 2, 2]
    with safe_open(tmp_path / "run/skipped/step-1-rank-0.safetensors", "pt") as file:
        assert json.loads(file.metadata()["not_finite"]) == ["0.old_per_token_logps"]
