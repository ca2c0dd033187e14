"""scripts/memory.py: its shapes are those of the models, and docs/scaling.md says what it prints."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "memory.py"
spec = importlib.util.spec_from_file_location("memory", SCRIPT)
memory = importlib.util.module_from_spec(spec)
sys.modules["memory"] = memory  # dataclasses look their module up
spec.loader.exec_module(memory)


@pytest.mark.parametrize(
    ("name", "parameters"), [("1.5B", 1_777_088_000), ("7B", 7_615_616_512), ("32B", 32_763_876_352)]
)
def test_the_shapes_are_those_of_the_models(name, parameters):
    shape = memory.MODELS[name]
    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(value.numel() for value in model.parameters()) == shape.parameters == parameters


def test_worked_numbers():
    """A model of one layer, by hand."""
    shape = memory.Shape(layers=1, hidden=4, intermediate=8, heads=2, kv_heads=1, vocabulary=10, head=2)
    assert shape.layer == 4 * (4 + 2 * 2) + 4 + 2 * 2 + 4 * 4 + 3 * 4 * 8 + 2 * 4 == 160
    assert shape.parameters == 160 + 2 * 10 * 4 + 4 == 244
    assert shape.adapter(3) == 3 * (2 * (4 + 4) + 2 * (4 + 2) + 3 * (4 + 8)) == 192
    assert shape.cache_per_token == 4 * 1 * 1 * 2
    assert [memory.states(shape, kind, 2, 3) for kind in memory.STRATEGIES] == [
        4880,
        1952,
        2196,
        1952,
        3560,
        1780,
        3316.624,
    ]
    assert memory.states(shape, "ddp", 1, 3) == 3904
    assert [memory.reference(shape, kind, 2) for kind in memory.STRATEGIES] == [488, 244, 488, 244, 0, 0, 0]
    assert memory.activations(shape, 10) == 2 * 10 * 4 + 2 * 10 * (8 * 4 + 4 * 8) + 4 * 10 * 4 == 1520
    assert memory.head(shape, "ddp") - memory.head(shape, "lora") == 160 and memory.TILE == 2**28
    assert memory.gathered(shape, "fsdp2") == 2 * (2 * 160 + 2 * 10 * 4) == 800


def test_the_document_quotes_what_is_printed():
    printed = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True).stdout
    assert f"$ python scripts/memory.py\n{printed.rstrip()}\n```" in (ROOT / "docs" / "scaling.md").read_text()
