"""Agreement with published grades, and with the gold answers of the published problem sets.

Needs the folder of real data sets (`data_dir`). Ids are named here, data is not.
"""

import json
import re

import pytest

from rltoken.rewards import equality
from rltoken.rewards.extraction import extract
from rltoken.rewards.math import gradable, outcomes
from rltoken.rewards.outcomes import FAILURES, Outcome

ONE_FORMULA = re.compile(r"\$\$.+?\$\$|\\\[.+?\\\]|\$(?:\\.|[^$\\\n])+\$|\\\([^\n]+?\\\)", re.DOTALL)

SWITCHES = {
    "gt-0127": equality.Rules(tolerance=0.02),
    "gt-0133": equality.Rules(tolerance=1e-4),
    "gt-0258": equality.Rules(strict=False),
    "gt-0032": equality.Rules(strict=False),
}
"""Pairs that upstream compares with fewer decimal places, with variables of any name, or by the last side of an
equation whose sides differ."""
DISAGREEMENTS = {
    "gt-0181": "the same pair as gt-0180, with a switch of upstream's off: a chain of inequalities and the interval of "
    "its solutions are equal here",
}

UPSTREAM_ERRORS = {
    f"qwen-math-003-{number}": "the gold answer says 4:30p.. and the completion 4:30 p.m., which was graded as wrong"
    for number in range(8)
}

SETS = (
    "aime24",
    "aime25",
    "aime_1983_2023",
    "amc23",
    "gsm8k_test",
    "gsm8k_train",
    "math500",
    "math_train",
    "olympiadbench_en_math",
)
NOT_GRADABLE = {
    "olympiadbench-1965": "prose that says what the letters of a formula stand for",
    "olympiadbench-2045": "a function's name before an interval with an open and a closed end",
}
ZERO = "minus nothing is nothing"
SAME = "the two golds are equal"
EQUAL_AFTER_ALL = {
    "-({})": {f"math-train-0{n}": ZERO for n in (6796, 6946, 6949, 6985, 7074, 7363, 7371)},
    "{}+1": {
        "math-train-01977": "the one is added to the rounded value behind the exact one",
        "math-train-02222": "an equation of a number and a percentage, which is false with a bare percent sign",
        "math-train-04675": "the gold answer is an option letter and a comma, after which anything may follow",
        "olympiadbench-2212": "latex2sympy takes N and n for one variable, so N = n is true and its right side is free",
    },
    "another": {
        "math-train-02215": SAME,
        "math-train-05735": "a quarter of pi and 45 degrees",
        "math-train-06337": "one fraction, displayed or not",
        "math-train-06610": "a number as a word, and in digits",
    },
}
"""Changes of gold answers that leave them equal, or equal to math-verify."""
EVERY = 20
"""The fast tests look at every twentieth of the gold answers that are no bare whole numbers."""
PATIENT = 60.0
"""Seconds for one answer, since what else runs on the machine is no disagreement."""
EVERY_AND_ALL = pytest.mark.parametrize("every", [EVERY, pytest.param(1, marks=pytest.mark.slow)])

SENTENCES = (
    r"Therefore the final answer is $\boxed{%s}$. I hope it is correct.",
    "Therefore the final answer is %s. I hope it is correct.",
)


def rows(data_dir, name):
    return [json.loads(line) for line in (data_dir / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def golds(data_dir):
    """Id -> gold answer of all problem sets."""
    return {row["id"]: str(row["answer"]) for name in SETS for row in rows(data_dir, name)}


@pytest.fixture
def no_shortcut(monkeypatch):
    """Two answers are not equal for being written alike: what is equal has gone through the parser."""
    monkeypatch.setattr(equality, "_same_text", lambda *_: False)


def answer_in(text, kinds):
    """The answer in one side of a pair: marked, or the whole of a text without words, or its last formula or number."""
    if marked := extract(text):
        return marked
    if not re.search(r"(?<![\\A-Za-z{])[A-Za-z]{3,}", ONE_FORMULA.sub(" ", text)):
        return text
    return extract(text if "expr" in kinds else " ".join(ONE_FORMULA.findall(text)), last_number=True) or text


def test_pairs_of_math_verifys_own_tests(data_dir):
    pairs = rows(data_dir, "grader_pairs")
    disagreeing = {
        pair["id"]
        for pair in pairs
        if equality.equal(
            *(answer_in(pair[side], pair["match_types"]) for side in ("prediction", "gold")),
            SWITCHES.get(pair["id"], equality.DEFAULT),
        )
        != pair["expected"]
    }
    assert len(pairs) == 202
    assert disagreeing == set(DISAGREEMENTS)


def test_published_grades_of_completions_for_math_are_reproduced(data_dir):
    traces = rows(data_dir, "traces_qwen_math")
    found = outcomes(
        [row["completion"] for row in traces], [row["answer"] for row in traces], workers=2, seconds=PATIENT
    )
    differing = {row["id"] for row, got in zip(traces, found, strict=True) if (got == "correct") != row["correct"]}
    assert differing == set(UPSTREAM_ERRORS)
    assert not FAILURES & set(found)


def test_published_grades_of_completions_for_gsm8k_are_reproduced(data_dir):
    traces = rows(data_dir, "traces_gsm8k")
    completions, answers = [row["completion"] for row in traces], [row["answer"] for row in traces]
    found = outcomes(completions, answers, last_number=True, workers=2, seconds=PATIENT)
    agreeing = sum((got == "correct") == row["correct"] for row, got in zip(traces, found, strict=True))
    assert (len(traces), agreeing) == (2400, 2400)
    assert not FAILURES & set(found)


@EVERY_AND_ALL
def test_published_gold_answers_can_be_graded(golds, every):
    chosen = dict(list(golds.items())[::every]) | {name: golds[name] for name in NOT_GRADABLE}
    found = gradable(list(chosen.values()), workers=2, seconds=PATIENT)
    assert {name for name, good in zip(chosen, found, strict=True) if not good} == set(NOT_GRADABLE)


def test_whole_numbers_equal_themselves_and_no_other(golds):
    whole = [gold for gold in golds.values() if re.fullmatch(r"-?\d+", gold)]
    plus_one = [str(int(gold) + 1) for gold in whole]
    negated = [str(-int(gold)) for gold in whole if int(gold)]
    assert len(whole) > 12_000
    for sentence in SENTENCES:
        assert set(outcomes([sentence % gold for gold in whole], whole)) == {Outcome.CORRECT}
    assert set(outcomes([rf"\boxed{{{text}}}" for text in plus_one], whole)) == {Outcome.WRONG}
    assert set(outcomes([rf"\boxed{{{text}}}" for text in negated], [gold for gold in whole if int(gold)])) == {
        Outcome.WRONG
    }


@EVERY_AND_ALL
def test_gold_answers_in_a_sentence_are_correct(golds, no_shortcut, every):
    chosen = algebraic(golds, every)
    for sentence in SENTENCES:
        written = {
            name: sentence % (gold if "boxed" in sentence or "$" in gold else f"${gold}$")
            for name, gold in chosen.items()
        }
        # In this process, where the shortcut is off.
        found = outcomes(list(written.values()), list(chosen.values()), workers=0, seconds=PATIENT)
        assert [name for name, outcome in zip(chosen, found, strict=True) if outcome != "correct"] == []


@EVERY_AND_ALL
@pytest.mark.parametrize("change", ["-({})", "{}+1", "another"])
def test_changed_gold_answers_are_wrong(golds, change, every):
    chosen = algebraic(golds, every)
    values = list(chosen.values())
    changes = [change.replace("{}", gold.strip("$")) for gold in values]
    changed = values[1:] + values[:1] if change == "another" else changes
    found = outcomes([rf"\boxed{{{text}}}" for text in changed], values, workers=2, seconds=PATIENT)
    kept = [name for name, text, gold in zip(chosen, changed, values, strict=True) if text != gold]
    correct = {name for name, outcome in zip(chosen, found, strict=True) if outcome == "correct"} & set(kept)
    assert correct - set(EQUAL_AFTER_ALL[change]) == set()
    assert not FAILURES & set(found)


def algebraic(golds, every):
    """Every so many of the gold answers that are gradable and no bare whole numbers."""
    kept = [name for name, gold in golds.items() if not re.fullmatch(r"-?\d+", gold) and name not in NOT_GRADABLE]
    return {name: golds[name] for name in kept[::every]}
