r"""Units of measure, so that `3 km` equals `3000 m` and not `3 m`.

Only the units of this table are told apart. Any other word after a number is taken off (`5 apples` equals `5`), and an
answer without a unit equals one with any.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from rltoken.rewards.notation import letters, measured

_INCH, _POUND = Fraction(254, 10_000), Fraction(45_359_237, 10**8)
_TABLE = {
    "length": {
        "mm millimeter millimetre": Fraction(1, 1000),
        "cm centimeter centimetre": Fraction(1, 100),
        "m meter metre": Fraction(1),
        "km kilometer kilometre": Fraction(1000),
        "in inch inches": _INCH,
        "ft foot feet": 12 * _INCH,
        "yd yard": 36 * _INCH,
        "mi mile": 63_360 * _INCH,
    },
    "mass": {
        "mg milligram": Fraction(1, 1000),
        "g gram": Fraction(1),
        "kg kilogram": Fraction(1000),
        "oz ounce": 1000 * _POUND / 16,
        # Of money or of weight: either way they are no dollars.
        "lb pound": 1000 * _POUND,
    },
    "time": {
        "s sec second": Fraction(1),
        "min minute": Fraction(60),
        "h hr hour": Fraction(3600),
        "day": Fraction(86_400),
        "week": Fraction(604_800),
    },
    "calendar": {"month": Fraction(1), "year": Fraction(12)},
    "money": {"$ dollar": Fraction(1), "cent": Fraction(1, 100)},
    **{name: {name: Fraction(1)} for name in ("euro", "yen", "celsius", "fahrenheit", "kelvin")},
}
_UNITS = {
    name: (kind, size) for kind, sizes in _TABLE.items() for names, size in sizes.items() for name in names.split()
}
_LITRES = dict.fromkeys(("l", "liter", "litre"), Fraction(1, 1000)) | dict.fromkeys(
    ("ml", "milliliter", "millilitre"), Fraction(1, 10**6)
)
_PER = re.compile(r"/|\bper\b")
_FACTOR = re.compile(r"(?:(square|sq|cubic|cu)\.? )?([a-z$]+)\.?(?: ?\^ ?(-?\d))?")
_SUM = re.compile(r"(\d+(?:\.\d+)?) ?([a-z]+),? (?:and )?(\d+(?:\.\d+)?) ?([a-z]+)", re.ASCII)
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


class Unit(NamedTuple):
    """A unit of the table, or a quotient of two: what it measures, and its size in units of the first kind's base."""

    dimension: tuple[tuple[str, int], ...]
    size: Fraction


def unit(text: str) -> Unit | None:
    """The unit that a clean answer ends with, or the dollar sign that it begins with; None where it is not known."""
    written = measured(text)
    if not written:
        return None
    powers: dict[str, int] = {}
    size = Fraction(1)
    for place, part in enumerate(_PER.split(written.replace("mph", "mi/h"))):
        factor = _factor(part.strip())
        if factor is None:
            return None
        kind, power, each = factor
        sign = -1 if place else 1
        powers[kind] = powers.get(kind, 0) + sign * power
        size *= each**sign
    return Unit(tuple(sorted((kind, power) for kind, power in powers.items() if power)), size)


def in_one_unit(text: str) -> str:
    """A measure in two units, `1 hour 30 minutes`, in the smaller one; any other answer as it is."""
    found = _SUM.fullmatch(letters(text))
    units = [unit(f"{found[place]} {found[place + 1]}") for place in (1, 3)] if found else [None]
    if None in units or units[0].dimension != units[1].dimension or units[0].size <= units[1].size:
        return text
    return f"{Fraction(found[1]) * units[0].size / units[1].size + Fraction(found[3])} {found[4]}"


def _factor(text: str) -> tuple[str, int, Fraction] | None:
    """Kind, power and size of one unit with its power: `cm^2`, `square feet`, `ml`."""
    found = _FACTOR.fullmatch(text)
    if not found:
        return None
    power = int(found[3] or _POWERS.get(found[1], 1))
    for name in (found[2], found[2].removesuffix("s")):
        if name in _LITRES:
            return "length", 3 * power, _LITRES[name] ** power
        if name in _UNITS:
            kind, size = _UNITS[name]
            return kind, power, size**power
    return None
