"""What became of grading one completion; a wrong answer and a broken grader never look alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum


class Outcome(StrEnum):
    """Every graded completion has exactly one of these."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"  # nothing is marked as an answer, or the thinking never ended
    UNPARSABLE = "unparsable"  # there is an answer, which no parser can read and which is not the text of the gold one
    TIMED_OUT = "timed_out"
    CRASHED = "crashed"  # the grader raised, ran out of memory, or its process died


FAILURES = frozenset({Outcome.TIMED_OUT, Outcome.CRASHED})
"""The grader's failures: they say nothing about the answer."""


def shares(outcomes: Iterable[Outcome | None]) -> dict[Outcome, float]:
    """The share of each outcome, all six of them, among those that are not None; zeros where there are none."""
    found = Counter(outcome for outcome in outcomes if outcome is not None)
    return {outcome: found[outcome] / max(1, found.total()) for outcome in Outcome}


def log_outcomes(
    outcomes: Sequence[Outcome | None],
    log_extra: Callable[[str, list], None] | None,
    log_metric: Callable[[str, float], None] | None,
) -> None:
    """Log outcomes as TRL lets reward functions log: a column `outcome`, and each one's share as `outcome/NAME`.

    Args:
        outcomes: B of them, None where there was nothing to grade against.
        log_extra, log_metric: what TRL handed to the reward function; None where nobody logs.
    """
    if log_extra:
        log_extra("outcome", [outcome and outcome.value for outcome in outcomes])
    if log_metric:
        for outcome, share in shares(outcomes).items():
            log_metric(f"outcome/{outcome}", share)
