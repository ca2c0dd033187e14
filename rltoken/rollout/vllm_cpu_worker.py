"""A vLLM worker on a CPU whose weights can be replaced; imported by vLLM only (`vllm_cpu.engine_settings`).

vLLM packs linear layers for oneDNN, and then has no weights to load into. Its engines that receive a trainer's weights
need CUDA, so the trainer writes a file and the worker reads it: a server on a CPU is on the trainer's machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers import utils
from vllm.v1.worker.cpu_worker import CPUWorker

from rltoken.rollout.vllm_cpu import TRANSFER
from rltoken.rollout.vllm_worker import Fingerprinted


@dataclass
class NoInfo(WeightTransferInitInfo):
    """Nothing is agreed on beforehand."""


@dataclass
class FileInfo(WeightTransferUpdateInfo):
    """Where the weights lie: a safetensors file."""

    path: str


class FileEngine(WeightTransferEngine[NoInfo, FileInfo]):
    """Loads weights from a file into the model as they are named there."""

    init_info_cls, update_info_cls = NoInfo, FileInfo

    def init_transfer_engine(self, init_info: NoInfo) -> None:
        """Nothing to agree on."""

    def start_weight_update(self) -> None:
        """Weights are replaced in place."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM's, without waiting for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FileInfo) -> None:
        """Load every tensor of the file."""
        with safe_open(update_info.path, framework="pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        """Weights are replaced in place."""

    def shutdown(self) -> None:
        """Nothing is held."""


class Worker(Fingerprinted, CPUWorker):
    """vLLM's worker with plain linear layers, which takes weights from files."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model so that its weights stay where they are loaded."""
        with contextlib.suppress(ValueError):  # an earlier engine of this process has registered it
            WeightTransferEngineFactory.register_engine(TRANSFER, FileEngine)
        with _replaceable_linears():
            super().load_model(*args, **kwargs)


@contextlib.contextmanager
def _replaceable_linears() -> Iterator[None]:
    """Keep weights where they are loaded inside the context: packed for oneDNN, they could not be replaced."""
    stock = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = _plain_linear
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = stock


def _plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear
