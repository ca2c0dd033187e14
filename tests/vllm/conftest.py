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
from tests.trl.conftest import arguments, tiny, token_parity

__all__ = ["cache", "cli", "tiny"]


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


@pytest.fixture
def make(tiny, tmp_path):
    """make(stages={}, folder=None, lora=False, **changes) -> a trainer that samples with vLLM, shut down in the end."""
    with contextlib.ExitStack() as engines:

        def trainer(stages=None, *, folder=None, lora=False, max_logp_difference="auto", **changes):
            path, tokenizer, dataset = tiny
            path = folder or path
            made = TokenGRPOTrainer(
                model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
                reward_funcs=token_parity,
                args=arguments(
                    changes.pop("output_dir", tmp_path / "run"),
                    use_vllm=True,
                    vllm_mode="colocate",
                    vllm_importance_sampling_mode="token_truncate",
                    **changes,
                ),
                train_dataset=dataset,
                processing_class=tokenizer,
                peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if lora else None,
                pipeline=build(stages or {}),
                template=encode_template(tokenizer, think_end="</think>"),
                max_logp_difference=max_logp_difference,
            )
            engines.callback(made.close)
            return made

        yield trainer


def logged(trainer, key):
    """The values of a metric, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
