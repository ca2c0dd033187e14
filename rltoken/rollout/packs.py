"""Micro-batches that hold a set number of tokens: rows sorted by length, packed and trimmed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEFT_PADDED = ("prompt_ids", "prompt_mask")


def row_lengths(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """[B] prompt and [B] completion tokens of each row of a micro-batch."""
    return inputs["prompt_mask"].sum(1), inputs["completion_mask"].sum(1)


def boundaries(prompts: list[int], completions: list[int], pack_tokens: int) -> list[tuple[int, int]]:
    """Cut rows into packs of at most `pack_tokens` tokens, padding counted.

    Args:
        prompts, completions: tokens of each row, in the order in which rows are packed.
        pack_tokens: what a pack may hold: rows x (longest prompt + longest completion); a row that is longer stands
            alone.

    Returns:
        Half-open ranges (start, end) that cover all rows in order.
    """
    packs, start, prompt, completion = [], 0, 0, 0
    for row, lengths in enumerate(zip(prompts, completions, strict=True)):
        wider = max(prompt, lengths[0]), max(completion, lengths[1])
        if row > start and (row + 1 - start) * sum(wider) > pack_tokens:
            packs.append((start, row))
            start, wider = row, lengths
        prompt, completion = wider
    return [*packs, (start, len(prompts))]


def take(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The rows `rows` [n] of a micro-batch, without the columns that are padding for all of them."""
    size, columns = inputs["completion_ids"].shape
    prompts, completions = row_lengths(inputs)
    prompt_columns = int(prompts[rows].max())
    completion_columns = max(1, int(completions[rows].max()))

    def trim(name: str, value: Any) -> Any:
        """The rows of one entry, without its padding columns."""
        if isinstance(value, list):
            return [value[i] for i in rows.tolist()]
        if not isinstance(value, Tensor) or value.dim() == 0 or value.size(0) != size:
            return value
        value = value[rows]
        if name in LEFT_PADDED:
            return value[:, value.size(1) - prompt_columns :]
        return value[:, :completion_columns] if value.dim() > 1 and value.size(1) == columns else value

    return {name: trim(name, value) for name, value in inputs.items()}


def share(loss_type: str, pack: dict[str, Any], whole: dict[str, Any]) -> Tensor | float:
    """The part of the whole micro-batch's loss that a pack's loss stands for, by what TRL's loss type divides by.

    Rows for grpo, sapo, dr_grpo and luspo, loss tokens for bnpo; dapo, cispo and vespo already divide by the whole
    window.
    """
    if loss_type in ("dapo", "cispo", "vespo"):
        return 1.0
    if loss_type == "bnpo":
        return loss_mask(pack).sum() / loss_mask(whole).sum().clamp(min=1.0)
    return pack["completion_ids"].size(0) / whole["completion_ids"].size(0)


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """[B, T] 1 on tokens that are trained."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def reduce_loss(values: Tensor, mask: Tensor, loss_type: str, *, max_length: int, window_tokens: Tensor) -> Tensor:
    """Reduce an unreduced auxiliary loss as TRL reduces the policy loss of the same type.

    Args:
        values: [B, T].
        mask: [B, T] the full loss mask: it is the divisor, also where `values` are zero.
        max_length: dr_grpo's constant, completion tokens.
        window_tokens: the divisor of dapo, cispo and vespo for one accumulation step.

    Returns:
        A scalar, not yet divided by the accumulation steps (but for dapo, cispo and vespo, whose divisor has them).
    """
    values = torch.where(mask > 0, values, torch.zeros_like(values))
    if loss_type in ("grpo", "sapo"):
        return (values.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if loss_type == "bnpo":
        return values.sum() / mask.sum().clamp(min=1.0)
    if loss_type == "dr_grpo":
        return values.sum() / (values.size(0) * max_length)
    if loss_type == "luspo":
        return values.sum(-1).mean()
    return values.sum() / window_tokens
