r"""Correctness of a mathematical answer, decided by math-verify.

Where the answer stands: after the end of thinking, in the last balanced `\boxed{...}`; else after `####` or an answer
header ("The answer is ...", "Answer: ..."); else, only when `last_number` asks for it, the last number of the text.

What keeps an answer from stalling the grader: expressions that sympy could blow up (towers of powers, huge exponents
and factorials, deep nesting, great length) are judged by their syntax and never reach it; besides, math-verify's own
time limit of 5 s works in the main thread. It cannot interrupt C code and is off in other threads, so a hostile
expression that passes the syntactic bounds may still stall the grader: nothing here runs in a process of its own that
could be killed.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException
from math_verify.utils import timeout

from rltoken.rewards.text import Completion, content, final_part, last_box

MAX_CHARS = 500
"""The longest answer that is parsed; the longest gold answer of MATH, AIME and OlympiadBench has 204 characters."""
MAX_NESTING = 16
MAX_EXPONENT = 9999
"""The largest literal in an exponent or before a factorial sign, and the largest product of such literals."""
SECONDS = 5

# With units taken off first (`5 \text{ cm}`), then as they stand: math-verify takes the c of `a + b + c` for a unit.
_WITH_UNITS = (LatexExtractionConfig(), ExprExtractionConfig())
_AS_WRITTEN = (
    LatexExtractionConfig(normalization_config=replace(LatexExtractionConfig().normalization_config, units=False)),
)
_HEADER = re.compile(r"(?:####|\banswer\s*(?:is\b|:))[:*_\s]*", re.IGNORECASE)
_FORMULA = re.compile(r"(?<!\\)\$\$?(?P<dollar>.+?)(?<!\\)\$|\\\((?P<inline>.+?)\\\)|\\\[(?P<display>.+?)\\\]")
_NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)")
_NUMBER_WITH_UNIT = re.compile(rf"[$€£]?(?P<number>{_NUMBER.pattern})[ ](?!and|or|sqrt|times|plus|minus)[A-Za-z]{{3,}}")
_PLAIN_NUMBER = re.compile(r"\\?\$?\s*(-?)\\?\$?\s*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
_TEXT_COMMAND = re.compile(r"\\(?:text\w*|mbox|math(?:rm|bf|it|sf)|operatorname|begin|end)\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORDS = re.compile(r"[A-Za-z]{3,}")
_THOUSANDS = re.compile(r"(?<=\d)(?:,\\!|\{,\})\s*(?=\d{3})")
_SPACING = re.compile(r"(?<!\\)\\[!,;: ]|\\q?quad\b|~")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))

for _name in ("math_verify.parser", "math_verify.grader"):
    # They warn once that a time limit is off, which is deliberate here, and per answer that one was met.
    logging.getLogger(_name).setLevel(logging.ERROR)


def accuracy(
    completions: Sequence[Completion],
    answer: Sequence[str],
    *,
    think_end: str | None = None,
    last_number: bool = False,
    **_: object,
) -> list[float | None]:
    """Whether each completion's final answer is mathematically equal to its gold answer.

    Args:
        completions: B completions, plain or conversational.
        answer: B gold answers.
        think_end: the marker that must precede an answer (`rltoken.rewards.text.final_part`).
        last_number: take the last number of the final part where no answer is marked as such.

    Returns:
        B values: 1.0 if equal, 0.0 if not or if there is no answer, None if the gold answer cannot be graded (TRL then
        leaves the completion out of this reward).
    """
    return [
        (float(correct(content(text), gold, think_end=think_end, last_number=last_number)) if parses(gold) else None)
        for text, gold in zip(completions, answer, strict=True)
    ]


def answer(text: str, *, think_end: str | None = None, last_number: bool = False) -> str | None:
    r"""The final answer of a completion in a normal form: equal strings are equal answers.

    Args:
        text: a whole completion.
        think_end: as in `accuracy`.
        last_number: as in `accuracy`.

    Returns:
        For an expression that can be parsed its value as a string (`1/2` for `0.5` and `\frac{1}{2}`), otherwise the
        answer as written, without its wrapping, in lower case; None where there is no answer. Two different normal
        forms may still be equal to math-verify (`(x+1)^2` and `x^2+2x+1`).
    """
    found = extract(text, think_end=think_end, last_number=last_number)
    return None if found is None else _normal_form(found)


def correct(text: str, gold: str, *, think_end: str | None = None, last_number: bool = False) -> bool:
    """Whether the final answer of the completion `text` equals `gold`; arguments as in `accuracy`."""
    found = extract(text, think_end=think_end, last_number=last_number)
    return found is not None and equal(found, gold)


def extract(text: str, *, think_end: str | None = None, last_number: bool = False) -> str | None:
    """The final answer of a completion as written, or None; arguments as in `accuracy`.

    What is longer than `MAX_CHARS` is no answer.
    """
    part = final_part(text, think_end)
    found = None if part is None else _marked(part, last_number)
    return found if found is not None and len(found) <= MAX_CHARS else None


def parses(gold: str) -> bool:
    """Whether a gold answer can be graded.

    That is: math-verify reads an expression, or the answer is a word or two of text. Prose (three words or more outside
    LaTeX's text commands) is no answer, although math-verify would read it as a product of its letters.
    """
    gold = _clean(gold)
    if not gold or len(gold) > MAX_CHARS or len(_WORDS.findall(_COMMAND.sub(" ", _TEXT_COMMAND.sub(" ", gold)))) > 2:
        return False
    return bool(_PLAIN_NUMBER.fullmatch(gold)) or _word(gold) is not None or _expression(gold) is not None


@lru_cache(maxsize=65536)
def equal(prediction: str, gold: str) -> bool:
    """Whether two answers, as extracted, are equal.

    Two plain words are compared as text, since math-verify takes unmarked words for products of letters; everything
    else is math-verify's decision. The order matters to it: the gold answer decides how `x = 5` is read.
    """
    prediction, gold = _clean(prediction), _clean(gold)
    if not prediction or not gold:
        return False
    if prediction == gold:
        return True
    words = _word(prediction), _word(gold)
    if None not in words:
        return words[0] == words[1]
    parsed, parsed_gold = _expression(prediction), _expression(gold)
    if parsed is None or parsed_gold is None:
        return False
    try:
        return verify(parsed_gold, parsed, timeout_seconds=_seconds())
    except TimeoutException:
        return False


def hard(expression: str) -> bool:
    """Whether an expression is refused by its syntax, because evaluating it might never end."""
    if len(expression) > MAX_CHARS or _nesting(expression) > MAX_NESTING:
        return True
    text = re.sub(r"\s+|\\(?:left|right|,|!|;|:)", "", expression).replace("**", "^")
    if re.search(r"\d{5,}[)\]}]*!(?!=)|![)\]}]*!|\\binom\{?\d{5,}", text):
        return True
    largest = chained = 1
    for base_end, exponent in _exponents(text):
        # A tower may stand on a letter, as in e^{-x^2}, since sympy keeps that as it is.
        if re.search(r"[\d)\]}]\^|!", exponent):
            return True
        power = max([1, *map(int, re.findall(r"\d+", exponent))])
        # The exponents of nested groups, ((9^a)^b)^c, multiply; those of the terms of a polynomial do not.
        if base_end in ")]}":
            chained *= power
        largest = max(largest, power)
    return largest * chained > MAX_EXPONENT


def _marked(part: str, last_number: bool) -> str | None:
    """The answer that is marked as one, by a box before a header; else the last number, where that is wanted."""
    if (boxed := last_box(part)) is not None:
        return boxed
    if headers := list(_HEADER.finditer(part)):
        return _after_header(part[headers[-1].end() :].partition("\n")[0])
    numbers = _NUMBER.findall(part) if last_number else []
    return numbers[-1] if numbers else None


def _after_header(line: str) -> str | None:
    """The answer in what follows an answer header: a leading formula, a leading number with a unit, else the line."""
    if formula := _FORMULA.match(line):
        return next(filter(None, formula.groups())).strip()
    if number := _NUMBER_WITH_UNIT.match(line):
        return number["number"]
    return line.strip(" \t*_").rstrip(".") or None


def _clean(text: str) -> str:
    """The answer without what wraps it: white space, math delimiters, bold marks, a full stop."""
    text = text.strip()
    while True:
        before = text
        for opened, closed in _WRAPPERS:
            inside = text[len(opened) : -len(closed)]
            if text.startswith(opened) and text.endswith(closed) and inside and closed not in inside:
                text = inside.strip()
        text = text.rstrip(".,;").strip()
        if text == before:
            return text


def _word(text: str) -> str | None:
    r"""The lower-case text of `\text{...}` or of a plain word of at least four letters, else None."""
    inside = _TEXT_COMMAND.fullmatch(text)
    plain = (inside[1] if inside else text).strip(" ()")
    if inside or re.fullmatch(r"[A-Za-z]{4,}", plain):
        return " ".join(plain.casefold().split()) or None
    return None


@lru_cache(maxsize=8192)
def _expression(text: str) -> sympy.Basic | sympy.MatrixBase | None:
    """What math-verify reads in an answer, or None if it reads nothing, or is not given it because it is `hard`."""
    if hard(text):
        return None
    try:
        # Several formulas, as in `$1$ and $2$`, already bring their delimiters.
        source = text if re.search(r"(?<!\\)\$", text) else f"${_SPACING.sub('', _THOUSANDS.sub('', text))}$"
        readings = (parse(source, targets, parsing_timeout=_seconds()) for targets in (_WITH_UNITS, _AS_WRITTEN))
        return next((reading[0] for reading in readings if reading and not isinstance(reading[0], str)), None)
    except (TimeoutException, RecursionError):
        return None


@lru_cache(maxsize=65536)
def _normal_form(text: str) -> str | None:
    text = _clean(text)
    if number := _PLAIN_NUMBER.fullmatch(text):
        return str(sympy.Rational(number[1] + number[2].replace(",", "")))
    if (word := _word(text)) is not None:
        return word
    expression = _expression(text)
    if expression is None:
        return text.casefold() or None
    constant = isinstance(expression, sympy.Expr) and not expression.free_symbols
    try:
        return str(timeout(_seconds())(expression.doit)() if constant else expression)
    except (Exception, TimeoutException):  # sympy raises whatever its parts raise; the answer is known by its text then
        return text.casefold()


def _seconds() -> int | None:
    """math-verify limits its time by a signal, which only the main thread can receive."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _exponents(text: str) -> list[tuple[str, str]]:
    """For each `^` the character before it and what stands behind it, a bracketed group or a single factor."""
    exponents = []
    for sign in re.finditer(r"\^", text):
        start = end = sign.end()
        depth = 0
        while end < len(text):
            depth += (text[end] in "([{") - (text[end] in ")]}")
            end += 1
            if depth <= 0 and not re.match(r"[\w.^]", text[end : end + 1]):
                break
        exponents.append((text[max(0, sign.start() - 1) : sign.start()], text[start:end]))
    return exponents
