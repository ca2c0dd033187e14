"""vLLM samples from the weights that are trained, after every step; where it does not, the run stops."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from trl.generation.vllm_generation import VLLMGeneration

from rltoken.errors import UserError
from rltoken.methods import brpo
from rltoken.rollout import vllm_cpu
from rltoken.trl_vllm_client import Client
from tests.vllm.conftest import logged

LARGEST = "sampling/sampling_logp_difference/max"
STOPPED = r"rollout\.max_logp_difference: after step \d+ .*other weights or another dtype"


@pytest.mark.parametrize("exp", ["grpo", "brpo"])
@pytest.mark.parametrize("weights", [[], ["+lora=default"]], ids=["full", "lora"])
def test_five_steps_from_the_command_line(cli, exp, weights):
    found = cli(f"+exp={exp}", "rollout=vllm_colocate", "trainer.max_steps=5", "name=run", *weights)
    assert found.status == 0, found.err
    lines = [json.loads(line) for line in (found.runs / "run" / "metrics.jsonl").read_text().splitlines()]
    differences = [line[LARGEST] for line in lines if LARGEST in line]
    assert len(differences) == 5 and max(differences) < 1e-3
    assert all(line["sampling/kept/longer_half"] == 1 for line in lines if "sampling/kept/longer_half" in line)


ANSWERS = functools.partial(brpo.budget_answers, budgets=[8, 16], longest=16, n_summaries=2, max_new_tokens=4)


@pytest.mark.parametrize("where", ["colocate", "server"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["grpo", "brpo"])
def test_five_large_steps(make, untied, request, where, tied, lora, method):
    server = request.getfixturevalue("server" if tied else "untied_server") if where == "server" else None
    trainer = make(
        {"rows": {"brpo": ANSWERS}} if method == "brpo" else {},
        folder=None if tied else untied, lora=lora, server=server, max_steps=5, max_completion_length=16,
        loss_type="dr_grpo",
    )  # fmt: skip
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert max((value - before[name]).abs().max() for name, value in trainer.model.named_parameters()) > 1e-2
    differences = logged(trainer, LARGEST)
    assert len(differences) == 5 and max(differences) < 1e-3


def test_a_stale_head_stops_the_run(make, untied, monkeypatch):
    stock = VLLMGeneration._iter_named_params

    def without_head(self):
        yield from (item for item in stock(self) if item[0] != "lm_head.weight")

    monkeypatch.setattr(VLLMGeneration, "_iter_named_params", without_head)
    with pytest.raises(
        UserError, match=r"after the hand-over of step 0 vLLM serves other weights .*head and last norm"
    ):
        make(folder=untied).train()


def test_a_layer_that_a_server_keeps_stops_the_run(make, server, monkeypatch):
    stock = Client.update_named_params

    def damaged(self, metadata, params):
        stock(
            self,
            metadata,
            ((name, value.bfloat16().float() if "layers.0" in name else value) for name, value in params),
        )

    monkeypatch.setattr(Client, "update_named_params", damaged)
    with pytest.raises(UserError, match=r"after the hand-over of step 0 vLLM serves other weights .*\(layer 0\)"):
        make(server=server).train()


def test_another_dtype_stops_the_run(make, monkeypatch):
    stock = vllm_cpu.engine
    monkeypatch.setattr(vllm_cpu, "engine", lambda dtype, **settings: stock(torch.bfloat16, **settings))
    with pytest.raises(UserError, match=STOPPED.replace(r"\d+", "0")):
        make().train()


def test_an_adapter_merged_twice_stops_the_run(make, monkeypatch):
    stock = VLLMGeneration._iter_named_params

    def merged_twice(self):
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer.scale_layer(2)
        yield from stock(self)
        for layer in layers:
            layer.unscale_layer(2)

    monkeypatch.setattr(VLLMGeneration, "_iter_named_params", merged_twice)
    with pytest.raises(UserError, match=STOPPED.replace(r"\d+", "1")):
        make(lora=True).train()


def test_what_was_let_pass_is_let_pass(make, monkeypatch):
    stock = vllm_cpu.engine
    monkeypatch.setattr(vllm_cpu, "engine", lambda dtype, **settings: stock(torch.bfloat16, **settings))
    trainer = make(max_logp_difference=None, max_steps=1)
    trainer.train()
    assert logged(trainer, "sampling/sampling_logp_difference/mean")[0] > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_processes_agree_and_leave_quietly(cache, tmp_path, ranks):
    launcher = [sys.executable] if ranks == 1 else [Path(sys.executable).parent / "torchrun", "--nproc_per_node=2"]
    command = [
        "-m", "rltoken.train", "+exp=brpo", "rollout=vllm_colocate", "model.source.steps=2", "name=run",
        f"model.source.cache_dir={cache}", "data.train.n=32", "data.eval.n=4", "trainer.max_steps=3", "eval.samples=1",
        "trainer.per_device_train_batch_size=8", "trainer.num_generations=4",
    ]  # fmt: skip
    left = subprocess.run([*launcher, *command], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert left.returncode == 0 and "Traceback" not in left.stderr, left.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    differences = [line[LARGEST] for line in lines if LARGEST in line]
    assert len(differences) == 3 and max(differences) < 1e-3
