"""Optimizer steps with a loss or a gradient that is not finite: skipped on all ranks, counted, written out to look at.

transformers leaves such a loss out of the logged mean (`logging_nan_inf_filter`) and steps all the same, after which
every weight is NaN; only the scaler of fp16 skips steps, those whose gradient overflows, and lowers its scale. Here a
step is skipped by dropping its gradients just before the optimizer is called, which then changes no weight and no
moment. The step counts: `max_steps` and the learning rate's schedule go on.

The scaler's own skips are its normal work: they are counted, but not towards the end of the run. DeepSpeed steps inside
backward, where nothing can be dropped: it is counted, and weights that are broken by it end the run.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rltoken.errors import SharedError, first_line

logger = logging.getLogger(__name__)

FOLDER = "skipped"
"""The folder inside a run of the batches of skipped steps."""
KEPT = 10
"""How many of these files a rank keeps, the newest."""
SHOWN = 3
"""How many names of weights one message has."""


class FiniteSteps:
    """What makes a trainer of TRL, the next class in line, skip steps that would break its weights."""

    max_skipped_steps = 5
    """Steps in a row after which the run ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seen: list[tuple[dict[str, Tensor], Tensor]] = []
        self._skipped = {"total": 0, "in_a_row": 0}
        super().__init__(*args, **kwargs)

    def checkpoint_state(self) -> dict[str, Any]:
        """What the next class in line keeps, and how many steps were skipped."""
        return super().checkpoint_state() | {"skipped": dict(self._skipped)}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Restore what `checkpoint_state` gave."""
        super().restore_state(state)
        self._skipped = dict(state["skipped"])

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        """TRL's loss; what it was made of is kept until the step is over."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training and not return_outputs:
            # hidden states that ride along are too large to be kept twice
            tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() < 3}
            self._seen.append((tensors, found.detach()))
        return found

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self._mind(model, math.nan if norm is None else float(norm), unknown=norm is None)
        return norm

    def _mind(self, model: nn.Module, norm: float, *, unknown: bool) -> None:
        """Skip the step that is due, on all ranks, if any of them has to.

        Raises:
            SharedError: too many were skipped in a row, or weights are not finite.
        """
        seen, self._seen = self._seen, []
        bad_loss = not bool(torch.stack([loss.float() for _, loss in seen]).isfinite().all())
        bad_norm = not (unknown or math.isfinite(norm))
        flags = torch.tensor([[bad_loss, bad_norm]], device=self.accelerator.device)
        loss_anywhere, norm_anywhere = self.accelerator.gather(flags).any(0).tolist()
        if not (loss_anywhere or norm_anywhere):
            self._skipped["in_a_row"] = 0
        elif self.accelerator.scaler is not None and not loss_anywhere:
            self._skipped["total"] += 1
        else:
            self._skip(model, seen, norm)
        if self._skipped["total"]:  # one number, as TRL logs the tokens so far: a list would be averaged
            self._metrics["train"]["skipped_steps"] = [self._skipped["total"]]

    def _skip(self, model: nn.Module, seen: Sequence[tuple[dict[str, Tensor], Tensor]], norm: float) -> None:
        self._skipped = {name: count + 1 for name, count in self._skipped.items()}
        model.zero_grad(set_to_none=True)
        step, rank = self.state.global_step + 1, self.accelerator.process_index
        folder, broken = Path(self.args.output_dir) / FOLDER, not_finite(model)
        told = {"step": step, "rank": rank, "gradient_norm": norm, "weights_not_finite": broken}
        try:
            write_batches(folder / f"step-{step}-rank-{rank}.safetensors", seen, told)
        except (OSError, SafetensorError) as error:  # a full disk is told by the next save
            logger.warning("The batch of a skipped step could not be written: %s", first_line(error))
        everywhere = self.accelerator.gather(torch.tensor([bool(broken)], device=self.accelerator.device))
        if bool(everywhere.any()):
            raise broken_weights(broken, step)
        if self._skipped["in_a_row"] >= self.max_skipped_steps:
            raise SharedError(
                f"trainer.max_skipped_steps: {self._skipped['in_a_row']} optimizer steps in a row, up to step {step}, "
                f"were skipped, since their loss or gradient (norm {norm:g}) was not finite; their batches are in "
                f"{folder}. Lower trainer.learning_rate, or what docs/faults.md names, and go on from the newest "
                "checkpoint with resume=auto on_change=accept."
            )


def broken_weights(names: Sequence[str], step: int) -> SharedError:
    """What to say where weights of these names (of this rank; maybe none) are not finite in the `step`-th step."""
    shown = f" ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})" if names else ""
    return SharedError(
        f"trainer.learning_rate: at step {step} weights are not finite{shown}; lower it, or load a model that is "
        "whole, and go on from a checkpoint before that with resume=PATH on_change=accept."
    )


def not_finite(model: nn.Module) -> list[str]:
    """Names of the weights of this rank that hold NaN or infinity."""
    local = (
        (name, getattr(value, "to_local", lambda value=value: value)()) for name, value in model.named_parameters()
    )
    return [name for name, value in local if not bool(value.detach().isfinite().all())]


def write_batches(path: Path, seen: Sequence[tuple[dict[str, Tensor], Tensor]], told: dict[str, Any]) -> None:
    """Write micro-batches whose loss is not finite, or all where each is, as one safetensors file.

    Args:
        path: RUN/skipped/step-N-rank-R.safetensors; the folder is made, and earlier files of the rank beyond `KEPT` go.
        seen: (tensors of at most two dimensions under TRL's names, scalar loss) of each micro-batch or pack.
        told: what else goes into the metadata, as JSON, besides `losses` and `not_finite`.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    path.parent.mkdir(exist_ok=True)
    losses = [float(loss) for _, loss in seen]
    numbers = [i for i, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(seen))
    tensors = {f"{i}.{name}": _small(value) for i in numbers for name, value in seen[i][0].items()}
    bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    facts = told | {"losses": losses, "not_finite": bad}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={name: json.dumps(value) for name, value in facts.items()})
    partial.replace(path)
    others = {*path.parent.glob(f"*-{path.stem.rpartition('-')[2]}.safetensors")} - {path}  # its date may be the oldest
    for old in sorted(others, key=lambda p: p.stat().st_mtime)[: -(KEPT - 1)]:
        old.unlink()


def _small(value: Tensor) -> Tensor:
    """A tensor of its own on the CPU, whole numbers in 32 bits."""
    value = value.detach().to("cpu", copy=True).contiguous()
    return value.int() if value.dtype == torch.int64 else value
