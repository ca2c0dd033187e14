r"""Where the final answer of a completion stands.

After the end of thinking, in the last balanced `\boxed{...}`, unless "The final answer is ..." follows it; else after
the last `####` or answer header ("The answer is ...", "Answer: ..."); else, only when `last_number` asks for it, the
last formula or number of the text. Everything here takes time linear in the length of the text, so that completions of
megabytes are no danger.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

from rltoken.rewards.notation import SECOND_THOUGHT
from rltoken.rewards.text import DENIED, boxed_answer, final_part
from rltoken.rewards.words import CHANGING, NUMBER, SIGN

MAX_CHARS = 500
"""The longest answer that is looked at; the longest gold answer of MATH, AIME and OlympiadBench has 204 characters."""
_WINDOW = 4 * MAX_CHARS
MAX_KNOWN = 65536
"""How many texts' answers are remembered; all are forgotten when there are more."""
_known: dict[tuple[int, int, str | None, bool], str | None] = {}

_HEADER = re.compile(
    r"(?:^[#*_ \t]*+(?:final[ \t]+)?answer[*_: \t]*\n|####|<answer>"
    r"|\banswer[*_]*\s*(?:is\b|[:=\N{FULLWIDTH COLON}])|\bfinal\s+answer\b\**[ \t]*\n)"
    r"(?:that\b|therefore\b|[:*_\s])*",
    re.IGNORECASE | re.MULTILINE,
)
_RETRACTED = re.compile(r"\b(?:wrong|incorrect|mistaken?|not\s+(?:right|correct))\b", re.IGNORECASE)
"""What takes back the box before it."""
_FINAL = re.compile(r"\bfinal\s+answer\s+is[:*\s]*", re.IGNORECASE)
# A formula never holds the sign that opens it: what is not closed then costs no second look at the rest of the text.
_FORMULA = (
    r"(?<![\\\d])\$\$?(?P<dollar{0}>(?:\\.|[^$\\])+)\$\$?(?!\d)"
    r"|\\\((?P<inline{0}>(?:(?!\\[()]).)+)\\\)|\\\[(?P<display{0}>(?:(?!\\[\[\]]).)+)\\\]"
)
_ONE_FORMULA = re.compile(_FORMULA.format(""), re.DOTALL)
_FORMULAS = re.compile(
    rf"(?:{_FORMULA.format(1)})(?:\s*(?:,|;|,?\s*and|,?\s*or)\s*(?:{_FORMULA.format(2)}))+", re.DOTALL
)
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9])(?:(?<![\d)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:[.,]\d+)?(?:/\d+)?|\.\d+)", re.ASCII
)
_NUMBER_WITH_UNIT = re.compile(rf"[$€£]?(?P<number>{_NUMBER.pattern})[ ](?!and\b)[A-Za-z]{{3,}}", re.ASCII)
_HEDGED = re.compile(r"(?:not|no|less|more|fewer|greater|between|neither|either|under|over|at (?:least|most))\b", re.I)
_SIGN = re.compile(rf"{SIGN}\s*", re.I)
_SIGN_BEFORE = re.compile(rf"(?<![\d)}}\]$]\s)\b{SIGN}\s+\Z", re.I)
"""The word for a sign right before a number, unless it stands between two: `7 minus 5`."""
_LONGEST_SIGN = 20
_SUM = re.compile(r"[-+=<>;]|\\pm|, |\b(?:and|or)\b")
_MORE = re.compile(
    r"\s*(?:[+^<>=\N{MULTIPLICATION SIGN}÷·]|[-*/]\s*[\d$\\(])"
    rf"|.*?(?:{NUMBER}|\b{CHANGING}|\$[^$]+\$|\\[(\[])",
    re.IGNORECASE | re.DOTALL,
)
"""What makes a first number or formula only a part of an answer."""
_REASON = re.compile(r"\b(?:because|since|(?<!well\s)as(?!\s+well)|so|which|thus|hence)\b", re.I)
"""What is followed by other numbers than the answer."""
_INSTEAD = re.compile(r"(?:,\s*not|,?\s+rather\s+than|,?\s+instead\s+of)\s+\S+?(?=\.?\s*$|\.\s)", re.I)
"""What an answer is told from, at the end of its sentence."""
_OPTION = re.compile(r"(?:\(([A-Ja-j])\)|\b([A-J])(?=[.):]|\s*$))(?!\s*[\\^_+*/=<>(-])")
_LISTED_OPTION = re.compile(r"(?<!\S)([A-J])[.):](?=\s|$)")
_SENTENCE_END = re.compile(r"\.(?=\s|$)|<\||</")
_TEXT_COMMANDS = re.compile(r"\\[A-Za-z]+(?:\s*\{[A-Za-z ]*\})?")
_PROSE = re.compile(r"(?!(?:sqrt|sin|cos|tan|log|exp|infinity)\b)[A-Za-z]{3,}\b(?!\()")


def extract(text: str, *, think_end: str | None = None, last_number: bool = False) -> str | None:
    """The final answer of a completion as written, or None.

    Args:
        text: a whole completion.
        think_end: the marker that must precede an answer (`rltoken.rewards.text.final_part`).
        last_number: take the last formula or number of the final part where no answer is marked as such.

    Returns:
        The answer, not empty and of at most `MAX_CHARS` characters; what is longer is no answer. It is remembered.
    """
    # The hash stands for the text, which would fill the memory; two texts of one length share 64 bits by no accident.
    key = hash(text), len(text), think_end, last_number
    try:
        return _known[key]
    except KeyError:
        if len(_known) >= MAX_KNOWN:
            _known.clear()
        return _known.setdefault(key, _extracted(text, think_end, last_number))


def _extracted(text: str, think_end: str | None, last_number: bool) -> str | None:
    part = final_part(text, think_end)
    if part is None:
        return None
    boxed = boxed_answer(part) or ""
    found = (
        _after_last_box(part, denied=boxed.startswith(DENIED))
        or boxed
        or _after_last_header(part)
        or (_last_formula_or_number(part) if last_number else None)
    )
    return found if found and len(found) <= MAX_CHARS else None


def _after_last_box(part: str, *, denied: bool) -> str | None:
    """The answer after "The final answer is", where that follows the last box and begins with a formula or number.

    Where the box is `denied`, or after words that take it back, such as "is wrong", any other answer header will do.
    """
    tail = part[part.rfind("\\boxed") :] if "\\boxed" in part else ""
    retracted = _RETRACTED.search(tail)
    headers = _HEADER if retracted or denied else _FINAL
    for header in reversed(list(headers.finditer(tail, retracted.end() if retracted else 0))):
        if _leads(tail, header.end()):
            return _after_header(tail[header.end() : header.end() + _WINDOW])
    return None


def _after_last_header(part: str) -> str | None:
    for header in reversed(list(_HEADER.finditer(part))):
        if found := _after_header(part[header.end() : header.end() + _WINDOW]):
            return found
    return None


def _after_header(rest: str) -> str | None:
    """The answer in what follows an answer header.

    Leading formulas, a leading number with a unit, or a leading option letter; else the first sentence, or the last
    formula or number in it where it begins in prose ("The answer is the sum, 5"). A number or formula after which the
    sentence goes on ("5 thousand") is the answer together with the rest of it.
    """
    if sign := _SIGN.match(rest):
        follows = rest[sign.end() :]
        return _negative(_after_header(follows) or "") if _leads(follows, 0) else _sentence(rest)
    if formulas := _FORMULAS.match(rest):
        return formulas[0]
    if (formula := _ONE_FORMULA.match(rest)) and _is_formula(formula):
        return _with_rest(_inside(formula), rest[formula.end() :])
    line, sentence = _line(rest), _sentence(rest)
    if _HEDGED.match(sentence):
        return sentence
    if number := _NUMBER_WITH_UNIT.match(sentence):
        whole = _with_rest(number["number"], sentence[number.end("number") :])
        return number["number"] if whole == number["number"] else sentence
    if option := _OPTION.match(sentence):
        letter = option[1] or option[2]
        listed = any(other != letter for other in _LISTED_OPTION.findall(line))
        return line if listed or SECOND_THOUGHT.search(sentence, option.end()) else letter
    if _PROSE.match(sentence) and (last := _last_formula_or_number(sentence)):
        return last
    return sentence or None


def _leads(text: str, start: int) -> bool:
    """Whether a formula or number stands there, be it after a sign in words."""
    sign = _SIGN.match(text, start)
    start = sign.end() if sign else start
    return bool(_ONE_FORMULA.match(text, start) or _NUMBER.match(text, start))


def _line(text: str) -> str:
    """The first line of a text, without what its answer is told from: ", not 6", "rather than B"."""
    return _INSTEAD.sub("", text.partition("\n")[0])


def _sentence(text: str) -> str:
    return _SENTENCE_END.split(_line(text), maxsplit=1)[0].strip(" \t*_")


def _with_rest(first: str, rest: str) -> str:
    """A number or formula, with the rest of its sentence where that changes it or adds to it."""
    sentence = _sentence(rest)
    if not _MORE.match(_REASON.split(sentence, maxsplit=1)[0]):
        return first
    return f"{first} {_ONE_FORMULA.sub(_inside, sentence)}"


def _negative(found: str) -> str:
    """What the word for a minus sign stands before."""
    return f"-({found})" if _SUM.search(found) else f"-{found}"


def _last_formula_or_number(text: str) -> str | None:
    """The last formula or number of a text, with a sign in words before it and what changes it behind it."""
    formula = _last(found for found in _ONE_FORMULA.finditer(text) if _is_formula(found))
    number = _last(_NUMBER.finditer(text))
    last = formula if formula and (number is None or formula.end() >= number.end()) else number
    if last is None:
        return None
    inside = _inside(last) if last is formula else last[0]
    signed = _SIGN_BEFORE.search(text, max(0, last.start() - _LONGEST_SIGN), last.start())
    return _with_rest(_negative(inside) if signed else inside, text[last.end() : last.end() + _WINDOW])


def _last(found: Iterable[re.Match[str]]) -> re.Match[str] | None:
    return next(iter(deque(found, maxlen=1)), None)


def _inside(formula: re.Match[str]) -> str:
    return next(filter(None, formula.groups())).strip()


def _is_formula(formula: re.Match[str]) -> bool:
    """Whether it is one, and not what stands between two amounts of dollars."""
    inside = _inside(formula)
    return bool(inside) and len(_PROSE.findall(_TEXT_COMMANDS.sub(" ", inside[:_WINDOW]))) < 2
