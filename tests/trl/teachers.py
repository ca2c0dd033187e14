"""A teacher for tests that differs from the model that is trained."""

import torch
from transformers import AutoModelForCausalLM

from rltoken.teachers import Teacher


def a_teacher(folder, *, scale=3.0, ends=None):
    """The random model of a folder with larger weights, so that it is surer of other tokens; float32, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 2:
                value.mul_(scale)
    return Teacher(model, ends)
