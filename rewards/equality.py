r"""Whether two answers are equal, decided by math-verify.

What it is not asked: bare numbers, words, option letters, numbers in a base and times, which it misreads; and what
`rltoken.rewards.limits.hard` refuses. Its own time limits are off, since they need the main thread and cannot interrupt
C code: what a model wrote is compared in a process that can be killed, `rltoken.rewards.grader`.

Units are taken off before the comparison (`5 cm` equals `5`), as math-verify does it, unless both answers have a known
one: `3 km` equals `3000 m`, and not `3 m`.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.relational import Relational

from rltoken.rewards import notation
from rltoken.rewards.extraction import MAX_CHARS
from rltoken.rewards.limits import hard
from rltoken.rewards.units import Unit, in_one_unit, unit

_TARGETS = (
    LatexExtractionConfig(normalization_config=replace(LatexExtractionConfig().normalization_config, units=False)),
)
_COMMAND = re.compile(r"\\(?:text\w*|mbox|math(?:rm|bf|it|sf)|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_SPACING = re.compile(r"(?:\s|\\(?:left|right)(?![A-Za-z])|\\[,!;: ])+")
_NEEDLESS_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_TUPLE = re.compile(r"(?:\\left)?\([^()]*\)")
_SET = re.compile(r"(?:\\left)?\\\{(?!.*\\(?:mid|[lg]eq?)(?![A-Za-z]))[^()<>:|]*\\\}")
"""A set whose elements are listed."""
_OTHER_RELATION = re.compile(r"[<>]|!=|\b(?:or|and)\b|\\(?:[lg]e|ne|[lg]eq|neq|equiv|in|approx|begin)(?![A-Za-z])")
_WORDS = re.compile(r"(?!(?:and|sqrt|sin|cos|tan|log|exp)\b)[A-Za-z]{3,}")

Expression = sympy.Basic | sympy.MatrixBase
Pair = tuple[Expression | None, Expression | None]


@dataclass(frozen=True)
class Rules:
    """What counts as equal, besides what is.

    Args:
        tolerance: the largest relative difference of two numbers that are still equal, also inside tuples, intervals
            and matrices; None for math-verify's six decimal places.
        bare_percent: a percent sign may be missing. A gold answer of `50%` then equals `50`, and not `0.5`; a bare one
            equals its percentage, `50` and `50%`, but if it is below one it is a share, `0.5` and `50%`. Otherwise
            `50%` is `0.5` alone, on both sides.
        strict: variables are told apart by their names, and all sides of an equation count; otherwise `f(x)` equals
            `f(y)`, and `2x = 5` equals `5`.
    """

    tolerance: float | None = None
    bare_percent: bool = True
    strict: bool = True


DEFAULT = Rules()

for _name in ("math_verify.parser", "math_verify.grader"):
    # They warn once that a time limit is off, which is deliberate here.
    logging.getLogger(_name).setLevel(logging.ERROR)


def equal(prediction: str, gold: str, rules: Rules = DEFAULT) -> bool:
    """Whether two answers, as extracted, are equal. May hang or crash on what a model wrote.

    The order matters to math-verify: the gold answer decides how `x = 5` is read.

    Args:
        prediction: an answer, not empty.
        gold: the answer it should be.
        rules: what counts as equal.

    Raises:
        Exception: whatever sympy raises.
    """
    prediction, gold = notation.clean(prediction), notation.clean(gold)
    if not prediction or not gold:
        return False
    if _same_text(prediction, gold):
        return True
    if len(prediction) > MAX_CHARS or len(gold) > MAX_CHARS:
        return False
    decided = _without_algebra(prediction, gold)
    if decided is not None:
        return decided
    prediction, gold = in_one_unit(prediction), in_one_unit(gold)
    sides = _sides(prediction, gold) if rules.strict else [prediction]
    return all(_equal_values(side, gold, rules) for side in sides)


def readable(answer: str) -> bool:
    """Whether an answer can be compared with another one by more than its text."""
    answer = notation.clean(answer)
    if not 0 < len(answer) <= MAX_CHARS:
        return False
    known = (notation.plain_number, notation.word, notation.only_option, notation.in_base, notation.time_of_day)
    if any(read(answer) is not None for read in known):
        return True
    return _value(notation.without_degrees(notation.without_percent(answer))) is not None


def parses(gold: str) -> bool:
    """Whether a gold answer can be graded. May hang or crash on what it is given.

    That is: it is readable, and no prose. More than three words outside LaTeX's text commands are prose.
    """
    return readable(gold) and not (notation.word(notation.clean(gold)) and _is_prose(gold))


def _is_prose(text: str) -> bool:
    return len(_WORDS.findall(_COMMAND.sub(" ", text))) > 3


def _same_text(prediction: str, gold: str) -> bool:
    return _packed(prediction) == _packed(gold)


def _packed(text: str) -> str:
    """A text without spaces, but one between two digits: `2 3` is not `23`."""
    return _NEEDLESS_SPACE.sub("", _SPACING.sub(" ", text).strip())


def _sides(prediction: str, gold: str) -> list[str]:
    """Each side of an equation that has to equal a gold answer which is none; else the prediction as it stands."""
    one_equation = "=" in prediction and not _OTHER_RELATION.search(prediction) and "," not in prediction
    return notation.sides(prediction) if one_equation and len(notation.all_sides(gold)) == 1 else [prediction]


def _without_algebra(prediction: str, gold: str) -> bool | None:
    """The verdict on what is compared as text or digits, None where math-verify is to decide."""
    (*here, moduli), (*there, gold_moduli) = notation.marks(prediction), notation.marks(gold)
    if here != there or (moduli and gold_moduli and moduli != gold_moduli):
        return False
    if (letter := notation.only_option(gold)) and (chosen := notation.option(prediction)):
        return chosen == letter
    if (letter := notation.only_option(prediction)) and (chosen := notation.option(gold)):
        return chosen == letter
    letters = notation.options(prediction), notation.options(gold)
    if None not in letters:
        return letters[0] == letters[1]
    words = notation.word(prediction), notation.word(gold)
    if any(words):
        return notation.letters(prediction) == notation.letters(gold)
    times = notation.time_of_day(prediction), notation.time_of_day(gold)
    if None not in times:
        (*time, half), (*gold_time, gold_half) = times
        return time == gold_time and (half == gold_half or not (half and gold_half))
    based, gold_based = notation.in_base(prediction), notation.in_base(gold)
    if based and gold_based:
        return notation.same_in_base(based, gold_based)
    if based or gold_based:
        # Digits without a base have base ten, but are no answer to a question for another base: 5 is not 101_2 here.
        (digits, base), other = (based, gold) if based else (gold_based, prediction)
        return base == 10 and digits == notation.plain_number(other)
    return None


def _equal_values(prediction: str, gold: str, rules: Rules) -> bool:
    prediction, gold = notation.point_for_comma(prediction, gold), notation.point_for_comma(gold, prediction)
    prediction = notation.tuple_for_list(prediction, gold)
    if notation.plain_number(gold) is None:  # 58,500 is a number where it is the gold answer
        gold = notation.tuple_for_list(gold, prediction)
    if (_SET.fullmatch(prediction) and _TUPLE.fullmatch(gold)) or (
        _SET.fullmatch(gold) and _TUPLE.fullmatch(prediction)
    ):
        return False
    in_radians = notation.in_radians(prediction) or notation.in_radians(gold)
    for without, one, bare in (
        (notation.without_percent, sympy.Rational(1, 100), _same_percentage if rules.bare_percent else None),
        (notation.without_degrees, sympy.pi / 180, None if in_radians else _same_degrees),
    ):
        plain, plain_gold = without(prediction), without(gold)
        marked, gold_marked = plain != prediction, plain_gold != gold
        if marked or gold_marked:
            pair = _value(plain), _value(plain_gold)
            if marked == gold_marked:
                return _same(*pair, rules)
            scaled = _times(pair[0], one) if marked else pair[0], _times(pair[1], one) if gold_marked else pair[1]
            return bare(pair, scaled, rules) if bare else _same(*scaled, rules)
    units = unit(prediction), unit(gold)
    if None not in units:
        measure = units[0].dimension == units[1].dimension and _same_measure(prediction, gold, units, rules)
        if measure or units[0] != units[1]:
            return measure
    if _same(_value(prediction), _value(gold), rules):
        return True
    shorter = notation.without_letter_unit(prediction)
    return shorter != prediction and not re.search("[A-Za-z]", gold) and _same(_value(shorter), _value(gold), rules)


def _same_percentage(pair: Pair, scaled: Pair, rules: Rules) -> bool:
    """Whether a number with a percent sign equals a bare one.

    There is one bare number only for each percentage, so that no two right answers are a factor of 100 apart: a bare
    gold answer below one is a share and any other one a percentage; a gold answer of 50% is the bare 50.
    """
    gold, bare = pair[1], pair[1] is scaled[1]
    value = _number(gold) if bare and gold is not None else None
    share = value is not None and abs(value) < 1
    return _same(*(scaled if share else pair), rules)


def _same_degrees(pair: Pair, scaled: Pair, rules: Rules) -> bool:
    """Whether an angle in degrees equals a bare number, of degrees or radians."""
    return _same(*pair, rules) or _same(*scaled, rules)


def _same_measure(prediction: str, gold: str, units: tuple[Unit, Unit], rules: Rules) -> bool:
    """Whether two numbers with units of one dimension are equal."""
    values = (_value(notation.without_letter_unit(text)) for text in (prediction, gold))
    sizes = (sympy.Rational(each.size.numerator, each.size.denominator) for each in units)
    return _same(*map(_times, values, sizes), rules)


def _same(prediction: Expression | None, gold: Expression | None, rules: Rules) -> bool:
    if prediction is None or gold is None:
        return False
    if _verified(prediction, gold, rules.strict):
        return not _lost_in_rounding(prediction, gold)
    close = rules.tolerance is not None and _close(prediction, gold, rules.tolerance)
    return bool(close or _same_number(prediction, gold))


def _verified(prediction: Expression, gold: Expression, strict: bool) -> bool:
    pair = _region(gold), _region(prediction)
    try:
        if verify(*pair, strict=strict, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True):
            return True
        return _chains(gold, prediction)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # it raises on what it cannot compare, such as x != 1 with x < 1
        return False


@lru_cache(maxsize=8192)
def _value(answer: str) -> Expression | None:
    """What math-verify reads in a clean answer, or None if it reads nothing or is not given it because it is `hard`."""
    number = notation.plain_number(answer)
    if number is not None:
        return sympy.Float(number) if "." in number else sympy.Integer(number)
    if hard(answer):
        return None
    source = notation.latex(answer)
    if _is_prose(source):  # math-verify would read a product of letters, and take seconds for it
        return None
    found = parse(f"${source}$", _TARGETS, fallback_mode="no_fallback", parsing_timeout=None)
    return _with_imaginary_unit(found[0]) if found else None


def _with_imaginary_unit(expression: Expression) -> Expression:
    """The expression with i as a number, which math-verify takes for a variable. Relations have none."""
    if not any(symbol.name == "i" for symbol in expression.free_symbols) or expression.has(Relational):
        return expression
    if isinstance(expression, sympy.Interval):  # (i, 2i) is a pair: complex numbers have no order
        expression = sympy.Tuple(expression.start, expression.end)
    return expression.subs({symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"})


def _region(expression: Expression) -> Expression:
    """Inequalities joined by "or" as the set of their solutions."""
    inequalities = isinstance(expression, sympy.FiniteSet) and all(arg.is_Relational for arg in expression.args)
    if not inequalities or len(expression.free_symbols) != 1 or expression.has(sympy.Eq, sympy.Ne):
        return expression
    return sympy.Union(*(arg.as_set() for arg in expression.args))


def _chains(one: Expression, other: Expression) -> bool:
    """Whether two chains of inequalities for one variable have the same solutions: `0 < x < 2` and `2 > x > 0`."""
    if not isinstance(one, sympy.And) or not isinstance(other, sympy.And) or one.has(sympy.Eq, sympy.Ne):
        return False
    if len(one.free_symbols) != 1 or one.free_symbols != other.free_symbols:
        return False
    return sympy.And(*one.args).as_set() == sympy.And(*other.args).as_set()


def _times(expression: Expression | None, factor: sympy.Expr) -> Expression | None:
    return expression * factor if isinstance(expression, sympy.Expr) else None


def _lost_in_rounding(one: Expression, other: Expression) -> bool:
    """Whether two small numbers are equal only as math-verify rounds to decimal places: 0.0 and 10^{-9}."""
    values = _number(one), _number(other)
    if None in values or not 0 < max(map(abs, values)) < 1e-3:
        return False
    return abs(values[0] - values[1]) > 1e-3 * max(map(abs, values))


def _same_number(one: Expression, other: Expression) -> bool:
    """Whether two constants agree to twenty digits; math-verify leaves one unevaluated beside a bare number."""
    if _number(one) is None or _number(other) is None or one.has(sympy.Float) or other.has(sympy.Float):
        return False
    return abs((one - other).evalf(30)) <= 1e-20 * min(1.0, abs(_number(other)))


def _close(one: Expression, other: Expression, tolerance: float) -> bool:
    """Whether two expressions differ by no more than a relative tolerance in their numbers."""
    values = _number(one), _number(other)
    if None not in values:
        return abs(values[0] - values[1]) <= tolerance * abs(values[1])
    if isinstance(one, sympy.MatrixBase) and isinstance(other, sympy.MatrixBase) and one.shape == other.shape:
        return all(_close(left, right, tolerance) for left, right in zip(one.flat(), other.flat(), strict=True))
    parts = getattr(one, "args", ()), getattr(other, "args", ())
    if type(one) is not type(other) or len(parts[0]) != len(parts[1]) or not parts[0]:
        return one == other
    return all(_close(left, right, tolerance) for left, right in zip(*parts, strict=True))


def _number(expression: Expression) -> complex | None:
    if not isinstance(expression, sympy.Expr) or not expression.is_number:
        return None
    try:
        value = complex(expression.evalf())
    except TypeError:  # a constant without a value, such as a limit that does not exist
        return None
    return value if math.isfinite(abs(value)) else None
