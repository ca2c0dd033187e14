"""Forced answers: thinking cut at a token budget, the end of thinking and an answer header forced, the answer sampled.

Used alike by training (rows stages) and by evaluation under budgets. Every length counts thinking tokens, the token
that ends thinking among them; forced tokens never count.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rltoken.errors import UserError
from rltoken.types import Rollout, Row, Sampler, Template

SUMMARY = "summary"
"""The kind of the rows that train forced answers."""


@dataclass(frozen=True)
class Prefix:
    """Thinking up to a cut, and the tokens forced after it; `closed` where the model had ended it by itself."""

    kept: list[int]
    forced: tuple[int, ...]
    closed: bool

    @property
    def ids(self) -> list[int]:
        """What the answer follows in the completion."""
        return [*self.kept, *self.forced]


def encode_template(
    tokenizer: PreTrainedTokenizerBase,
    *,
    think_end: str | None,
    ellipsis: str = "",
    header: str = "",
    stops: Sequence[str] = (),
) -> Template:
    """The template of a model in tokens; each part is encoded by itself, as it is forced.

    Args:
        think_end: the marker that ends thinking, one token; None for a model that does not think.
        ellipsis: written where thinking is cut, before the marker.
        header: written after the marker: what the answer begins with.
        stops: texts of one token each that end an answer, besides the end of the sequence.

    Raises:
        UserError: a stop is not exactly one token, or a part ends the thinking once more.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    marker = ids(think_end) if think_end else ()
    stop_ids = [ids(text) for text in stops]
    for text, found in zip(stops, stop_ids, strict=True):
        if len(found) != 1:
            raise UserError(
                f"model.forced.stops: {text!r} is {len(found)} tokens of this tokenizer, but must be exactly one; "
                "choose another text, or leave it out."
            )
    for key, text in (("ellipsis", ellipsis), ("header", header), *(("stops", stop) for stop in stops)):
        if marker and marker[0] in ids(text):
            raise UserError(
                f"model.forced.{key}: {text!r} ends the thinking a second time; leave {think_end} out of it."
            )
    return Template(
        think_end_id=marker[0] if marker else None,
        cut=ids(ellipsis) + marker + ids(header),
        ended=ids(header),
        stops=tuple(found[0] for found in stop_ids),
    )


def ascending(budgets: Sequence[float]) -> None:
    """Let budgets pass that ascend: whole numbers of 1 or more, or fractions above 0 and up to 1.0.

    Raises:
        ValueError: they do not, or mix the two.
    """
    if isinstance(budgets, str) or not isinstance(budgets, Sequence):
        raise ValueError(f"{budgets!r} is no list of budgets; give one, such as [0.25, 0.5, 0.75, 1.0]")
    whole = all(type(budget) is int and budget >= 1 for budget in budgets)
    fractions = all(isinstance(budget, float) and 0 < budget <= 1 for budget in budgets)
    if not budgets or not (whole or fractions) or any(a >= b for a, b in itertools.pairwise(budgets)):
        raise ValueError(
            f"{list(budgets)} are no budgets; give ascending whole numbers of tokens, or ascending fractions up to 1.0"
        )


def in_tokens(budgets: Sequence[float], longest: int) -> list[int]:
    """Budgets in tokens: whole numbers as they are, fractions as shares of `longest`.

    Raises:
        ValueError: they do not ascend in tokens.
    """
    ascending(budgets)
    points = [tokens_of(budget, longest) for budget in budgets]
    if points[0] < 1 or any(a >= b for a, b in itertools.pairwise(points)):
        raise ValueError(
            f"budgets {list(budgets)} of {longest} tokens are {points}, which does not ascend; give fewer, or "
            "take them of a longer length"
        )
    return points


def tokens_of(length: float, longest: int) -> int:
    """A length in tokens: a whole number as it is, a fraction as a share of `longest`."""
    return length if isinstance(length, int) else round(length * longest)


def thinking_part(ids: Sequence[int], think_end_id: int | None) -> list[int]:
    """A completion up to and with the first token that ends thinking; all of it where there is none."""
    if think_end_id is None or think_end_id not in ids:
        return list(ids)
    return list(ids[: list(ids).index(think_end_id) + 1])


def until_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens up to and with the first that ends a sequence."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return list(ids[: stop + 1])


def cuts(length: int, budgets: Sequence[int]) -> dict[int, int]:
    """Distinct cut points min(b, length), ascending -> how many of the ascending budgets share each."""
    shared: dict[int, int] = {}
    for budget in budgets:
        point = min(budget, length)
        shared[point] = shared.get(point, 0) + 1
    return shared


def prefixes(
    thinking: Sequence[int], budgets: Sequence[int], template: Template, ends: frozenset[int]
) -> list[tuple[Prefix, int]]:
    """One prefix per distinct cut of a trace, each with the number of budgets that share it (they sum to K).

    A model that does not think ends its thinking with the sequence: that token is no part of what an answer follows.

    Args:
        thinking: `thinking_part` of a completion.
        budgets: K ascending budgets in thinking tokens.
        ends: tokens that end a sequence.
    """
    body = list(thinking)
    if template.think_end_id is None:
        closed = bool(body) and body[-1] in ends
        body = body[:-1] if closed else body
    else:
        closed = bool(body) and body[-1] == template.think_end_id
    found = []
    for point, shared in cuts(len(body), budgets).items():
        whole = closed and point == len(body)
        found.append((Prefix(body[:point], template.ended if whole else template.cut, whole), shared))
    return found


def well_formed(prefix: Prefix, answer: Sequence[int], template: Template, ends: frozenset[int]) -> bool:
    """The format gate: exactly one end of thinking over the last thinking token, the forced tokens and the answer.

    Thinking that ended the sequence instead fails; a model that does not think always passes.
    """
    if template.think_end_id is None:
        return True
    branch = [*prefix.kept[-1:], *prefix.forced, *answer]
    abandoned = bool(prefix.kept) and prefix.kept[-1] in ends
    return branch.count(template.think_end_id) == 1 and not abandoned


def sample_answers(
    rollout: Rollout, sampler: Sampler, branches: Sequence[tuple[int, Prefix]], *, max_new_tokens: int
) -> tuple[list[Row], Tensor, list[dict[str, Any]]]:
    """One sampled answer per branch, all in one batched call, graded in another.

    Args:
        branches: (thinking row, prefix) of each answer.
        max_new_tokens: tokens of an answer at most.

    Returns:
        One row of kind 'summary' per branch (thinking and forced tokens in context, only the answer trained); the raw
        rewards [n, F], none of which adds to the total where the format gate fails; what reward functions logged.

    Raises:
        ValueError: the model's template forces nothing where thinking is cut.
    """
    if not sampler.template.cut:
        raise ValueError("forcing an answer needs a template; set model.think_end or model.forced.header")
    prompts = [rollout.rows[parent].prompt_ids for parent, _ in branches]
    answers = sampler.generate(
        [prompt + prefix.ids for prompt, (_, prefix) in zip(prompts, branches, strict=True)],
        max_new_tokens=max_new_tokens,
        stops=sampler.template.stops,
    )
    rows = [
        Row(
            prompt_ids=prompt,
            completion_ids=prefix.ids + answer.ids,
            train_mask=[0] * len(prefix.ids) + [1] * len(answer.ids),
            logps=None if answer.logps is None else [0.0] * len(prefix.ids) + answer.logps,
            kind=SUMMARY,
            parent=parent,
        )
        for prompt, (parent, prefix), answer in zip(prompts, branches, answers, strict=True)
    ]
    raw, extras = sampler.grade(
        [rollout.inputs[parent] for parent, _ in branches], [row.completion_ids for row in rows]
    )
    formed = [
        well_formed(prefix, answer.ids, sampler.template, sampler.ends)
        for (_, prefix), answer in zip(branches, answers, strict=True)
    ]
    gate = torch.tensor(formed, device=raw.device).unsqueeze(1)
    weights = sampler.total(torch.eye(raw.size(1), device=raw.device))
    kept = gate | (raw * weights <= 0)
    return rows, torch.where(kept, raw, raw.clamp(min=0.0, max=0.0)), extras  # NaN stays NaN
