r"""What is refused by its syntax, because grading it would certainly take too long.

Grading runs in processes that are killed after some seconds, so this is no defence: it spares those seconds where the
end is certain. Measured on one busy core, math-verify 0.9 against 7 and against x + sqrt(2): 10^{100000}, 100000! and
2^{2^{20}} take 0.2 to 0.5 s, 10^{1000000} 0.7 s, \binom{100000}{50000} 1.8 s, 10^{10000000} and 1000000! 13 s;
3^{3^{3^3}}, 9^{99999999}, 10000000!, 100!! and \binom{1000000}{500000} do not end in 20 s. Powers of variables of any
exponent cost nothing. Parsing 16 brackets in brackets takes 2 s, 32 take 7 s.
"""

from __future__ import annotations

import re
from math import factorial, inf, log10

from rltoken.rewards.extraction import MAX_CHARS

MAX_DIGITS = 500_000
"""Digits of the largest power that is computed; a factor of two below what takes a second."""
MAX_FACTORIAL = 100_000
"""The largest number before a factorial sign, or on top of a binomial coefficient."""
MAX_NESTING = 16

_SPACING = re.compile(r"\s+|\\(?:left|right|,|!|;|:)")
_SCIENTIFIC = re.compile(r"(?<=\d)[eE][+-]?(\d+)")
_FACTORIAL = re.compile(r"(\d+)((?:[)\]}]*!)+)(?!=)")
_BINOMIAL = re.compile(r"\\[dt]?binom\{?(\d+)|(\d+)\}?\\choose")
_TOWER = re.compile(r"\d+(?:\^[({]*\d+)*")


def hard(expression: str) -> bool:
    """Whether an expression is refused: too long, too deep, or with a power or a factorial of too many digits."""
    if len(expression) > MAX_CHARS or _nesting(expression) > MAX_NESTING:
        return True
    text = _SCIENTIFIC.sub(r"\\cdot10^{\1}", _SPACING.sub("", expression).replace("**", "^"))
    if any(int(top or other) > MAX_FACTORIAL for top, other in _BINOMIAL.findall(text)):
        return True
    if any(_factorial(int(number), signs.count("!")) == inf for number, signs in _FACTORIAL.findall(text)):
        return True
    return _digits(text) > MAX_DIGITS


def _factorial(number: int, signs: int) -> float:
    """An upper bound of the factorial of the factorial ... of a number, inf where it is not to be computed."""
    for _ in range(signs - 1):
        number = factorial(number) if number < 9 else MAX_FACTORIAL + 1
    return inf if number > MAX_FACTORIAL else number**number


def _digits(text: str) -> float:
    """An upper bound of the digits of the largest number in an expression, where that is a power of numbers."""
    largest = float(max(map(len, re.findall(r"\d+", text)), default=1))
    for base, exponent in _powers(text):
        largest = max(largest, _digits(base) * _size(exponent))
    return largest


def _size(exponent: str) -> float:
    """An upper bound of an exponent's value, variables counted as 1; inf where it is beyond all bounds."""
    if re.search(r"[)\]}]\^", exponent) and not re.search(r"[A-Za-z]", exponent):
        return inf
    product = 1.0
    for tower in _TOWER.findall(_FACTORIAL.sub(lambda found: str(_factorial_value(*found.groups())), exponent)):
        product *= max(1.0, _tower([int(number) for number in re.findall(r"\d+", tower)]))
    return product


def _factorial_value(number: str, signs: str) -> int:
    return factorial(int(number)) if int(number) < 9 and signs.count("!") == 1 else MAX_DIGITS + 1


def _tower(numbers: list[int]) -> float:
    value = float(numbers[-1])
    for base in reversed(numbers[:-1]):
        value = inf if value * log10(max(base, 1)) > 300 else float(base) ** value
    return value


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _powers(text: str) -> list[tuple[str, str]]:
    """Base and exponent of each power of a number or a group; each is a number, a group or a run of factors."""
    powers = []
    for sign in re.finditer(r"(\d+|[)\]}])\^", text):
        start = end = sign.end()
        depth = 0
        while end < len(text):
            depth += (text[end] in "([{") - (text[end] in ")]}")
            end += 1
            if depth <= 0 and not re.match(r"[\w.^]", text[end : end + 1]):
                break
        powers.append((sign[1] if sign[1].isdigit() else _last_group(text[: sign.end(1)]), text[start:end]))
    return powers


def _last_group(text: str) -> str:
    """The inside of the group that a text ends with."""
    depth = 0
    for position in range(len(text) - 1, -1, -1):
        depth += (text[position] in ")]}") - (text[position] in "([{")
        if depth == 0:
            return text[position + 1 : -1]
    return text[:-1]
