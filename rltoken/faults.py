"""What a machine or a model fails with in the middle of a run, told in one line with what to change."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import nn

from rltoken.errors import UserError, first_line
from rltoken.trl_steps import broken_weights, not_finite
from rltoken.watch import Doing, doing

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
"""What a RuntimeError says where an allocator other than CUDA's has nothing left."""
_LARGE_STEP = (
    "rollout.pack_tokens",
    "set it to fewer tokens than now, trainer.gradient_checkpointing=true, fewer rows in "
    "trainer.per_device_train_batch_size with more trainer.gradient_accumulation_steps, or +lora=default",
)
SMALLER = {
    "loading": ("model.dtype", "set it to bfloat16, add +lora=qlora, or take a smaller model"),
    "sampling": (
        "trainer.per_device_train_batch_size",
        "lower it with more trainer.steps_per_generation, lower trainer.max_completion_length, set rollout.batch_rows "
        "where answers are forced, or with vLLM lower trainer.vllm_gpu_memory_utilization",
    ),
    "evaluation": ("eval.batch_size", "lower it"),
}
"""Phase (`rltoken.watch.PHASES`) -> the key that memory goes by there, and what to do; else the step is too large."""


@contextlib.contextmanager
def memory_told(step: Callable[[], int]) -> Iterator[None]:
    """Turn memory that is used up into one line.

    Args:
        step: gives the optimizer step that is under way, 0 before training.

    Raises:
        UserError: says in which step and phase it was, and what to lower.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        stack = [(frame.filename, frame.name) for frame in reversed(traceback.extract_tb(error.__traceback__))]
        at = doing(stack, step())
        key, fix = SMALLER.get(at.phase, _LARGE_STEP)
        raise UserError(
            f"{key}: out of memory at {Doing(at.step, at.phase)}; {fix}; then go on with resume=auto on_change=accept "
            f"({first_line(error)[:200]})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory is used up, a GPU's or the machine's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


@contextlib.contextmanager
def broken_weights_told(model: nn.Module, step: Callable[[], int]) -> Iterator[None]:
    """Say of an error inside the context that the weights are not finite, where that is behind it.

    Sampling is the first to stumble over such weights: torch then speaks of probabilities.

    Raises:
        SharedError: names the weights.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) or not (names := not_finite(model)):
            raise
        raise broken_weights(names, step()) from error
