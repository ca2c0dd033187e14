"""Completions as text, and the part of them that holds the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

THINK_END = "</think>"

Completion = str | Sequence[dict[str, str]]
"""A completion as TRL hands it to a reward function: plain text, or messages whose last one is the assistant's."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def content(completion: Completion) -> str:
    """The text of a completion, whichever of TRL's two forms it has."""
    return completion if isinstance(completion, str) else (completion[-1]["content"] or "")


def final_part(text: str, think_end: str | None = None) -> str | None:
    """What follows the end of thinking: the only place where an answer counts.

    Args:
        text: a whole completion.
        think_end: the marker that a thinking model must write. None for a model that does not think: then the text
            after the last `</think>`, if it wrote one, or all of it.

    Returns:
        The text after the last marker, or None where `think_end` is given and missing: a completion that was cut
        while thinking has no answer, whatever it wrote on the way.
    """
    _, found, rest = text.rpartition(think_end or THINK_END)
    return None if think_end and not found else rest


def last_box(text: str) -> str | None:
    r"""The content of the last balanced, non-empty `\boxed{...}` or `\fbox{...}`, or None.

    An escaped brace does not count as one. Takes time linear in the length of the text.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    closing = _matching_braces(text)
    for box in reversed(boxes):
        opened = box.end() - 1
        if opened in closing and (inside := text[opened + 1 : closing[opened]].strip()):
            return inside
    return None


def _matching_braces(text: str) -> dict[int, int]:
    """Position of each balanced `{` -> position of its `}`."""
    pairs, opened, escaped = {}, [], False
    for position, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            opened.append(position)
        elif character == "}" and opened:
            pairs[opened.pop()] = position
    return pairs
