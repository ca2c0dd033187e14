"""Completions as text, the part of them that holds the answer, and the boxes in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

THINK_END = "</think>"
DENIED = "not "
"""What stands before an answer that is said to be none."""

Completion = str | Sequence[dict[str, str]]
"""A completion as TRL hands it to a reward function: plain text, or messages whose last one is the assistant's."""

_BOX = re.compile(
    r"\\(?:boxed|fbox)\s*+(?:\{|(?P<bare>\$?-?(?:\d++(?:[.,]\d++)*+(?:/\d++)?|\\[dt]?frac(?:\d\d|\{[^{}]*\}\{[^{}]*\})))"
    r"(?![\w{\\^(]))",
    re.ASCII,
)
"""The beginning of a box, or one of a bare number or fraction, `\\boxed 5` or `\\boxed\\frac12`."""
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BETWEEN_FORMULAS = re.compile(r"\\(?:q?quad|[\[\]() ,:;!])|\\text\s*|[${}]")
_JOINED = re.compile(r"[\s,;]*(?:and|or)\s*|[^\w.]{0,10}")
"""What may stand between two boxes that are one answer, `\\boxed{1}` and `\\boxed{2}`."""
_MAX_JOINED = 32
_NEGATED = re.compile(
    r"(?:\b(?:not|cannot|never|neither|nor)|n['\N{RIGHT SINGLE QUOTATION MARK}]t)"
    r"(?:\s+(?:be|is|equals?(?:\s+to)?))?[\s$*(:]*(?:\\[(\[])?\s*\Z",
    re.IGNORECASE,
)
"""What ends in a denial of the box after it."""
_MINUS = re.compile(
    r"(?:\A|[=:($\[]|\b(?:is|be|equals|to))\s*(?:[-\N{MINUS SIGN}]|\b(?:minus|negative)\b)\s*(?:\$|\\[(\[])?\s*\Z",
    re.IGNORECASE,
)
"""A sign before a box, which is no difference: nothing stands before it."""
_LONGEST_BEFORE = 30


def content(completion: Completion) -> str:
    """The text of a completion, whichever of TRL's two forms it has."""
    if isinstance(completion, str) or not completion:
        return completion or ""
    last = completion[-1].get("content") or ""  # a message that calls a tool has none
    return last if isinstance(last, str) else "".join(part.get("text") or "" for part in last)


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
    r"""The content of the last balanced, non-empty `\boxed{...}`, `\fbox{...}` or `\boxed 5`, or None.

    An escaped brace does not count as one. Takes time linear in the length of the text.
    """
    return next((inside for _, _, inside in _boxes_from_the_end(text)), None)


def boxed_answer(text: str) -> str | None:
    r"""The content of the last box, with those of the boxes that it is joined to, or None.

    `\boxed{1}` and `\boxed{2}` is the answer `1, 2`: a box is joined to the one before it by `and`, `or`, a comma, or
    next to nothing. So a guess in two boxes is a pair, which equals neither of two single answers. A sign before a box
    is the answer's. A box that is denied, "not `\boxed{5}`", counts only where no other one is there, with its "not".
    """
    denied = None
    for start, answer in _joined_boxes(text):
        before = text[max(0, start - _LONGEST_BEFORE) : start]
        if _MINUS.search(before):
            return f"-({answer})" if re.search("[-+,]", answer) else f"-{answer}"
        if not _NEGATED.search(before):
            return answer
        denied = denied or f"{DENIED}{answer}"
    return denied


def _joined_boxes(text: str) -> Iterator[tuple[int, str]]:
    """Start and content of each box with those that it is joined to, the last one first."""
    parts: list[str] = []
    following = len(text)
    for start, end, inside in _boxes_from_the_end(text):
        if parts and not (end <= following and _joined(text, end, following) and len(parts) < _MAX_JOINED):
            yield following, ", ".join(parts)
            parts = []
        following = start
        if inside not in parts:
            parts.insert(0, inside)
    if parts:
        yield following, ", ".join(parts)


def _joined(text: str, end: int, start: int) -> bool:
    return start - end <= 70 and bool(_JOINED.fullmatch(_BETWEEN_FORMULAS.sub(" ", text[end:start]).strip()))


def _boxes_from_the_end(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and content of each balanced box that is not empty, the last one first.

    One at a time: the contents of boxes in boxes are together quadratic in the length of the text.
    """
    boxes = list(_BOX.finditer(text))
    closed = _matching_braces(text, boxes[0].start()) if boxes else {}
    for box in reversed(boxes):
        if box["bare"]:
            yield box.start(), box.end(), box["bare"]
            continue
        end = closed.get(box.end() - 1)
        if end is not None and (inside := text[box.end() : end].strip()):
            yield box.start(), end + 1, inside


def _matching_braces(text: str, start: int) -> dict[int, int]:
    """Position of each balanced `{` from `start` on -> position of its `}`."""
    pairs, opened = {}, []
    for brace in _BRACE.finditer(text, start):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            pairs[opened.pop()] = brace.start()
    return pairs
