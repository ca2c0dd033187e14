"""Answers: literal pairs, extraction, normal forms, gold checks, what is refused by its syntax, threads."""

import itertools
import json
import threading
import time

import pytest

from rltoken.rewards import math as rewards_math
from rltoken.rewards.format import boxed
from rltoken.rewards.math import accuracy, answer, correct, equal, extract, hard, parses

EQUAL = [
    ("72", "72"),
    ("72.0", "72"),
    ("1,250", "1250"),
    (r"12{,}500", "12500"),
    (r"3,\!628,\!800", "3628800"),
    (r"\$36", "36"),
    ("-4", "-4"),
    ("0.75", r"\frac{3}{4}"),
    ("3/4", r"\frac34"),
    (r"\dfrac{6}{8}", r"\frac{3}{4}"),
    (r"2\frac{1}{2}", r"\frac{5}{2}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\sqrt{50}", r"5\sqrt{2}"),
    ("2^{10}", "1024"),
    ("x^2 + 2x + 1", "(x+1)^2"),
    ("b+a+c", "a + b + c"),
    ("x = 5", "5"),
    ("5", "x = 5"),
    ("(3, -2)", r"\left( 3, -2 \right)"),
    (r"\{1, 2, 3\}", r"\{3, 1, 2\}"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)"),
    (r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\begin{pmatrix}1\\-2\end{pmatrix}"),
    (r"45^\circ", "45"),
    (r"15\%", "15"),
    (r"12 \text{ cm}", "12"),
    (r"\text{(C)}", "C"),
    ("Thursday", r"\text{Thursday}"),
    (r"\text{ even }", "even"),
    ("3 + 4i", "4i + 3"),
    (r"2\pi", r"\pi \cdot 2"),
    ("$7$.", "7"),
    (r"\sin^2 t", r"\sin^2 t"),
]

UNEQUAL = [
    ("72", "73"),
    ("-4", "4"),
    ("0.33", r"\frac{1}{3}"),
    (r"\frac{3}{4}", r"\frac{4}{3}"),
    ("[1, 2)", "(1, 2)"),
    ("(3, -2)", "(-2, 3)"),
    (r"\{1, 2\}", r"\{1, 2, 3\}"),
    ("x^2 + 1", "x^2 - 1"),
    ("p - q", "q - p"),
    ("D", "C"),
    ("listen", "silent"),
    (r"\text{no}", r"\text{on}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    ("", "5"),
    ("1250", "1,25"),
]


@pytest.mark.parametrize(("prediction", "gold"), EQUAL)
def test_equal_answers(prediction, gold):
    assert parses(gold)
    assert equal(prediction, gold)


@pytest.mark.parametrize(("prediction", "gold"), UNEQUAL)
def test_unequal_answers(prediction, gold):
    assert not equal(prediction, gold)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{7}.", "7"),
        (r"first \boxed{6}, no, \boxed{7}", "7"),
        (r"\boxed{\frac{1}{2}} and nothing else", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\fbox{ 4 }", "4"),
        (r"\boxed {4}", "4"),
        (r"\boxed{5} and then \boxed{6", "5"),
        (r"put it within \boxed{}", None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"<think>\boxed{1}</think> so \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> so it is two", None),
        (r"\boxed{1}</think>\boxed{2}</think>\boxed{3}", "3"),
        ("6 * 3 = 18\n#### 18", "18"),
        ("The answer is 18.", "18"),
        ("The answer is not 17. The answer is 18", "18"),
        ("Answer:\n18", "18"),
        ("I cannot say what the answer is", None),
        ("The final answer is: **18**", "18"),
        ("**Answer:** 18 dollars per day", "18"),
        (r"the answer is $\frac{1}{2}$, as wanted", r"\frac{1}{2}"),
        (r"The answer is \$18.", r"\$18"),
        ("She has 18 eggs left", None),
        ("", None),
    ],
)
def test_extraction(text, found):
    assert extract(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("She has 18 eggs left", "18"),
        ("from 7-5 to -1,200.50", "-1,200.50"),
        ("7-5", "5"),
        ("three quarters is 3/4", "3/4"),
        ("", None),
    ],
)
def test_last_number_is_taken_only_when_asked_for(text, found):
    assert extract(text) is None
    assert extract(text, last_number=True) == found


def test_a_model_that_thinks_must_end_its_thinking():
    assert extract(r"maybe \boxed{7}") == "7"
    assert extract(r"maybe \boxed{7}", think_end="</think>") is None
    assert extract(r"maybe \boxed{6}</think>\boxed{7}", think_end="</think>") == "7"
    assert extract(r"[THINK]\boxed{6}[/THINK]\boxed{7}", think_end="[/THINK]") == "7"


def test_accuracy_has_trls_signature_for_both_forms_of_completions():
    texts = [r"\boxed{7}", r"\boxed{8}", "no idea", r"\boxed{7}"]
    gold = ["7", "7", "7", "see the solution above"]
    conversational = [[{"role": "assistant", "content": text}] for text in texts]
    expected = [1.0, 0.0, 0.0, None]
    assert accuracy(texts, gold) == expected
    assert accuracy(prompts=gold, completions=conversational, answer=gold, trainer_state=None) == expected


@pytest.mark.parametrize(
    ("texts", "form"),
    [
        (["0.5", r"\frac{1}{2}", "1/2", r"\dfrac{2}{4}", "$.5$", "0.50"], "1/2"),
        (["1,000", "1000", r"1{,}000", r"1,\!000", "1000.0", r"\$1000"], "1000"),
        (["x^2+1", "1+x^2", "x^{2} + 1"], "x**2 + 1"),
        ([r"\text{East}", "east", "East."], "east"),
        (["2^{10}", "1024"], "1024"),
        (["???"], "???"),
    ],
)
def test_normal_form_joins_ways_to_write_an_answer(texts, form):
    assert {answer(rf"\boxed{{{text}}}") for text in texts} == {form}


def test_normal_form_tells_answers_apart_and_needs_one():
    assert len({answer(rf"\boxed{{{text}}}") for text in ["1", "-1", "1/3", "0.33", "x", "yes"]}) == 6
    assert answer("no answer here") is None
    assert answer(r"\boxed{7}", think_end="</think>") is None


@pytest.mark.parametrize(
    "gold", ["", "  ", "???", "-", r"\frac{1", "see the solution above", "It is easy to see that it holds"]
)
def test_gold_answers_that_no_grader_can_read(gold):
    assert not parses(gold)


HOSTILE = [
    "5^(5^(5^5))",
    "5^{5^{5^5}}",
    "5**5**5**5",
    r"9^{9^{9x/x}}",
    "9^{99999999}",
    "((9^{999})^{999})^{999}",
    r"\left(9^{999}\right)^{999}",
    "99999999!",
    "((9!)!)!",
    "9!!!",
    r"\binom{999999999}{99999999}",
    r"2^{100000!}",
    "(" * 60 + "1" + ")" * 60,
    "{" * 100_000 + "1" + "}" * 100_000,
    r"\frac{" * 60 + "1" + "}{2}" * 60,
    "7" * 3_000_000,
    r"\sum_{n=1}^{10^{9}} n",
]


@pytest.mark.parametrize("expression", HOSTILE, ids=lambda text: text[:20])
def test_hostile_expressions_are_refused_at_once(expression):
    started = time.monotonic()
    assert hard(expression)
    assert not correct(rf"\boxed{{{expression}}}", "7")
    assert not parses(expression)
    assert answer(rf"\boxed{{{expression}}}") in (None, expression)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "expression", ["2^{10}", "e^{-x^2}", "10^{100}", "100!", r"x^{12}+y^{13}+z^{14}+w^{15}", "3^{2n+1}"]
)
def test_ordinary_expressions_are_not_refused(expression):
    assert not hard(expression)
    assert equal(expression, expression) and parses(expression)


def test_many_unclosed_boxes_take_linear_time():
    started = time.monotonic()
    assert extract(r"\boxed{" * 100_000) is None
    assert extract("answer: " * 100_000 + "5") == "5"
    assert time.monotonic() - started < 10


def test_grading_works_in_a_thread():
    rewards_math.equal.cache_clear()
    rewards_math._expression.cache_clear()
    results = []
    thread = threading.Thread(target=lambda: results.append(accuracy([r"\boxed{\frac{10}{4}}"], [r"2\frac12"])))
    thread.start()
    thread.join(60)
    assert results == [[1.0]]


def test_boxed_format():
    texts = [r"\boxed{1}", "1", r"\boxed{}", r"\boxed{1", r"\boxed{1}</think>2"]
    assert boxed(texts) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert boxed([r"\boxed{1}", r"x</think>\boxed{1}"], think_end="</think>") == [0.0, 1.0]


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test", "math500", "aime24", "amc23"])
def test_published_gold_answers_are_readable_and_equal_themselves(name, data_dir):
    gold = [str(json.loads(line)["answer"]) for line in (data_dir / f"{name}.jsonl").read_text().split("\n") if line]
    assert [text for text in gold if not parses(text)] == []
    sample = gold[:: max(1, len(gold) // 200)][:200]
    assert [text for text in sample if not correct(rf"Hence \boxed{{{text}}} follows.", text)] == []
    assert [text for text in sample if not correct(f"The answer is ${text}$.", text)] == []
    following = [(a, b) for a, b in itertools.pairwise(sample) if a != b]
    wrongly = [(a, b) for a, b in following if correct(rf"\boxed{{{a}}}", b)]
    assert len(wrongly) <= len(following) // 50, wrongly


def test_published_grades_of_completions_are_reproduced(data_dir):
    for name, last_number in (("traces_qwen_math", False), ("traces_gsm8k", True)):
        rows = [json.loads(line) for line in (data_dir / f"{name}.jsonl").read_text().split("\n") if line]
        graded = [correct(row["completion"], str(row["answer"]), last_number=last_number) for row in rows]
        assert [row["id"] for row, got in zip(rows, graded, strict=True) if got != row["correct"]] == []
