"""Trainers with a real vLLM engine on the tiny random model, tied or not; skipped where there is no vLLM."""

import contextlib
import importlib
import os

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from rltoken.pipeline import build
from rltoken.rollout.forced import encode_template
from rltoken.trainer import TokenGRPOTrainer
from tests.cli.conftest import cache, cli
from tests.trl.conftest import arguments, run, tiny, token_parity
from tests.vllm.servers import Served

__all__ = ["cache", "cli", "run", "tiny"]


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker("vllm")


@pytest.fixture(scope="session", autouse=True)
def vllm():
    """vLLM, or a skip; scripts/test_vllm.sh wants no skips."""
    if os.environ.get("RLTOKEN_REQUIRE_VLLM") == "1":
        return importlib.import_module("vllm")
    return pytest.importorskip("vllm", reason="vLLM is not installed here: run scripts/test_vllm.sh")


@pytest.fixture(scope="session")
def untied(tiny, tmp_path_factory):
    """The folder of a random model as `tiny`, whose head has weights of its own."""
    folder, tokenizer, _ = tiny
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("untied")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@contextlib.contextmanager
def serving(folder, scratch):
    """A server that was started for the model of a folder; every trainer gives it weights of its own."""
    served = Served(scratch / "log.txt", "model=hf", f"model.path={folder}", "model.dtype=float32")
    try:
        yield served.wait()
    finally:
        served.kill()


@pytest.fixture(scope="session")
def server(tiny, tmp_path_factory):
    """A server for the tiny random model."""
    with serving(tiny[0], tmp_path_factory.mktemp("server")) as served:
        yield served


@pytest.fixture(scope="session")
def untied_server(untied, tmp_path_factory):
    """A server for the model whose head has weights of its own."""
    with serving(untied, tmp_path_factory.mktemp("untied-server")) as served:
        yield served


@pytest.fixture
def make(tiny, tmp_path):
    """make(stages={}, folder=None, lora=False, server=None, **changes) -> a trainer that samples with vLLM.

    It has an engine of its own, shut down in the end, or a server's.
    """
    with contextlib.ExitStack() as engines:

        def trainer(stages=None, *, folder=None, lora=False, server=None, **changes):
            ours = {
                key: changes.pop(key) for key in ("max_logp_difference", "patience", "appended_id") if key in changes
            }
            path, tokenizer, dataset = tiny
            path = folder or path
            made = TokenGRPOTrainer(
                model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
                reward_funcs=token_parity,
                args=arguments(
                    changes.pop("output_dir", tmp_path / "run"),
                    use_vllm=True,
                    vllm_mode="server" if server else "colocate",
                    vllm_server_base_url=server and server.url,
                    vllm_server_timeout=5.0,
                    vllm_importance_sampling_mode="token_truncate",
                    **changes,
                ),
                train_dataset=dataset,
                processing_class=tokenizer,
                peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if lora else None,
                pipeline=build(stages or {}),
                template=encode_template(tokenizer, think_end="</think>"),
                **ours,
            )
            engines.callback(made.close)
            return made

        yield trainer


def logged(trainer, key):
    """The values of a metric, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
