"""Correctness in the embedded world."""

import re

from rltoken.tiny.world import FORMATS, THINK_END

_OPENINGS = "|".join(re.escape(" ".join(opening)) for opening in FORMATS if opening)
_SUMMARY = re.compile(rf"\s*(?:(?:{_OPENINGS})\s+)?(\d+)\s*")


def answer(text: str) -> str | None:
    """The final answer of a completion in normal form, or None.

    Args:
        text: A completion, decoded without special tokens.

    Returns:
        The number after the only `</think>`, which may stand in any answer format of the world; None where there is no
        `</think>`, more than one, or anything else after it.
    """
    parts = text.split(THINK_END)
    found = _SUMMARY.fullmatch(parts[1]) if len(parts) == 2 else None
    return str(int(found[1])) if found else None


def accuracy(completions: list, answer: list[str], **_) -> list[float]:
    """1.0 where a completion has exactly one `</think>` and the right answer after it, else 0.0.

    Args:
        completions: As TRL passes them: conversations of one assistant message, or plain strings.
        answer: The gold answers, as many.

    Returns:
        One reward per completion.
    """
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(_extract(text) == gold) for text, gold in zip(texts, answer, strict=True)]


# The gold column must be called `answer`, which hides the function of that name inside `accuracy`.
_extract = answer
