"""Random adapters on the tiny random model of tests/trl, and the entry points of tests/cli."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.cli.conftest import cache, cli
from tests.trl.conftest import run, tiny

__all__ = ["cache", "cli", "run", "tiny"]

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "attention": {"target_modules": ["q_proj", "v_proj"]},
}


def a_base(folder):
    """The model of a folder in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def an_adapter(base, folder, **settings):
    """The folder of a random adapter for the model of a folder: its updates are not zero, as those of a new one are."""
    torch.manual_seed(1)
    plain = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    config = LoraConfig(**plain | settings, task_type="CAUSAL_LM")
    get_peft_model(a_base(base), config).save_pretrained(folder)
    return str(folder)
