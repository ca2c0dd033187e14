"""Length-regularised reward with three levels of length, chosen by an instruction in the prompt.

In the style of TLDR: Zhang et al., "Making Small Language Models Efficient Reasoners: Intervention, Supervision,
Reinforcement", 2025 (arXiv 2505.07961), of which only the abstract could be read and no code was found: GRPO with a
length regularisation and control over short, medium and long traces. The formula, the strengths and the instructions
below are therefore not the authors'.

    level      short, medium or long, drawn once per group; its instruction ends the prompt             level_prompt
    r_i    <-  c_i - strength(level) n_i / longest      c_i reward, n_i tokens of the whole completion  tldr_style

short: 1, medium: 0.5, long: 0. A group has one level, so that answers to different instructions are never compared.
Gated, the penalty is that of correct answers only; `gated=False` penalises wrong answers as well. What an instruction
means a model may be taught first, on traces of its own with the instruction of their length (by_length).
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from datasets import Dataset
from torch import Tensor

from rltoken.data import load_traces
from rltoken.errors import UserError
from rltoken.methods.budget_prompt import asked, column, drawn_per_group
from rltoken.ops import gate_by_success
from rltoken.ranges import Count, Range

LEVELS = ("short", "medium", "long")
COLUMN = "length_level"
Strength = Annotated[float, Range(least=0)]


def are_levels(levels: Sequence[str]) -> None:
    """Let a list of levels pass."""
    if not levels or isinstance(levels, str) or not set(levels) <= set(LEVELS):
        raise ValueError(f"{levels!r} is not possible; set it to some of [{', '.join(LEVELS)}]")


def level_prompt(
    inputs: list[dict[str, Any]],
    group: Tensor,
    rng: torch.Generator,
    *,
    short: str = " Think briefly.",
    medium: str = " Think at moderate length.",
    long: str = " Think as long as you need.",
    levels: Annotated[Sequence[str], are_levels] = LEVELS,
) -> list[dict[str, Any]]:
    """Append the instruction of a level, drawn once per group, and put the level into the column `length_level`.

    Args:
        inputs: one dict per row, with a conversational `prompt`.
        group: [B].
        rng: draws the levels.
        short, medium, long: the text to append for each level.
        levels: those to draw from; one alone asks for that, as an evaluation does.
    """
    sentences = dict(zip(LEVELS, (short, medium, long), strict=True))
    drawn = [levels[i] for i in drawn_per_group(len(levels), group, rng)]
    return [{**asked(example, sentences[level]), COLUMN: level} for example, level in zip(inputs, drawn, strict=True)]


def by_length(path: str, *, short: str, medium: str, long: str, template: str = "{problem}") -> Dataset:
    """Supervised traces whose prompts ask for the level that they have: of all traces the shortest third is short, ...

    Args:
        path: a file of `rltoken.star`, with the thinking tokens of each trace in the column `tokens`.
        short, medium, long: the text to append for each level, as in `level_prompt`.
        template: the user message of a problem that is no conversation; `{problem}` stands for it.

    Returns:
        Columns `prompt`, `completion` and `tokens`, shortest first; of equal lengths the first in the file.

    Raises:
        UserError: the file cannot be read, or tells no lengths.
    """
    columns = {"prompt": "prompt", "completion": "completion", "tokens": "tokens"}
    traces = load_traces(path=path, columns=columns, template=template, key="sft.traces.path")
    if "tokens" not in traces.column_names:
        raise UserError(f"sft.traces.path: {path} has no column 'tokens'; name a file of python -m rltoken.star.")
    rows = sorted(traces, key=lambda row: row["tokens"])
    sentences = (short, medium, long)
    return Dataset.from_list([asked(row, sentences[i * len(LEVELS) // len(rows)]) for i, row in enumerate(rows)])


def tldr_style(
    inputs: list[dict[str, Any]],
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    lengths: Tensor,
    *,
    longest: Count,
    short: Strength = 1.0,
    medium: Strength = 0.5,
    long: Strength = 0.0,
    gated: bool = True,
) -> Tensor:
    """[B] rewards less the length's share of `longest`, times the strength of the prompt's level.

    Args:
        inputs: one dict per row, with the column `length_level` that `level_prompt` fills.
        rewards: [B]; `correct`: [B] bool; `group`: [B].
        lengths: [B] tokens of the whole completion.
        longest: the length in tokens that costs the whole strength.
        short, medium, long: what that length costs at each level.
        gated: penalise correct answers only, and never to below a wrong one; False: penalise all.

    Raises:
        ValueError: a prompt without a level, or with one that is not known.
    """
    strengths = dict(zip(LEVELS, (short, medium, long), strict=True))
    levels = column(inputs, COLUMN, "+prompt=tldr_style")
    if unknown := set(levels) - set(LEVELS):
        raise ValueError(f"the column '{COLUMN}' holds {unknown}; there are: {', '.join(LEVELS)}")
    strength = rewards.new_tensor([strengths[level] for level in levels])
    shaped = rewards - strength * lengths / longest
    return gate_by_success(shaped, rewards, correct, group) if gated else shaped
