"""Correctness in the embedded world."""

import re

from rltoken.rewards.outcomes import Outcome, log_outcomes
from rltoken.rewards.text import content
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


def accuracy(
    completions: list, answer: list[str | None], *, log_extra=None, log_metric=None, **_
) -> list[float | None]:
    """1.0 where a completion has exactly one `</think>` and the right answer after it, else 0.0; None without gold.

    Args:
        completions: As TRL passes them: conversations of one assistant message, or plain strings.
        answer: The gold answers, as many; None where there is none.
        log_extra, log_metric: TRL's; they get the outcomes as `rltoken.rewards.math.accuracy` logs them.

    Returns:
        One reward per completion.
    """
    outcomes = [_outcome(content(text), gold) for text, gold in zip(completions, answer, strict=True)]
    log_outcomes(outcomes, log_extra, log_metric)
    return [None if outcome is None else float(outcome == Outcome.CORRECT) for outcome in outcomes]


def classes(completions: list, group: list[int]) -> list[int]:
    """Number the different answers of each group from 0 in order of appearance; -1 where there is none."""
    seen: dict[int, dict[str, int]] = {}
    found = [
        (seen.setdefault(number, {}), answer(content(text))) for text, number in zip(completions, group, strict=True)
    ]
    return [-1 if text is None else known.setdefault(text, len(known)) for known, text in found]


def _outcome(text: str, gold: str | None) -> Outcome | None:
    if gold is None:
        return None
    found = answer(text)
    if found is None:
        return Outcome.NO_ANSWER
    return Outcome.CORRECT if found == gold else Outcome.WRONG
