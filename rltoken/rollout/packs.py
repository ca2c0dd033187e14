"""Micro-batches of whole families (a thinking row and the rows grown from it), cut into packs of a number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEFT_PADDED = ("prompt_ids", "prompt_mask")


def fold(window: dict[str, Any], originals: int) -> dict[str, Any]:
    """The window with one entry per family, so that TRL, which shuffles and splits entries, never parts a family.

    Args:
        window: entries of B = originals x width rows: the thinking rows, then those of the first one, of the second ...
        originals: how many thinking rows there are.

    Returns:
        [originals, width, ...] of each tensor of B rows, lists of lists; what is not of B rows as it is.
    """
    rows = window["completion_ids"].size(0)
    width = rows // originals
    order = torch.arange(originals, rows).view(originals, width - 1)
    order = torch.cat([torch.arange(originals).unsqueeze(1), order], 1)

    def folded(value: Any) -> Any:
        """One entry of the window by families."""
        if isinstance(value, list) and len(value) == rows:
            return [[value[i] for i in family] for family in order.tolist()]
        return value[order.to(value.device)] if is_of_rows(value, rows) else value

    return {name: folded(value) for name, value in window.items()}


def unfold(inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A micro-batch by rows, families in succession, each with its thinking row first; and the rows of a family."""
    if inputs["completion_ids"].dim() == 2:
        return inputs, 1
    families, width = inputs["completion_ids"].shape[:2]

    def unfolded(value: Any) -> Any:
        """One entry by rows."""
        if isinstance(value, list) and len(value) == families:
            return [row for family in value for row in family]
        return value.flatten(0, 1) if is_of_rows(value, families) else value

    return {name: unfolded(value) for name, value in inputs.items()}, width


def is_of_rows(value: Any, rows: int) -> bool:
    """Whether an entry of a window or micro-batch is a tensor with one part for each of so many rows."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == rows


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
        if not is_of_rows(value, size):
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
