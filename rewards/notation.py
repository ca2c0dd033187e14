r"""Answers as people and models write them, put into the LaTeX that math-verify reads rightly.

Most of what stands here is for a notation that math-verify 0.9 misreads, at times as another value: `(2)(3)` as 5,
`1e5` as 5e, `1 000` as 0, `0.\overline{3}` as 0, `\langle 1,2 \rangle` as 1.2, `6m` as 6.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from rltoken.rewards.words import FACTORS, NO_UNIT, SIGN, in_digits

_ZEROS = (0x0660, 0x06F0, 0x0966, 0xFF10)
"""Zero in Arabic, Persian, Devanagari and full width; the other digits follow it."""
_SIGNS = str.maketrans(
    {"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{MULTIPLICATION SIGN}": r"\times ", "·": r"\cdot ", "÷": r"\div "}
    | {"°": r"^\circ ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm "}
    | {"√": r"\sqrt ", "\N{UNION}": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "⟨": "(", "⟩": ")"}
    | {
        sign: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign).split("\N{FRACTION SLASH}"))
        for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
    }
    | {zero + digit: str(digit) for zero in _ZEROS for digit in range(10)}
    | dict.fromkeys([*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF])
)
"""Signs -> LaTeX; digits -> ASCII; marks of no width and of direction -> nothing."""
_RAISED = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_CURRENCIES = {"€": "euros", "£": "pounds", "¥": "yen"}

_TEXT_COMMAND = r"\\(?:text\w*|mbox|mathrm|mathbf|mathit|mathsf|operatorname)\s*"
_DECORATIONS = (
    (re.compile(r"\{\s*\\color\s*\{[^{}]*\}([^{}]*)\}"), r"\1"),
    (re.compile(r"\\textcolor\s*\{[^{}]*\}\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:text)?color\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\(?:display|text|script|scriptscript)style(?![A-Za-z])\s*"), ""),
)
_DEGREES_OF = rf"\s*(?:\^?\s*\{{?\s*\\circ\s*\}}?|(?:{_TEXT_COMMAND}\{{\s*)?\bdegrees?\b)\s*(?:{_TEXT_COMMAND}\{{\s*)?"
_PLAINER = (
    (re.compile(_DEGREES_OF + r"(?:C|[Cc]elsius)(?![A-Za-z])\s*\}?"), r"\\text{ celsius}"),
    (re.compile(_DEGREES_OF + r"(?:F|[Ff]ahrenheit)(?![A-Za-z])\s*\}?"), r"\\text{ fahrenheit}"),
    (re.compile(r"\\not\s*="), r"\\ne "),
)
"""What may be written in several ways that must not look different."""
_CASES = re.compile(
    r"(?:\\left\s*\\\{\s*)?\\begin\s*\{cases\}((?:(?!\\begin).)*?)\\end\s*\{cases\}(?:\s*\\right\s*\.?)?"
)
_ALIGNED_EQUATION = re.compile(r"([^&=]+?)\s*&?\s*=\s*&?\s*([^&=]+)")
_INFINITY = re.compile(r"(?<![\\A-Za-z{])infinity\b")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
_TEXT = re.compile(_TEXT_COMMAND + r"\{([^{}]*)\}")
_SIGN_WORD = re.compile(
    rf"^(?:{_TEXT_COMMAND}\{{\s*{SIGN}\s*\}}|{SIGN})\s*(?=[\d.(\\]|[A-Za-z](?![A-Za-z]))", re.IGNORECASE
)
_PHRASE = re.compile(r"[^\W\d_]+(?:[\s'.-]+[^\W\d_]+)*")
_LONG_WORD = re.compile(r"[^\W\d_]{4}")
_OPTION = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(([A-J])\)|([A-J])(?=[.):]|\s*$))[.):]*(?P<rest>\s+[^\s+*/=^<>-].*)?",
    re.I | re.DOTALL,
)
SECOND_THOUGHT = re.compile(r"\b(?:or|and|nor|not|no|but|wrong|rather)\b|\([A-Ja-j]\)|\b[A-J](?=[.):,]|\s*$)", re.I)
"""What makes an option letter one of several, or none."""
_ONLY_OPTION = re.compile(r"\(?([A-J])\)?[.:]?", re.I)
_TRANSPOSED = re.compile(r"[A-Z]\s*\^\s*\{?\s*(?:T|\\(?:top|intercal)(?![A-Za-z]))")
_OPTIONS = re.compile(r"\(?[A-J]\)?(?:(?:,| and |, and )\s*\(?[A-J]\)?)+")
_NAME = re.compile(
    r"(?=.*[A-Za-z])(?!.*(?:\\|\b)(?:sqrt|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|lg|log|exp)(?![A-Za-z]))"
    r"(?:[A-Za-z\\{}\s'.:]|_\{?\w++\}?|\([^()=]*+\))++"
)
"""What has a value without saying which: `x_1`, `P(5)`, `\\angle A`, `\\frac{a}{b}`; not `2x`, `x^2`, `x+y` or
`\\sin x`."""
_NAMED_TUPLE = re.compile(r"(?:\\left)?\(([A-Za-z](?:\s*,\s*[A-Za-z])+)(?:\\right)?\s*\)\s*=")
_MODULUS = re.compile(r"\\pmod\s*\{?\s*(\w+)")
_DOTS = re.compile(r"\\[lcd]?dots|\.\.\.|…")
_IN_BASE = re.compile(r"([0-9A-F]*[0-9][0-9A-F]*)_(?:\{\s*(\d+)\s*\}|(\d))", re.I)
_TIME = re.compile(r"(\d{1,2})(?:\\!)?:(?:\\!)?([0-5]\d)(?![\d:])[^\dA-Za-z]*([ap]?)\D*", re.I)
_PLAIN = re.compile(r"\\?\$?\s*([-+]?)\\?\$?\s*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)", re.ASCII)
_PAIR = re.compile(r"(?:\\left)?\(\s*[^()]*,[^()]*\)")
_NO_LIST = re.compile(r"[()\[\]=<>]|\\[{}]|\\[lg]eq?|\\pm|[A-Za-z]{2,} |\\text")
_DOLLARS = re.compile(r"-?\\?\$\s*[\d.][^$]*$")
_DECIMAL_COMMA = re.compile(r"-?(?!\d{1,3}(?:,\d{3})+$)\d+,\d+|-?0,\d{3}", re.ASCII)
_PERCENT = re.compile(
    r"\s*(?:\\text\w*\s*\{\s*(?:\\?%|percent|percentage|pct)\s*\}|\\?%|\b(?:percent|percentage|pct)\b)"
)
_DEGREE = re.compile(r"\s*\^?\s*\{?\s*\\circ\s*\}?|\s*(?:\\text\w*\s*\{\s*)?\bdegrees?\b(?:\s*\})?")

_RADIANS = re.compile(r"\b(?:radians?|rad)\b")
_SPACED_THOUSANDS = re.compile(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", re.ASCII)
_MIXED = re.compile(r"(-?\d+)\s+(\d+)/(\d+)", re.ASCII)
_COMMAS = re.compile(r"(?<![\d.])\d[\d.]*(?:,-?\d[\d.]*)+")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?", re.ASCII)
# Each word ends where its letters end and has one separator before it, so that there is one way only to split a text.
_MEASURE = (
    r"(?:(?:(?:square|cubic|sq|cu)\s+)?"
    rf"(?:[mck]m|km|in|ft|yd|mi|[mk]g|lbs?|oz|[mc][lL]|sec|min|hrs?|mph|[ap]\.?m|(?!{NO_UNIT})[A-Za-z]{{3,}})(?![A-Za-z])\.?)"
)
# One letter in \text{} is a unit where it is the sign of one; bold letters and operators are none.
_MARKED = (
    rf"\\(?:text\w*|mbox|mathrm)\s*\{{(?![^{{}}]*\b{NO_UNIT})\s*"
    r"(?:[mgslhLCFKNJWV](?![A-Za-z])|[A-Za-z(][A-Za-z]|%|\$)[A-Za-z.,%'()/\s-]*(?:\^\s*-?\d)?\s*\}"
)
_POWER = r"(?:\s*\^\s*\{?\d\}?)?"
_WORDED_UNIT = re.compile(
    rf"(?:(?<=\S)\s*{_MARKED}|(?<=[\d}})])\s*{_MEASURE}){_POWER}"
    rf"(?:(?:\s*/\s*|\s+per\s+|\s+|(?=\\))(?:{_MARKED}|{_MEASURE}|[hs]\b){_POWER})*\.?$"
)
_LETTER_UNIT = re.compile(rf"(?<=\d)\s*[mgslhLC]{_POWER}(?:\s*/\s*[hs]{_POWER})?$")
_TRIGONOMETRIC = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc))\s*[({]?\s*(\d+(?:\.\d+)?)\s*\^\s*\{?\\circ\s*\}?[)}]?", re.ASCII
)
_SIZE_WORD = rf"({'|'.join(sorted(FACTORS, key=len, reverse=True))})(?![A-Za-z])\s*"
_MARKED_SIZE = re.compile(rf"(?<=[\d}}])\s*(\\(?:text\w*|mbox|mathrm)\s*\{{)\s*{_SIZE_WORD}")
_SIZE = re.compile(rf"(?<=[\d}}])\s*{_SIZE_WORD}")
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:text\w*|mbox|mathrm)\s*\{\s*\}", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(frac|binom)\s*(\\[A-Za-z]+|\w)\s*(\\[A-Za-z]+|\w)", r"\\\1{\2}{\3}"),
        (r"\\(?:mathrm|rm)\s*\{\s*([eid])\s*\}", r"\1"),
        (r"^\\approx(?![A-Za-z])|\\phantom(?![A-Za-z])\s*(?:\{[^{}]*\})?", ""),
        (r"_\{\s*\\(max|min)\s*\}", r"_{\1}"),
        (r"^\\\{\s*\w\s*(?:\\mid|\||:)\s*(.+?)\s*\\\}$", r"\1"),
        (r"^\\\{\s*(\([^()]*\))\s*\\\}$", r"\1"),
        (r"\s*\(?\s*\\[pb]?mod(?![A-Za-z])\s*\{?\s*\w+\s*\}?\s*\)?$", ""),
        (r"\\equiv(?![A-Za-z])", "="),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
        (r"\\left\s*(?:<|\\langle)|\\langle", "("),
        (r"\\right\s*(?:>|\\rangle)|\\rangle", ")"),
        (r"\\?(?<![A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z{])(pi|sin|cos|tan|ln|log|infty)(?![A-Za-z])", r"\\\1 "),
        (r"(?<=\d)(?:,\\!|\{,\}|\\[,!]|~)\s*(?=\d{3}(?!\d))", ""),
        (r"(?<!\\)\\[!,;: ]|\\q?quad\b|~", " "),
        (r"(?<=\d)\.\((\d+)\)", r".\\overline{\1}"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
        # Not after a name: log_2(8), f2(3).
        (r"(?<![\w\\{}.^)])(\d+(?:\.\d+)?)\s*(?:\\left)?\(\s*(\d+(?:\.\d+)?)\s*(?:\\right)?\)", r"\1\\cdot(\2)"),
        (r"(?<![A-Za-z\\{_\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\d.])", r"\1\\times 10^{\2}"),
        (r"(?<=\d)\s*\^?\s*\{?\s*(?:\\(?:text\w*|mathrm|mbox)\s*\{)?\s*(?:st|nd|rd|th)(?![A-Za-z])\s*\}*", ""),
    )
)


def clean(text: str) -> str:
    """An answer without what wraps it: white space, math delimiters, bold marks, a full stop, marks of no width.

    Colour goes too, `minus five` is `-5`, `€5` is `5\\text{ euros}`, and a system of equations is a list of them. White
    space is single spaces then, so that the patterns of this module cannot try many ways to split it.
    """
    text = _RAISED.sub(lambda raised: f"^{{{unicodedata.normalize('NFKC', raised[0])}}}", text)
    text = _undecorated(" ".join(text.translate(_SIGNS).split()))
    text = _INFINITY.sub(r"\\infty", text)
    while True:
        before = text
        for opened, closed in _WRAPPERS:
            inside = text[len(opened) : -len(closed)]
            if text.startswith(opened) and text.endswith(closed) and inside and closed not in inside:
                text = inside.strip()
        text = text.rstrip(".,;").strip()
        if text == before:
            return _SIGN_WORD.sub("-", _worded(text))


def plain_number(text: str) -> str | None:
    """The digits of a bare decimal number, without thousands separators and a sign for dollars, else None."""
    number = _PLAIN.fullmatch(text)
    if not number:
        return None
    whole, point, decimals = number[2].replace(",", "").rstrip(".").partition(".")
    return f"{'-' if number[1] == '-' else ''}{whole.lstrip('0') or '0'}{point}{decimals}"


def word(text: str) -> str | None:
    r"""The lower-case text of `\text{...}`, or of a phrase with a word of at least four letters, else None."""
    inside = _TEXT.sub(r" \1 ", text)
    phrase = inside.strip(" ().")
    if not _PHRASE.fullmatch(phrase) or not (inside != text or _LONG_WORD.search(phrase)):
        return None
    return " ".join(phrase.casefold().split())


def letters(text: str) -> str:
    """A text as it is compared with a `word`."""
    return " ".join(_TEXT.sub(r" \1 ", text).strip(" ().").casefold().split())


def only_option(text: str) -> str | None:
    """The upper-case letter A to J of an answer that is nothing but an option, `(B)` or `\\text{B.}`, else None."""
    found = _ONLY_OPTION.fullmatch(_TEXT.sub(r"\1", text).strip())
    return found[1].upper() if found else None


def option(text: str) -> str | None:
    """The upper-case letter of an answer that chooses an option, `(B) 12`, else None."""
    found = _OPTION.fullmatch(_TEXT.sub(r" \1 ", text).replace("\\", " ").strip())
    if not found or SECOND_THOUGHT.search(found["rest"] or ""):
        return None
    return (found[1] or found[2]).upper()


def sides(text: str) -> list[str]:
    """What an answer like `x = 2 + 3 = 5` says something equals: all sides but the first ones that are mere names."""
    parts = all_sides(text)
    while len(parts) > 1 and _NAME.fullmatch(parts[0]):
        del parts[0]
    return parts


def all_sides(text: str) -> list[str]:
    """The sides of an equation; the equals sign of an index in braces, as in a sum, makes none."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == "=" and depth <= 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def marks(text: str) -> tuple[int, int, bool, bool, tuple[str, ...], frozenset[str]]:
    """What two equal answers have in common, and math-verify drops.

    That is primes, transposed matrices, dots, a remainder's sign, the names in `(b,a)=(5,6)` where they are not in
    alphabetical order, and last the modulus.
    """
    primes = text.count("'") + text.count("\\prime")
    transposed = len(_TRANSPOSED.findall(text))
    return (
        primes,
        transposed,
        bool(_DOTS.search(text)),
        "\\bmod" in text,
        _reordered(text),
        frozenset(_MODULUS.findall(text)),
    )


def options(text: str) -> set[str] | None:
    """The letters of an answer that is nothing but several options, `A and (C)`, in upper case; else None."""
    text = _TEXT.sub(r" \1 ", text).strip()
    return set(re.findall("[A-J]", text)) if _OPTIONS.fullmatch(text) else None


def in_base(text: str) -> tuple[str, int] | None:
    """Digits and base of a number like `101_2`, else None."""
    found = _IN_BASE.fullmatch(text)
    return (found[1].upper(), int(found[2] or found[3])) if found else None


def same_in_base(number: tuple[str, int], other: tuple[str, int]) -> bool:
    """Whether two numbers as digits and base have one value; what has no value is compared as written."""
    try:
        return int(*number) == int(*other)
    except ValueError:  # a digit that is too large, or a base that Python does not know
        return number == other


def time_of_day(text: str) -> tuple[int, int, str] | None:
    """Hour, minute and `a`, `p` or nothing for the half of the day of an answer like `10:30 a.m.`, else None."""
    found = _TIME.fullmatch(_TEXT.sub(r" \1 ", text))
    return (int(found[1]), int(found[2]), found[3].lower()) if found else None


def point_for_comma(text: str, other: str) -> str:
    """The decimal comma of `1000,99` as a point, where the answer it is compared with has a decimal point."""
    return text.replace(",", ".") if "." in other and _DECIMAL_COMMA.fullmatch(text) else text


def tuple_for_list(text: str, other: str) -> str:
    """A bare list `1,5` in the brackets of the tuple that it is compared with, so that the order of both counts."""
    listed = "," in text and not _NO_LIST.search(text)
    return f"({text})" if listed and _PAIR.fullmatch(other) else text


def measured(text: str) -> str:
    r"""The unit that an answer ends with, in lower case and without LaTeX, or `$`; empty if there is none.

    A single letter, which may be a variable, counts only after a bare number, as in `3 m`.
    """
    if _DOLLARS.match(text):
        return "$"
    found = _WORDED_UNIT.search(text)
    if not found:
        found = _LETTER_UNIT.search(text)
        if not found or plain_number(text[: found.start()]) is None:
            return ""
    plain = re.sub(r"[{}\\]", "", _TEXT.sub(r" \1 ", found[0]))
    plain = plain.replace("^ ", "^").replace("squared", "^2").replace("cubed", "^3")
    return " ".join(plain.casefold().split()).replace(" ^", "^").strip(" .")


def without_percent(text: str) -> str:
    """An answer without its percent signs."""
    return _PERCENT.sub("", text)


def without_degrees(text: str) -> str:
    """An answer without its degree signs; what a trigonometric function is taken of is put into radians."""
    return _DEGREE.sub("", _TRIGONOMETRIC.sub(lambda found: _of_degrees(found[1], Fraction(found[2])), text))


def in_radians(text: str) -> bool:
    """Whether an answer says that it is an angle in radians."""
    return bool(_RADIANS.search(text))


def without_letter_unit(text: str) -> str:
    """An answer without a last `m`, `g`, `s` ..., which may be a unit or a variable."""
    return _LETTER_UNIT.sub("", text)


def latex(text: str) -> str:
    """A clean answer as LaTeX for math-verify, without its unit."""
    if _SPACED_THOUSANDS.fullmatch(text):
        return text.replace(" ", "")
    if mixed := _MIXED.fullmatch(text):
        return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    text = re.sub(r"(?<!\\)\$|\\[()]", " ", text)
    text = _sized(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _REPEATING.sub(_as_fraction, text)
    text = _WORDED_UNIT.sub("", text.strip())
    text = _separate(text)
    return text if "," in text else re.sub(r"\)\s*(\\left\s*)?\(", r")\\cdot \1(", text)


def _undecorated(text: str) -> str:
    """An answer without colours and styles, with degrees Celsius in words, and a system of equations as a list.

    A system with conditions stays as it is.
    """
    for pattern, inside in _DECORATIONS + _PLAINER:
        text = pattern.sub(inside, text)
    if system := _CASES.fullmatch(text):
        rows = [row.strip(" ,;") for row in system[1].split("\\\\")]
        equations = [_ALIGNED_EQUATION.fullmatch(row) for row in rows if row]
        if equations and None not in equations:
            return ", ".join(f"{row[1]}={row[2]}" for row in equations)
    return text


def _worded(text: str) -> str:
    """A number in words in digits, and a foreign currency's sign as the word for it; any other text as it is."""
    for sign, name in _CURRENCIES.items():
        if sign in text:
            return rf"{text.replace(sign, '').strip()}\text{{ {name}}}"
    inside = _TEXT.sub(r"\1", text)
    digits = in_digits(inside)
    return text if digits == inside else digits


def _sized(text: str) -> str:
    """An answer with `5 thousand` and `2 thirds` as products."""
    text = _MARKED_SIZE.sub(lambda found: rf"\cdot {_latex_size(found[2])} {found[1]}", text)
    return _SIZE.sub(lambda found: rf"\cdot {_latex_size(found[1])} ", text)


def _latex_size(name: str) -> str:
    size = FACTORS[name]
    return str(size.numerator) if size.denominator == 1 else _fraction(size)


def _reordered(text: str) -> tuple[str, ...]:
    """The names that `(b,a)=(5,6)` gives values to, where that is not in alphabetical order."""
    named = _NAMED_TUPLE.match(text)
    names = re.findall("[A-Za-z]", named[1]) if named else []
    return tuple(names) if names != sorted(names, key=str.casefold) else ()


def _separate(text: str) -> str:
    """A space after each comma that separates, so that none is read as a thousands separator.

    A comma between digits separates thousands where all of `1,234,567` looks so, unless it stands in brackets without
    any other comma that has a space.
    """
    bracketed = text[:1] in "([" and ", " not in text

    def spaced(run: re.Match[str]) -> str:
        return run[0] if _THOUSANDS.fullmatch(run[0]) and not bracketed else run[0].replace(",", ", ")

    return _COMMAS.sub(spaced, text)


def _as_fraction(repeating: re.Match[str]) -> str:
    whole, fixed, period = repeating.groups()
    without_period = int((whole or "0") + fixed)
    difference = int((whole or "0") + fixed + period) - without_period
    return _fraction(Fraction(difference, 10 ** len(fixed + period) - 10 ** len(fixed)))


def _of_degrees(function: str, degrees: Fraction) -> str:
    radians = degrees / 180
    return rf"{function}(\frac{{{radians.numerator}\pi}}{{{radians.denominator}}})"


def _fraction(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
