"""A vLLM engine of an evaluation's own, in each of its processes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from rltoken.rollout import vllm_cpu

if TYPE_CHECKING:
    from vllm import LLM


@contextlib.contextmanager
def engine(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    processes: int = 1,
    max_model_len: int | None = None,
    gpu_memory_utilization: float = 0.9,
    trust_remote_code: bool = False,
) -> Iterator[LLM]:
    """Serve a model inside the context.

    Args:
        path: a model's folder or hub id.
        dtype: what it computes in; left out, vLLM would take bfloat16 for a model stored in float32.
        device: of this process.
        processes: how many the evaluation has; each serves the whole model.
        max_model_len: tokens of a context and its completion; None: the model's own limit.
        gpu_memory_utilization: the share of a GPU's memory for weights, keys and values.
        trust_remote_code: run model code that comes with the model.

    Raises:
        UserError: a CPU cannot serve this model.
    """
    settings: dict[str, Any] = {
        "model": path,
        "max_model_len": max_model_len,
        "trust_remote_code": trust_remote_code,
        # or every process of a launcher would take the first GPU, and a rank that is not its own
        **({"distributed_executor_backend": "external_launcher"} if processes > 1 else {}),
    }
    if device.type == "cuda":
        from vllm import LLM

        llm = LLM(dtype=dtype, gpu_memory_utilization=gpu_memory_utilization, **settings)
    else:
        vllm_cpu.refuse_model(path, trust_remote_code=trust_remote_code)
        llm = vllm_cpu.engine(dtype, **settings)
    try:
        yield llm
    finally:
        with _process_group_kept() if processes > 1 else contextlib.nullcontext():
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _process_group_kept() -> Iterator[None]:
    """Let an engine that shuts down end its own groups, but not the one in which the processes share their work."""
    stock = distributed.destroy_process_group
    distributed.destroy_process_group = lambda group=None: group and stock(group)
    try:
        yield
    finally:
        distributed.destroy_process_group = stock
