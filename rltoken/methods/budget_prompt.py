"""Ask for a thinking budget in the prompt.

Source: the prompt side of L1 (Aggarwal and Welleck, "L1: Controlling How Long A Reasoning Model Thinks", 2025, arXiv
2503.04697), which appends "Think for n tokens." with n drawn per prompt. Here n comes from a list; L1's own range of
lengths, its second sentence and its rewards are in `rltoken.methods.l1`.
"""

from collections.abc import Mapping, Sequence
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
    choices = [budgets[i] for i in drawn_per_group(len(budgets), group, rng)]
    return [
        {**asked(example, template.format(budget=budget)), "budget": budget}
        for example, budget in zip(inputs, choices, strict=True)
    ]


def drawn_per_group(n: int, group: Tensor, rng: torch.Generator) -> list[int]:
    """B numbers from 0 to n - 1, drawn uniformly once per group.

    Args:
        n: how many there are to draw from.
        group: [B] group numbers.
        rng: draws them.
    """
    numbers = group.unique().tolist()
    draws = torch.randint(n, (len(numbers),), generator=rng, device=rng.device).tolist()
    drawn = dict(zip(numbers, draws, strict=True))
    return [drawn[number] for number in group.tolist()]


def asked(example: Mapping[str, Any], sentence: str) -> dict[str, Any]:
    """A copy of a row whose last message ends with `sentence`."""
    *before, last = example["prompt"]
    return {**example, "prompt": [*before, {**last, "content": last["content"] + sentence}]}


def column(inputs: Sequence[Mapping[str, Any]], name: str, source: str) -> list[Any]:
    """What each row has in a column that the data set need not have.

    Args:
        inputs: one dict per row.
        name: of the column.
        source: what fills it, for the error.

    Raises:
        ValueError: a row has no such column.
    """
    if any(name not in example for example in inputs):
        raise ValueError(f"inputs: a prompt has no column '{name}'; add {source}")
    return [example[name] for example in inputs]
