r"""Correctness of a mathematical answer, for training, evaluation and voting.

`rltoken.rewards.extraction` says where the answer stands and `rltoken.rewards.equality` what it is equal to. Here both
are put together, in the processes of `rltoken.rewards.grader`, since an answer may hang or crash sympy. Where both the
answer and the gold answer are bare numbers, no process is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from numbers import Real
from typing import Annotated, Any

from rltoken.errors import UserError
from rltoken.ranges import Range, check
from rltoken.rewards import grader
from rltoken.rewards.equality import DEFAULT, Rules, equal, parses, readable
from rltoken.rewards.extraction import MAX_CHARS, extract
from rltoken.rewards.notation import clean, plain_number
from rltoken.rewards.outcomes import FAILURES, Outcome, log_outcomes
from rltoken.rewards.text import Completion, content

Gold = str | int | float | None | Sequence[str | int | float | None]
"""A gold answer, or several in a list or tuple: an answer is correct if it equals any of them. None, NaN and an empty
text are no gold answer."""

Item = tuple[str | None, tuple[str, ...], Rules]
"""What is judged: the extracted answer or None, the gold answers, and what counts as equal."""


def accuracy(
    completions: Sequence[Completion],
    answer: Sequence[Gold],
    *,
    think_end: str | None = None,
    last_number: bool = False,
    tolerance: Annotated[float | None, Range(least=0, none=True)] = None,
    bare_percent: bool = True,
    strict: bool = True,
    on_failure: Annotated[float | None, Range(none=True)] = 0.0,
    workers: int | None = None,
    seconds: float = 5.0,
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_: object,
) -> list[float | None]:
    """Whether each completion's final answer is mathematically equal to its gold answer, with TRL's signature.

    Args:
        completions: B completions, plain or conversational.
        answer: B gold answers; each may be a list, any of which is right.
        think_end: the marker that must precede an answer (`rltoken.rewards.text.final_part`).
        last_number: take the last formula or number of the final part where no answer is marked as such.
        tolerance: the largest relative difference of two numbers that are still equal (`rltoken.rewards.equality`);
            None for math-verify's six decimal places.
        bare_percent: a percent sign may be missing: a gold answer of `50%` equals `50`, one of `50` equals `50%`, and
            one below one is a share, `0.5` and `50%` (`rltoken.rewards.equality.Rules`). False: `50%` is `0.5` alone.
        strict: names of variables and all sides of an equation count (`rltoken.rewards.equality`).
        on_failure: the reward where the grader timed out or crashed. 0.0, so that a model gains nothing by an answer
            that hangs the grader instead of a wrong one; None leaves the completion out of this reward.
        workers: processes that grade, None for as many as the machine has cores to spare, 0 for none but this one.
        seconds: how long one answer may take.
        log_extra: TRL's; gets the column `outcome`: the name of each completion's, or None.
        log_metric: TRL's; gets the share of each of the six outcomes as `outcome/NAME`, always all of them.

    Returns:
        B values: 1.0 if correct; 0.0 if wrong, unparsable or if there is no answer; `on_failure` if the grader failed;
        None if no gold answer can be graded (TRL then leaves the completion out of this reward).

    Raises:
        ValueError: for a setting that is out of range.
        UserError: for a setting of the pool that is, or a gold answer that is a bool, a dict, or a list in a list.
    """
    settings = {"last_number": last_number, "bare_percent": bare_percent, "strict": strict}
    check(accuracy, settings | {"tolerance": tolerance, "on_failure": on_failure})
    found = outcomes(
        completions,
        answer,
        think_end=think_end,
        last_number=last_number,
        rules=Rules(tolerance, bare_percent, strict),
        workers=workers,
        seconds=seconds,
    )
    log_outcomes(found, log_extra, log_metric)
    return [_reward(outcome, on_failure) for outcome in found]


def outcomes(
    completions: Sequence[Completion],
    answer: Sequence[Gold],
    *,
    think_end: str | None = None,
    last_number: bool = False,
    rules: Rules = DEFAULT,
    workers: int | None = None,
    seconds: float = 5.0,
) -> list[Outcome | None]:
    """What became of each completion; arguments as in `accuracy`. None where no gold answer can be graded."""
    items = [
        (extract(content(text), think_end=think_end, last_number=last_number), _golds(gold), rules)
        for text, gold in zip(completions, answer, strict=True)
    ]
    return _judged(items, workers, seconds)


def judge(item: Item) -> Outcome | None:
    """The outcome of one item, None where no gold answer can be graded. May hang or crash."""
    prediction, golds, rules = item
    golds = tuple(gold for gold in golds if parses(gold))
    if not golds:
        return None
    if prediction is None:
        return Outcome.NO_ANSWER
    if any(equal(prediction, gold, rules) for gold in golds):
        return Outcome.CORRECT
    return Outcome.WRONG if readable(prediction) else Outcome.UNPARSABLE


def gradable(golds: Sequence[Gold], *, workers: int | None = None, seconds: float = 5.0) -> list[bool]:
    """Whether each gold answer, or any of several, can be graded: `rltoken.rewards.equality.parses`, in the pool.

    Args:
        golds: N gold answers.
        workers: as in `accuracy`.
        seconds: as in `accuracy`; what takes longer cannot be graded.
    """
    items = [(None, _golds(gold), DEFAULT) for gold in golds]
    return [outcome == Outcome.NO_ANSWER for outcome in _judged(items, workers, seconds)]


def classes(
    completions: Sequence[Completion],
    group: Sequence[int],
    *,
    think_end: str | None = None,
    last_number: bool = False,
    workers: int | None = None,
    seconds: float = 5.0,
) -> list[int]:
    """Number the different final answers of each group: two completions that agree have the same number.

    An answer belongs to the first class whose first answer it equals, taken either way round. What the grader fails on
    is a class of its own by its text.

    Args:
        completions: B completions, plain or conversational.
        group: B numbers of the groups.
        think_end: as in `accuracy`.
        last_number: as in `accuracy`.
        workers: as in `accuracy`.
        seconds: how long one comparison may take.

    Returns:
        B numbers, from 0 in order of appearance in the group; -1 where there is no answer.
    """
    found = [extract(content(text), think_end=think_end, last_number=last_number) for text in completions]
    keys = [None if text is None else (number, _key(text)) for text, number in zip(found, group, strict=True)]
    known = [key for key in dict.fromkeys(keys) if key is not None]
    alone = _failing([text for _, text in known], workers, seconds)
    waiting = {number: [text for other, text in known if other == number] for number in dict.fromkeys(group)}
    numbers: dict[tuple[int, str], int] = {}
    for number in range(max(map(len, waiting.values()), default=0)):
        # One class of every group at a time, that of its first answer which is in none yet.
        pairs = [(texts[0], text) for texts in waiting.values() for text in texts[1:] if not alone & {texts[0], text}]
        same = set(_agreeing(pairs, workers, seconds))
        for name, texts in waiting.items():
            joined = [text for text in texts if text == texts[0] or (texts[0], text) in same]
            numbers |= {(name, text): number for text in joined}
            waiting[name] = [text for text in texts if text not in joined]
    return [-1 if key is None else numbers[key] for key in keys]


def warm_up() -> None:
    """What a worker does once before its first item: the parser's first use takes longer than most items."""
    equal("x", "y")


def agree(pair: tuple[str, str]) -> bool:
    """Whether two answers are equal, taken either way round. May hang or crash."""
    return equal(*pair) or equal(*reversed(pair))


def _judged(items: Sequence[Item], workers: int | None, seconds: float) -> list[Outcome | None]:
    known = [_obvious(item) for item in items]
    results = iter(
        _mapped(judge, [item for item, outcome in zip(items, known, strict=True) if outcome is None], workers, seconds)
    )
    return [outcome or next(results) for outcome in known]


def _mapped(function: Callable[[Any], Any], items: Sequence[Any], workers: int | None, seconds: float) -> list[Any]:
    """The values of a function, an `Outcome` of `FAILURES` where there is none."""
    grader.check(workers=workers, seconds=seconds)
    if not items:
        return []
    results = grader.shared(workers=workers, seconds=seconds).map(function, items, cache=True)
    return [Outcome(result.failure) if result.failure else result.value for result in results]


def _obvious(item: Item) -> Outcome | None:
    """The outcome where all gold answers are bare numbers, and so is the prediction; None where it takes more."""
    prediction, golds, rules = item
    values = [_number(gold) for gold in golds]
    if not values or None in values:
        return None
    if prediction is None:
        return Outcome.NO_ANSWER
    number = _number(prediction)
    if number in values:
        return Outcome.CORRECT
    whole = number is not None and all(value.denominator == 1 for value in (number, *values))
    return Outcome.WRONG if whole and rules.tolerance is None else None


def _failing(texts: Sequence[str], workers: int | None, seconds: float) -> set[str]:
    """The answers which the grader fails on already beside a bare number."""
    texts = [text for text in texts if _number(text) is None]
    found = _mapped(agree, [(text, "1") for text in texts], workers, seconds)
    return {text for text, outcome in zip(texts, found, strict=True) if outcome in FAILURES}


def _agreeing(pairs: Sequence[tuple[str, str]], workers: int | None, seconds: float) -> list[tuple[str, str]]:
    """The pairs that are equal; two different whole numbers are not."""
    pairs = [pair for pair in pairs if not all(_whole(text) for text in pair)]
    return [pair for pair, same in zip(pairs, _mapped(agree, pairs, workers, seconds), strict=True) if same is True]


def _reward(outcome: Outcome | None, on_failure: float | None) -> float | None:
    if outcome in FAILURES:
        return on_failure
    return None if outcome is None else float(outcome == Outcome.CORRECT)


def _key(text: str) -> str:
    number = _number(text)
    return clean(text) if number is None else str(number)


def _whole(text: str) -> bool:
    number = _number(text)
    return number is not None and number.denominator == 1


@lru_cache(maxsize=8192)
def _number(text: str) -> Fraction | None:
    digits = plain_number(clean(text)) if len(text) <= MAX_CHARS else None
    return None if digits is None else Fraction(digits)


def _golds(gold: Gold) -> tuple[str, ...]:
    if isinstance(gold, str):
        return (gold,)
    golds = gold if isinstance(gold, list | tuple) else [gold]
    for each in golds:
        if each is not None and (isinstance(each, bool) or not isinstance(each, str | Real)):
            raise UserError(f"answer: a gold answer is a text, a number or a list of these, and not {each!r:.80}.")
    return tuple(str(each) for each in golds if each is not None and not (isinstance(each, Real) and math.isnan(each)))
