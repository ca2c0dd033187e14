"""Ask for a thinking budget in the prompt.

Source: the prompt side of L1 (Aggarwal and Welleck, "L1: Controlling How Long A Reasoning Model Thinks", 2025, arXiv
2503.04697), which appends "Think for n tokens." with n drawn per prompt. The reward side is a shape stage.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor


def are_budgets(budgets: Sequence[int]) -> None:
    """Let a list of token counts pass."""
    if not budgets or min(budgets) < 1:
        raise ValueError(f"{budgets!r} is not possible; set it to numbers of tokens, as in [16,32]")


def has_a_place(template: str) -> None:
    """Let a text pass that says where the budget belongs."""
    if "{budget}" not in template:
        raise ValueError(f"{template!r} does not contain {{budget}}; put it where the number belongs")


def budget_prompt(
    inputs: list[dict[str, Any]],
    group: Tensor,
    rng: torch.Generator,
    *,
    budgets: Annotated[Sequence[int], are_budgets],
    template: Annotated[str, has_a_place] = " Think for {budget} tokens.",
) -> list[dict[str, Any]]:
    """Append a budget, drawn once per group, to the last message; reward functions find it in the column `budget`.

    Args:
        inputs: one dict per row, with a conversational `prompt`.
        group: [B] group numbers: the rows of one group get the same budget, since their rewards are compared.
        rng: draws the budgets.
        budgets: thinking tokens to choose from.
        template: the text to append.
    """
    numbers = group.unique().tolist()
    draws = torch.randint(len(budgets), (len(numbers),), generator=rng, device=rng.device).tolist()
    drawn = {number: budgets[i] for number, i in zip(numbers, draws, strict=True)}

    def with_budget(example: dict[str, Any], budget: int) -> dict[str, Any]:
        *before, last = example["prompt"]
        asked = {**last, "content": last["content"] + template.format(budget=budget)}
        return {**example, "prompt": [*before, asked], "budget": budget}

    return [with_budget(example, drawn[number]) for example, number in zip(inputs, group.tolist(), strict=True)]
