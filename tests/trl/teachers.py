"""A teacher for tests that differs from the model that is trained."""

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rltoken.teachers import Teacher


def a_teacher(folder, *, scale=3.0, ends=None):
    """The random model of a folder with larger weights, so that it is surer of other tokens; float32, on the CPU."""
    with tempfile.TemporaryDirectory() as place:
        larger = Path(shutil.copytree(folder, Path(place) / "teacher"))
        # scaled before it is loaded: under ZeRO-3 a loaded model has parts of its weights only
        weights = load_file(larger / "model.safetensors")
        scaled = {name: value * scale if value.dim() == 2 else value for name, value in weights.items()}
        save_file(scaled, larger / "model.safetensors", {"format": "pt"})
        return Teacher(AutoModelForCausalLM.from_pretrained(larger, dtype=torch.float32), ends)
