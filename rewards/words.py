"""Words in answers: numbers, signs, and what is no unit of the number before it.

One list serves whoever asks what follows a number: `rltoken.rewards.notation` takes units off, and
`rltoken.rewards.extraction` decides whether an answer goes on behind its first number.
"""

from __future__ import annotations

import re
from fractions import Fraction

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SPELLED = dict(zip(_ONES + _TEENS, range(20), strict=True)) | dict(zip(_TENS, range(20, 100, 10), strict=True))
_LONGEST_SPELLED = 40

_MULTIPLES = {"ten": 10, "dozen": 12, "score": 20, "hundred": 100, "gross": 144, "thousand": 10**3, "lakh": 10**5}
_MULTIPLES |= {"million": 10**6, "crore": 10**7, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8}
_PARTS |= {"ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12, "sixteenth": 16, "twentieth": 20}
_PARTS |= {"thirtieth": 30, "sixtieth": 60, "hundredth": 100, "thousandth": 1000, "millionth": 10**6}
_SEVERAL = {name: name.replace("half", "halve") + "s" for name in (*_MULTIPLES, *_PARTS)}
_ONE_PART = {name: Fraction(1, size) for name, size in _PARTS.items()}
_SIZES = {name: Fraction(size) for name, size in (_MULTIPLES | _ONE_PART).items()}
SIZES = _SIZES | {_SEVERAL[name]: size for name, size in _SIZES.items()}
"""Word -> what it multiplies the number before it with: `dozen`, `dozens`, `third`, `thirds`."""
FACTORS = {name: size for name, size in SIZES.items() if name not in _PARTS}
"""Those that make a product with digits before them: not `5 half`, which may mean five and a half."""

SIGN = r"(?:minus|negative)\b"
# "5 more apples" and "5 feet below the lake" are plain counts; "5 more than x" and "5 below zero" are not. "Squared"
# belongs to the unit in "5 feet squared".
CHANGING = (
    rf"(?:{'|'.join(sorted(SIZES, key=len, reverse=True))}|or|nor|plus|{SIGN}|times|multiplied|divided|mod|modulo|"
    r"choose|remainder|base|point|root|sqrt|sin|cos|tan|log|exp|pi|factorial|doubled|tripled|halved|reciprocal|wrong|"
    r"at\s+(?:most|least)|to\s+the\s+(?:\w+\s+)?power|(?<![A-Za-z]\s)(?:squared|cubed)|"
    r"(?:less|more|fewer|greater|below)(?!\s+(?!(?:than|zero)\b)[A-Za-z]))\b"
)
"""A pattern of the words that change the number before them, or offer another one."""
NO_UNIT = rf"(?:{CHANGING}|(?:and|not|no|but|over|if|to|than|between|rather)\b)"
"""A pattern of the words that are in no unit: those above, and those that go on with the sentence."""
# "One" is mostly a pronoun: "5 dollars for each one".
NUMBER = rf"(?:\d|\b(?:{'|'.join(name for name in _SPELLED if name != 'one')}|(?:and|of|to)\s+one)\b)"
"""A pattern of the beginning of a number, in digits or words."""


def in_digits(text: str) -> str:
    """A number in words in digits, `five`, `two thirds` (`2/3`), `minus a dozen`; any other text as it is."""
    if len(text) > _LONGEST_SPELLED:
        return text
    phrase = " ".join(text.casefold().replace("-", " ").split())
    sign = re.match(SIGN, phrase)
    value = _value(phrase[sign.end() :].strip() if sign else phrase)
    return text if value is None else str(-value if sign else value)


def _value(phrase: str) -> Fraction | None:
    count, _, size = phrase.rpartition(" ")
    if size not in SIZES or size == "ten":  # which is a number by itself
        return _below_hundred(phrase)
    number = Fraction(1) if count in ("a", "an") else _below_hundred(count)
    if size == "half" and not count:
        number = Fraction(1)
    # "Third" and "twenty-third" are no parts.
    if number is None or (size in _PARTS and number != 1):
        return None
    return number * SIZES[size]


def _below_hundred(phrase: str) -> Fraction | None:
    tens, _, ones = phrase.partition(" ")
    if not ones:
        return Fraction(_SPELLED[tens]) if tens in _SPELLED else None
    if tens in _TENS and 0 < _SPELLED.get(ones, 0) < 10:
        return Fraction(_SPELLED[tens] + _SPELLED[ones])
    return None
