"""L1: the prompt names a length, and the reward measures how well the completion keeps to it (LCPO).

Paper: Aggarwal and Welleck, "L1: Controlling How Long A Reasoning Model Thinks With Reinforcement Learning", 2025
(arXiv 2503.04697); code: cmu-l3/l1. Read from the code, but for the paper's form of L1-Max, which is recalled.

    n*     uniform from 100 to 4000 tokens, drawn once per group and asked for in the prompt              l1_prompt
    exact  r = c - alpha |n* - n|                                                                         l1_exact
    max    r = c clip(alpha (n* - n) + delta, 0, 1)                                      (paper)          l1_max
           r = c (clip(alpha (n* - n), -1, 1) + 1) / 2                                   (code)

c is the reward, n the tokens of the whole completion, not of the thinking alone. alpha = 3e-4, delta = 0.5.

- The two forms of L1-Max agree at n = n*, but the code's has half the slope. `reading` chooses; the paper's by default.
- L1-Max is trained from L1-Exact with half of its prompts asking for an exact length (`ask: both`); that those get the
  exact reward is recalled of the paper.
- The released script of L1-Max sets no options of the reward, with which its code returns bare correctness. Which
  settings made the released model is not known.
- As published, the exact form subtracts from wrong answers too; so does `gated=False`.
"""

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rltoken.methods.budget_prompt import asked, column, drawn_per_group
from rltoken.ops import gate_by_success
from rltoken.ranges import Count, Idle, Range

SENTENCES = {"exact": " Think for {budget} tokens.", "maximum": " Think for maximum {budget} tokens."}
ASKED = {"exact": ("exact",), "maximum": ("maximum",), "both": ("exact", "maximum")}
SOURCE = "+prompt=l1 or +prompt=budget"
Slope = Annotated[float, Range(least=0)]


def l1_prompt(
    inputs: list[dict[str, Any]],
    group: Tensor,
    rng: torch.Generator,
    *,
    least: Count = 100,
    most: Count = 4000,
    ask: Literal["exact", "maximum", "both"] = "exact",
) -> list[dict[str, Any]]:
    """Ask for a length, drawn once per group; it stands in the column `budget`, what it means in `budget_kind`.

    Args:
        inputs: one dict per row, with a conversational `prompt`.
        group: [B].
        rng: draws the lengths, and with `both` the kinds.
        least, most: the range of lengths, tokens.
        ask: for lengths to meet, for lengths to stay within, or for either in half of the groups.

    Raises:
        ValueError: the range is empty.
    """
    if least > most:
        raise ValueError(f"most: there is no length from least={least} to most={most}; raise most")
    budgets = [least + i for i in drawn_per_group(most - least + 1, group, rng)]
    kinds = [ASKED[ask][i] for i in drawn_per_group(len(ASKED[ask]), group, rng)]
    return [
        {**asked(example, SENTENCES[kind].format(budget=budget)), "budget": budget, "budget_kind": kind}
        for example, budget, kind in zip(inputs, budgets, kinds, strict=True)
    ]


def l1_exact(
    inputs: list[dict[str, Any]],
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    lengths: Tensor,
    *,
    alpha: Slope = 3e-4,
    gated: bool = True,
) -> Tensor:
    """[B] rewards less `alpha` for every token away from the length that the prompt names.

    Args:
        inputs: one dict per row, with the column `budget`, tokens.
        rewards: [B]; `correct`: [B] bool; `group`: [B].
        lengths: [B] tokens of the whole completion.
        alpha: what a token costs.
        gated: shape correct answers only, and never to below a wrong one; False: all, as published.

    Raises:
        ValueError: a prompt without a budget.
    """
    shaped = rewards - slack(inputs, lengths, alpha, rewards).abs()
    return gate_by_success(shaped, rewards, correct, group) if gated else shaped


def l1_max(
    inputs: list[dict[str, Any]],
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    lengths: Tensor,
    *,
    alpha: Slope = 3e-4,
    delta: Annotated[float, Range(least=0, most=1), Idle("reading", "code")] = 0.5,
    reading: Literal["paper", "code"] = "paper",
    gated: bool = True,
) -> Tensor:
    """[B] rewards times a factor that falls from 1 to 0 as the length passes the one that the prompt names.

    Args:
        inputs, rewards, correct, group, lengths, alpha, gated: as in `l1_exact`. Prompts whose column `budget_kind` is
            'exact' have the reward of that; all others, also those without that column, name a maximum.
        delta: the factor at the named length; the code's reading has 0.5.
        reading: the paper's factor, or the code's, which has half its slope.

    Raises:
        ValueError: a prompt without a budget.
    """
    left = slack(inputs, lengths, alpha, rewards)
    kinds = [example.get("budget_kind") == "exact" for example in inputs]
    exact, shaped = torch.tensor(kinds, device=rewards.device), torch.empty_like(rewards)
    shaped[exact] = rewards[exact] - left[exact].abs()
    within = left[~exact]
    factor = (within + delta).clamp(0, 1) if reading == "paper" else (within.clamp(-1, 1) + 1) / 2
    shaped[~exact] = rewards[~exact] * factor
    return gate_by_success(shaped, rewards, correct, group) if gated else shaped


def slack(inputs: list[dict[str, Any]], lengths: Tensor, alpha: float, rewards: Tensor) -> Tensor:
    """[B] `alpha` (n* - n): what the tokens are worth that are left of the named length, below 0 beyond it.

    Args:
        inputs, lengths, alpha: as in `l1_exact`.
        rewards: [B], whose type and device the result has.

    Raises:
        ValueError: a prompt without a budget.
    """
    return alpha * (rewards.new_tensor(column(inputs, "budget", SOURCE)) - lengths)
