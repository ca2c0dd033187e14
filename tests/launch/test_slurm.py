"""hardware=slurm: what it composes, and the same launcher on this machine, told of its end and queued again."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from safetensors.torch import load_file

from rltoken.config import explain, register_schemas
from rltoken.preemption import signals, submitit_signal
from tests.launch.test_configs import environment
from tests.resume.phases import ROOT, TINY, logged

needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="needs pip install 'rltoken[slurm]'")
SETTINGS = (
    *("+exp=brpo", "name=x", "trainer.max_steps=3", "trainer.save_steps=100", "eval.before=false", "eval.after=false"),
    "trainer.learning_rate=0.01",
)
LOCALLY = (
    *("hydra/launcher=submitit_local", "hydra.mode=MULTIRUN", "hydra.launcher.submitit_folder=jobs/%j"),
    *("hydra.launcher.timeout_min=100", "hydra.launcher.tasks_per_node=2"),
    "reward.funcs.accuracy._target_=tests.launch.rewards.parity_until_told",
)


def composed(hardware):
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        return compose("config", overrides=["+exp=grpo", f"hardware={hardware}"], return_hydra_config=True)


@needs_submitit
def test_a_job_is_queued_again_and_goes_on():
    cfg = composed("slurm")
    assert cfg.hydra.mode.name == "MULTIRUN" and cfg.trainer.bf16
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher") and launcher.max_num_timeout > 100
    assert launcher.signal_delay_s < 60 * launcher.timeout_min


@needs_submitit
def test_slurm_fsdp2_exports_what_fsdp2_yaml_means():
    launcher = composed("slurm_fsdp2").hydra.launcher
    exported = dict(item.split("=") for line in launcher.setup for item in line.removeprefix("export ").split())
    launched = environment("fsdp2")
    assert exported.items() <= launched.items()
    asked = {name for name in launched if name.startswith(("FSDP_VERSION", "FSDP_AUTO", "FSDP_RESHARD", "FSDP_STATE"))}
    assert asked <= exported.keys() and launcher.tasks_per_node == launcher.gpus_per_node


def test_a_missing_launcher_is_told_in_one_line():
    told = explain(ValueError("Could not load 'hydra/launcher/submitit_slurm'."), (), {})
    assert str(told) == (
        "hardware=slurm: Hydra's launcher for SLURM is not installed; run: pip install 'rltoken[slurm]'."
    )


def test_submitits_signal_is_watched_in_its_jobs_only(monkeypatch):
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    assert submitit_signal() is None and {number.name for number in signals()} == {"SIGTERM", "SIGUSR1"}
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert {number.name for number in signals()} == {"SIGTERM", "SIGUSR1", "SIGUSR2"}
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    assert {number.name for number in signals()} == {"SIGTERM", "SIGUSR1"}


def trained(folder, cache, launcher, *settings):
    folder.mkdir()
    done = subprocess.run(
        [*launcher, "-m", "rltoken.train", *(item for part in TINY.values() for item in part), *SETTINGS, *settings],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RLTOKEN_CACHE": str(cache), "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done, folder / "runs" / "x"


@needs_submitit
@pytest.mark.slow
def test_two_tasks_are_one_run_that_ends_as_an_undisturbed_one(tmp_path, cache):
    done, run = trained(tmp_path / "told", cache, [sys.executable], *LOCALLY)
    jobs = "".join(path.read_text() for path in Path(tmp_path / "told/jobs").glob("*/*.[eo]*"))
    assert done.returncode == 0, done.stderr + jobs
    assert "stopped by SIGUSR2 at step 2 of 3, saved in runs/x/checkpoint-2" in jobs and "Requeued job" in jobs
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    whole, other = trained(tmp_path / "whole", cache, two, "reward.funcs.accuracy._target_=tests.resume.phases.parity")
    assert whole.returncode == 0, whole.stderr
    assert logged(run) == logged(other) and json.loads((run / "report.json").read_text())["steps"] == 3
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (run, other))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
