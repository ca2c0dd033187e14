"""`accelerate launch` with the shipped configurations, two processes under gloo: train, evaluate, save, go on, load."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.launch.test_configs import CONFIGS
from tests.resume.phases import ROOT, TINY, logged

SHARDED = [str(ROOT / "tests/launch/train_on_cpu.py"), "hardware=auto", "trainer.dataloader_pin_memory=false"]
PROGRAM = {"one_gpu": ["-m", "rltoken.train"], "ddp": ["-m", "rltoken.train"]}
"""What is launched, but SHARDED."""
SETTINGS = (
    *(item for part in TINY.values() for item in part),
    *("name=x", "trainer.learning_rate=0.01", "resume=auto", "eval.budgets=[4,8]"),
    "reward.funcs.accuracy._target_=tests.resume.phases.parity",
)
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs pip install 'rltoken[deepspeed]'")


def launch(config, folder, cache, *overrides, exp="brpo", processes=2, launcher=()):
    """One launch, that goes on in the background."""
    options = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(processes), *launcher]
    if not launcher:
        options += ["--main_process_port", "0"]
    environment = {"RLTOKEN_CACHE": str(cache), "TORCHDYNAMO_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
    program = [*PROGRAM.get(config, SHARDED), *SETTINGS, f"+exp={exp}", *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *options, *program],
        cwd=folder,
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(*launches):
    for launched in launches:
        told, _ = launched.communicate(timeout=900)
        assert launched.returncode == 0, told[-4000:]


def weights(run):
    return load_file(run / "final" / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "exp", "overrides"),
    [
        pytest.param("ddp", "brpo", [], marks=pytest.mark.slow),
        ("fsdp2", "brpo", []),
        pytest.param("fsdp2", "brpo", ["+lora=default"], marks=pytest.mark.slow),
        pytest.param("fsdp2", "mrt", ["rollout.batch_rows=3"], marks=pytest.mark.slow),
        pytest.param("zero2", "brpo", [], marks=[pytest.mark.slow, needs_deepspeed]),
        pytest.param("zero3", "brpo", [], marks=[pytest.mark.slow, needs_deepspeed]),
    ],
)
def test_two_processes_train_evaluate_go_on_and_leave_a_plain_model(tmp_path, cache, config, exp, overrides):
    run = tmp_path / "runs" / "x"
    finished(launch(config, tmp_path, cache, *overrides, exp=exp))
    report, metrics = json.loads((run / "report.json").read_text()), logged(run)
    assert report["steps"] == 2 and report["before"].keys() == report["after"].keys()
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2]
    name = "adapter_model.safetensors" if "+lora=default" in overrides else "model.safetensors"
    first = load_file(run / "final" / name)
    for lost in ("checkpoint-2", "final"):
        shutil.rmtree(run / lost)
    (run / "report.json").unlink()
    finished(launch(config, tmp_path, cache, *overrides, exp=exp))
    again = load_file(run / "final" / name)
    assert first.keys() == again.keys() and all(bool((first[key] == again[key]).all()) for key in first)
    assert logged(run) == metrics
    start = load_file(run / "checkpoint-1" / name)
    assert any(bool((first[key] != start[key]).any()) for key in first), "the second step trained something"
    model = AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32)
    assert model(torch.tensor([[4, 5, 6]])).logits.isfinite().all()


@pytest.mark.slow
def test_two_machines_are_one_run(tmp_path, cache):
    """Two launchers of one process each, as on two hosts, train what one launcher of two processes does."""
    together, apart = tmp_path / "together", tmp_path / "apart"
    for folder in (together, apart):
        folder.mkdir()
    finished(launch("fsdp2", together, cache, "eval.before=false", "eval.after=false"))
    where = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "29731"]
    finished(
        *(
            launch("nodes", apart, cache, "eval.before=false", "eval.after=false",
                   launcher=[*where, "--machine_rank", str(rank)])
            for rank in range(2)
        )
    )  # fmt: skip
    one, two = (weights(Path(folder) / "runs" / "x") for folder in (together, apart))
    assert all(bool((one[key] == two[key]).all()) for key in one)


def test_sharding_on_cpus_is_refused_before_anything_is_loaded(tmp_path, cache):
    """Without the stand-in of these tests accelerate would train by DDP in silence."""
    options = ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "rltoken.train", *SETTINGS, "+exp=brpo"],
        cwd=tmp_path,
        env=os.environ | {"RLTOKEN_CACHE": str(cache), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0 and "error: trainer.use_cpu: accelerate splits no model over CPUs" in done.stderr
    assert not (tmp_path / "runs").exists()
