"""Ada-GRPO: a reward that keeps rare formats of reasoning alive, the longer the run the less.

Paper: Wu et al., "ARM: Adaptive Reasoning Model", 2025 (arXiv 2505.20258); code: TEAM-ARM/ARM. A model is first taught
four formats by supervision (`rltoken.supervised`), each opened by a tag: answer only, short thinking, code, long
thinking. Plain GRPO would then keep the most accurate of them alone. In the order of the code, for completion i of a
group of G, at optimizer step t of T:

    f_i       the format whose tag opens the completion
    r_i    <- 0 where no tag does, a tag of another format occurs anywhere, or the structure is not the format's
    F_i     = completions of the group of the same format; those without one are one format
    alpha_i = 1 + (G / F_i - 1) (1 + cos(pi t / T)) / 2         from G / F_i down to 1
    r_i    <- alpha_i r_i

The advantage is GRPO's: the reward less the group's mean, over its standard deviation. At t = T it is plain GRPO. Early
on a correct answer in a frequent format can have a negative advantage; that is meant.

- alpha is that of the code; the project's page has G / F_i times a decay, which is the same number. t begins with 1, as
  in the code; the paper does not say.
- `<ANSWER>` opens the format without thinking, and the answer of every other one, so it is foreign to none.
- The published gate looks at tags alone. `structures` adds a regular expression for each format, which its whole
  completions match. Without one, a format whose tag leaves room for any thinking, as `<DIRECT>` of the embedded world
  does and the published `<ANSWER>` does not, can become a label that changes nothing.
- `diversity=False` leaves alpha out: GRPO behind the same gate, the control.
- As released, white space before the tag makes a completion one without a format; `strip=False` does that.
- Graders of the paper give 0 or 1. Where another gives a wrong answer something, it keeps that unscaled, so that it is
  not lifted above a correct one; a negative reward stays when a format is broken.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from rltoken.ops import group_sum
from rltoken.types import Progress

logger = logging.getLogger(__name__)

ANSWER = "<ANSWER>"
"""The tag around the answer of every format."""
TAGS = {"direct": ANSWER, "short": "<COT>", "code": "<CODE>", "long": "<LONG_COT>"}
"""Format -> the tag that opens it, as published."""


def told_apart(tags: Mapping[str, str]) -> None:
    """Let tags pass of which none is empty or begins as another does: which one opens a text must be clear."""
    if not isinstance(tags, Mapping) or not tags:
        raise ValueError(f"{tags!r} are no formats; set tags={{short: <COT>, long: <LONG_COT>}}, or model.formats")
    values = list(tags.values())
    for tag in values:
        if not isinstance(tag, str) or not tag.strip():
            raise ValueError(f"{tag!r} is no tag; set it to a text such as '<COT>'")
        if sum(other.startswith(tag) for other in values) > 1:
            raise ValueError(f"another format's tag begins with {tag!r}; set tags of which none begins another")


def expressions(structures: Mapping[str, str] | None, tags: Mapping[str, str]) -> None:
    """Let regular expressions pass that can be read, of formats that have a tag."""
    if structures is not None and not isinstance(structures, Mapping):
        raise ValueError(f"{structures!r} is no mapping; set structures={{short: EXPRESSION}}, or null")
    for form, pattern in (structures or {}).items():
        if form not in tags:
            raise ValueError(f"there is no format {form!r}; set structures of: {', '.join(tags)}")
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{form} has {pattern!r}, no regular expression ({error}); correct it") from error


def ada_grpo(
    texts: list[str],
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    progress: Progress,
    *,
    tags: Annotated[Mapping[str, str], told_apart] = TAGS,
    structures: Annotated[Mapping[str, str] | None, expressions] = None,
    diversity: bool = True,
    strip: bool = True,
) -> tuple[Tensor, dict[str, float]]:
    """[B] rewards scaled by how rare their format is in its group, and the share of each format in the window.

    It warns where every completion of the first window is broken: the model was never taught the formats.

    Args:
        texts: B completions.
        rewards: [B], NaN where there is none, which stays; `correct`: [B] bool; `group`: [B].
        progress: the optimizer step, from 0, and their number.
        tags: format -> the tag that opens it.
        structures: format -> a regular expression that its whole completions match, tag included, `.` being any
            character; None, or a format without one: tags alone, as published.
        diversity: correct completions of rare formats are worth more; False: the gate alone.
        strip: white space around a completion does not matter.
    """
    read = [text.strip() if strip else text for text in texts]
    numbers, kept = zip(*(format_of(text, tags, structures) for text in read), strict=True)
    if progress.step == 0 and any(texts) and not any(kept):  # all are empty where a trainer tries its stages
        logger.warning(
            "method.shapes.ada_grpo.tags: no completion of the first window is in a format, so that none earns "
            "anything; teach the formats by a supervised stage, as sft=tiny or sft=paper, or set the tags with which "
            "the model opens its completions; now they are %s.",
            ", ".join(tags.values()),
        )
    form = torch.tensor(numbers, device=rewards.device)
    whole = torch.tensor(kept, device=rewards.device)
    gated = torch.where(whole, rewards, rewards.clamp(max=0.0))
    shares = {f"format/{name}": (form == i).double().mean().item() for i, name in enumerate(tags)}
    shares["format/broken"] = (~whole).double().mean().item()
    if not diversity:
        return gated, shares
    scale = diversity_scale(form, group, (progress.step + 1) / max(1, progress.max_steps))
    return torch.where(correct, scale.to(rewards.dtype) * gated, gated), shares


def diversity_scale(form: Tensor, group: Tensor, done: float) -> Tensor:
    """[B] double: G / F at the beginning, 1 at the end.

    Args:
        form: [B] long: completions of one format share a number.
        group: [B] long: rows of one group share a number.
        done: share of the run that is over, from 0 to 1.
    """
    pair = torch.stack([group, form], 1).unique(dim=0, return_inverse=True)[1]
    one = torch.ones(len(form), dtype=torch.double, device=form.device)
    rarity = group_sum(one, group) / group_sum(one, pair)
    return 1 + (rarity - 1) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def format_of(text: str, tags: Mapping[str, str], structures: Mapping[str, str] | None = None) -> tuple[int, bool]:
    """The number of the format whose tag opens a text, -1 for none, and whether the text keeps to it.

    Args:
        text: a completion.
        tags: format -> the tag that opens it. A tag of another format is not kept to, wherever it occurs.
        structures: format -> a regular expression that the whole text matches.
    """
    number = next((i for i, tag in enumerate(tags.values()) if text.startswith(tag)), -1)
    others = [tag for i, tag in enumerate(tags.values()) if i != number and tag != ANSWER]
    foreign = any(mark in text for tag in others for mark in (tag, closing(tag)))
    if number < 0 or foreign:
        return number, False
    pattern = (structures or {}).get(list(tags)[number])
    return number, pattern is None or re.fullmatch(pattern, text, re.DOTALL) is not None


def closing(tag: str) -> str:
    """`</COT>` for `<COT>`."""
    return f"</{tag.removeprefix('<')}"


def written(form: str, reasoning: str | None, answer: str, tags: Mapping[str, str] = TAGS) -> str:
    """A completion in a format: its tags around the reasoning, then the answer's around the answer.

    Args:
        form: a key of `tags`.
        reasoning: what comes before the answer; `direct` takes none.
        answer: the final answer.
        tags: format -> the tag that opens it.
    """
    answered = f"{ANSWER}\n{answer}\n{closing(ANSWER)}"
    if tags[form] == ANSWER:
        return answered
    return "\n".join(filter(None, (tags[form], (reasoning or "").strip(), closing(tags[form]), answered)))
