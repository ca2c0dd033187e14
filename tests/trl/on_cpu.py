"""FSDP and DeepSpeed on processes without a GPU, which accelerate by itself would train with DDP, or each alone."""

import os

from accelerate import PartialState
from accelerate.utils import DistributedType

SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def sharded():
    """Whether the launcher asks for FSDP or DeepSpeed."""
    return any(os.environ.get(name) == "true" for name in SHARDED)


def stand_in():
    """Let processes on CPUs pass for such with a GPU each, joined by gloo, where the launcher asks for sharding."""
    if sharded():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
