"""Saving on a disk that fails, and processes that are killed while they save: the checkpoint before stays usable."""

import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rltoken import identity
from rltoken.errors import UserError
from rltoken.resume import MANIFEST, SCRATCH, newest_whole, read_manifest, recover, verify
from tests.cli.conftest import TINY
from tests.trl.conftest import WALL_CLOCK

ROOT = Path(__file__).resolve().parents[2]
SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


@contextlib.contextmanager
def limited(kind, soft):
    """A soft limit of this process inside the context."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextlib.contextmanager
def not_writable(folder):
    """A directory that this process may not write; root may write every one, so it becomes nobody."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def in_a_save(monkeypatch, step, fault):
    """Let one save of the trainer run inside the context `fault(run directory)`."""
    from rltoken.trl_saving import SavingTrainer

    save = SavingTrainer._save_checkpoint

    def faulty(self, model, trial):
        with fault(Path(self.args.output_dir)) if self.state.global_step == step else contextlib.nullcontext():
            save(self, model, trial)

    monkeypatch.setattr(SavingTrainer, "_save_checkpoint", faulty)


FULL = "a file would pass the limit on file sizes; raise it"
FAULTS = {
    "no room for a small file": (lambda run: limited(resource.RLIMIT_FSIZE, 100), FULL),
    "no room for the model": (lambda run: limited(resource.RLIMIT_FSIZE, 100_000), FULL),
    "no room for the optimizer": (lambda run: limited(resource.RLIMIT_FSIZE, 1_000_000), FULL),
    "no file descriptors": (lambda run: limited(resource.RLIMIT_NOFILE, 3), "no file descriptor is free; raise"),
    "a read-only directory": (not_writable, "it may not be written; make the directory writable"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_save_that_fails_leaves_the_checkpoint_before(run, tmp_path, monkeypatch, name):
    fault, told = FAULTS[name]
    in_a_save(monkeypatch, 2, fault)
    with pytest.raises(UserError, match=rf"^runs_dir: .*checkpoint-2 could not be written: .*{told}.*resume=auto"):
        run({}, output_dir=tmp_path / "run", **SAVED)
    assert newest_whole(tmp_path / "run") == (tmp_path / "run/checkpoint-1", [])
    if name != "no file descriptors":
        assert not (tmp_path / "run" / SCRATCH).exists()
    recover(tmp_path / "run")  # without a descriptor nothing can be removed at once
    assert not (tmp_path / "run" / SCRATCH).exists()


def test_a_run_goes_on_exactly_after_a_full_disk(run, tmp_path, monkeypatch):
    whole = run({}, output_dir=tmp_path / "whole", **SAVED)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="could not be written"):
        in_a_save(patch, 2, FAULTS["no room for the optimizer"][0])
        run({}, output_dir=tmp_path / "run", **SAVED)
    resumed = run({}, output_dir=tmp_path / "run", resume=str(newest_whole(tmp_path / "run")[0]), **SAVED)
    assert whole.distance(resumed) == 0.0


def test_a_directory_that_is_gone_is_told_and_not_made_again(run, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def removed(folder):
        shutil.rmtree(folder)
        yield

    in_a_save(monkeypatch, 2, removed)
    with pytest.raises(UserError, match="the run directory is gone; set runs_dir to a place that stays"):
        run({}, output_dir=tmp_path / "run", **SAVED)
    assert not (tmp_path / "run").exists()


def test_an_error_that_is_no_disks_keeps_its_type(run, tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("a stage's own mistake")

    monkeypatch.setattr("rltoken.trainer.TokenGRPOTrainer.checkpoint_state", broken)
    with pytest.raises(RuntimeError, match="a stage's own mistake"):
        run({}, output_dir=tmp_path / "run", **SAVED)
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / SCRATCH).exists()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_checkpoint_is_whole_and_loads_with_transformers(run, tmp_path, lora):
    result = run({}, output_dir=tmp_path / "run", lora=lora, save_total_limit=2, **SAVED)
    folder = tmp_path / "run/checkpoint-3"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"README.md", "checkpoint-2", "checkpoint-3"}
    assert verify(folder) is None
    files = read_manifest(folder)["files"]
    assert files.keys() | {MANIFEST} == {path.name for path in folder.iterdir()}
    told = read_manifest(folder)
    assert told["versions"] == identity.versions() and told["data"] and told["frozen"] and told["weights_only"] is False
    assert {"optimizer.pt", "rng_state.pth", "rltoken_0.pt", "trainer_state.json"} <= files.keys()
    if lora:
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    else:
        found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, result.weights[name]) for name, value in found.items())


def test_the_best_checkpoint_is_kept_and_known(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rltoken.trainer.TokenGRPOTrainer.evaluate",
        lambda self, *args, **kwargs: {"eval_score": -float(self.state.global_step)},
    )
    evaluation = {"eval_dataset": tiny[2].select(range(4)), "eval_strategy": "steps", "eval_steps": 1}
    best = {"metric_for_best_model": "score", "greater_is_better": True, "load_best_model_at_end": True}
    result = run({}, output_dir=tmp_path / "run", save_total_limit=2, **SAVED, **evaluation, **best)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    for step in (1, 3):
        state = json.loads((tmp_path / f"run/checkpoint-{step}/trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "run/checkpoint-1") and state["best_global_step"] == 1
        assert verify(tmp_path / f"run/checkpoint-{step}") is None
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-1").state_dict()
    assert all(torch.equal(value, result.weights[name]) for name, value in found.items()), "the best was loaded"


def test_the_best_is_found_again_where_the_run_was_moved(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rltoken.trainer.TokenGRPOTrainer.evaluate",
        lambda self, *args, **kwargs: {"eval_score": -float(self.state.global_step)},
    )
    settings = {"eval_dataset": tiny[2].select(range(4)), "eval_strategy": "steps", "eval_steps": 1, **SAVED}
    settings |= {"metric_for_best_model": "score", "greater_is_better": True, "load_best_model_at_end": True}
    whole = run({}, output_dir=tmp_path / "run", **settings)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    again = run({}, output_dir=tmp_path / "moved", resume=str(tmp_path / "moved/checkpoint-3"), **settings)
    assert again.trainer.state.best_model_checkpoint == str(tmp_path / "moved/checkpoint-1")
    assert whole.distance(again) == 0.0, "the best was loaded"


def test_another_base_of_an_adapter_is_refused(run, tiny, tmp_path, monkeypatch):
    run({}, output_dir=tmp_path / "run", lora=True, **SAVED)
    load = AutoModelForCausalLM.from_pretrained

    def other(*args, **kwargs):
        model = load(*args, **kwargs)
        model.model.layers[0].mlp.up_proj.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", other)
    resumed = {"output_dir": tmp_path / "run", "resume": str(tmp_path / "run/checkpoint-1"), "lora": True, **SAVED}
    with pytest.raises(UserError, match=r"checkpoint-1 does not fit: the weights that are not trained .* others"):
        run({}, **resumed)
    assert run({}, **resumed, on_change="accept").trainer.state.global_step == 3


def test_the_newest_stays_where_older_ones_have_later_dates(run, tmp_path):
    run({}, output_dir=tmp_path / "run", **SAVED | {"max_steps": 2})
    for path in (tmp_path / "run").glob("checkpoint-*"):
        os.utime(path, (2e9, 2e9))
    resumed = {"resume": str(tmp_path / "run/checkpoint-2"), "save_total_limit": 1}
    run({}, output_dir=tmp_path / "run", **SAVED, **resumed)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-3"}


def test_a_checkpoint_of_plain_trl_is_accepted_by_its_path(run, tmp_path, caplog):
    stock = run(output_dir=tmp_path / "stock", **SAVED)
    resumed = run({}, output_dir=tmp_path / "ours", resume=str(tmp_path / "stock/checkpoint-1"), **SAVED)
    assert stock.distance(resumed) == 0.0
    assert not [record for record in caplog.records if "missing keys" in record.message], "tied weights are not missing"


KILLED = """
import os, signal
from rltoken import resume, train

work = resume.{name}

def last(folder, *args, **kwargs):
    if folder.name == "checkpoint-2":
        os.kill(os.getpid(), signal.SIGKILL)
    work(folder, *args, **kwargs)

resume.{name} = last
train.main()
"""
FAILING = """
import errno, os
from rltoken import train
from rltoken.trainer import TokenGRPOTrainer

work = TokenGRPOTrainer.{name}

def full(self, *args, **kwargs):
    if os.environ["RANK"] == "{rank}" and self.state.global_step == 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    return work(self, *args, **kwargs)

TokenGRPOTrainer.{name} = full
train.main()
"""
QUICK = ("name=x", "eval.before=false", "eval.after=false", "trainer.max_steps=3", "resume=auto")
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def started(cwd, cache, program="from rltoken import train\ntrain.main()", launcher=()):
    """The entry in a process of its own, with a few lines of program around it; its run is cwd/runs/x."""
    cwd.mkdir(exist_ok=True)
    (cwd / "program.py").write_text(program)
    return subprocess.run(
        [sys.executable, *launcher, "program.py", "+exp=grpo", *itertools.chain(*TINY.values()), *QUICK],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RLTOKEN_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(cache, run directory of a run in one piece)."""
    folder = tmp_path_factory.mktemp("whole")
    done = started(folder / "run", folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "cache", folder / "run/runs/x"


def logged(run):
    """The metrics of a run without wall-clock fields."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in (*WALL_CLOCK, "time")} for line in lines]


@pytest.mark.parametrize(
    "name",
    [
        "write_manifest",
        pytest.param("prepare", marks=pytest.mark.slow),
        pytest.param("publish", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_while_saving_goes_on_exactly(whole, tmp_path, name):
    """Before anything is written, before the manifest, and before the rename, which the next start then does."""
    cache, expected = whole
    killed = started(tmp_path, cache, KILLED.format(name=name))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "runs/x"
    assert newest_whole(run)[0] == run / "checkpoint-1" and (run / SCRATCH).exists() is (name != "prepare")
    resumed = started(tmp_path, cache)
    assert resumed.returncode == 0, resumed.stderr
    assert (run / "final/model.safetensors").read_bytes() == (expected / "final/model.safetensors").read_bytes()
    assert logged(run) == logged(expected)
    assert not (run / SCRATCH).exists() and newest_whole(run)[0] == run / "checkpoint-3"
    assert json.loads((run / "report.json").read_text())["steps"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "name"), [(0, "save_model"), (1, "checkpoint_state")])
def test_no_rank_waits_for_one_that_cannot_write(whole, tmp_path, rank, name):
    failed = started(tmp_path, whole[0], FAILING.format(rank=rank, name=name), TWO)
    assert failed.returncode != 0
    assert failed.stderr.count("checkpoint-2 could not be written: the disk is full; free space") == 1, failed.stderr
    assert "could not be written by another process" in failed.stderr
    run = tmp_path / "runs/x"
    assert newest_whole(run) == (run / "checkpoint-1", []) and not (run / SCRATCH).exists()
    assert read_manifest(run / "checkpoint-1")["processes"] == 2
    again = started(tmp_path, whole[0])
    assert again.returncode == 2 and "written by 2 processes and there are 1" in again.stderr
    resumed = started(tmp_path, whole[0], launcher=TWO)
    assert resumed.returncode == 0, resumed.stderr
    assert verify(run / "checkpoint-3") is None and (run / "report.json").exists()
