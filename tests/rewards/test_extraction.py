"""Where the final answer stands: boxes, headers, fallbacks, thinking, options, and texts of megabytes."""

import time

import pytest

from rltoken.rewards import extraction
from rltoken.rewards.extraction import MAX_CHARS, extract
from rltoken.rewards.format import boxed
from rltoken.rewards.text import boxed_answer, last_box


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
        (r"\boxed{7} The answer is in the box. Is it right?", "7"),
        (r"The answer is 6. \boxed{7}", "7"),
        (r"\boxed{6} The final answer is $7$. I hope it is correct.", "7"),
        (r"\boxed{6} The final answer is 7", "7"),
        (r"\boxed{6} The final answer is minus 7", "-7"),
        (r"\boxed{6} The final answer is above.", "6"),
        (r"So \boxed{5} is wrong, answer: 6", "6"),
        (r"\boxed{5} is incorrect. **Answer**: $6$", "6"),
        (r"\boxed{5} is not wrong.", "5"),
        (r"\boxed{5} is wrong. Answer: 6 or 7", "6 or 7"),
        (r"\boxed{5} The final answer is 6 or 7.", "6 or 7"),
        (r"\boxed{5} The final answer is $6$ and $7$.", "$6$ and $7$"),
        (r"\boxed{5}. The answer is 6 less than 11.", "5"),
        (r"\boxed{5} is wrong. Answer: I do not know", "5"),
        (r"\boxed 5", "5"),
        (r"$\boxed 12$.", "12"),
        (r"$\boxed 1/2$", "1/2"),
        (r"\boxed 5x", None),
        (r"\boxed five", None),
        (r"\boxed7", "7"),
        (r"$\boxed12$", "12"),
        (r"\boxed7x", None),
        (r"\boxed\frac12", r"\frac12"),
        (r"\boxed\dfrac{1}{2}", r"\dfrac{1}{2}"),
        (r"The answer is not \boxed{5}.", "not 5"),
        (r"It isn't \boxed{5}", "not 5"),
        (r"It cannot be $\boxed{5}$", "not 5"),
        (r"It is not equal to \boxed{5}", "not 5"),
        (r"not \boxed{5} or \boxed{6}", "not 5, 6"),
        (r"It can't be \boxed{5}, so it is \boxed{6}", "6"),
        (r"The answer is \boxed{5}, not \boxed{4}", "5"),
        (r"This is not hard: \boxed{5}", "5"),
        (r"It is not 4. \boxed{5}", "5"),
    ],
)
def test_boxes(text, found):
    assert extract(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"\[ \boxed{-2} \quad \text{and} \quad \boxed{1}. \]", "-2, 1"),
        (r"\boxed{1}, \boxed{2}, or \boxed{3}", "1, 2, 3"),
        (r"\boxed{1}\boxed{2}", "1, 2"),
        (r"\boxed{7}\boxed{7}", "7"),
        (r"\boxed{6}. Then \boxed{7}", "7"),
        (r"\boxed{6}. \boxed{7}", "7"),
        (r"\boxed{x = \boxed{3}}", "3"),
    ],
)
def test_boxes_that_are_one_answer(text, found):
    assert boxed_answer(text) == found
    assert last_box(text) == found.rpartition(", ")[2]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"<think>\boxed{1}</think> so \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> so it is two", None),
        (r"\boxed{1}</think>\boxed{2}</think>\boxed{3}", "3"),
        (r"\boxed{1}</think>\boxed{2}</think>", None),
    ],
)
def test_only_what_follows_the_last_end_of_thinking_counts(text, found):
    assert extract(text) == found
    assert extract(text, think_end="</think>") == found


def test_a_model_that_thinks_must_end_its_thinking():
    assert extract(r"maybe \boxed{7}") == "7"
    assert extract(r"maybe \boxed{7}", think_end="</think>") is None
    assert extract(r"maybe \boxed{6}</think>\boxed{7}", think_end="</think>") == "7"
    assert extract(r"[THINK]\boxed{6}[/THINK]\boxed{7}", think_end="[/THINK]") == "7"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("6 * 3 = 18\n#### 18", "18"),
        ("#### 17\n#### 18", "18"),
        ("The answer is 18.", "18"),
        ("The answer is 18. I hope it is correct.", "18"),
        ("The answer is 3.5. That is all.", "3.5"),
        ("The answer is not 17. The answer is 18", "18"),
        ("The answer is 18. Hence the answer is", "18"),
        ("Answer:\n18", "18"),
        ("**Answer**: 18", "18"),
        ("### Answer\n18", "18"),
        ("#### Answer\n18", "18"),
        ("**Answer**\n\n18", "18"),
        ("The right answer\n18", None),
        ("Answer = 18", "18"),
        ("**Final Answer**\n\n18", "18"),
        ("I cannot say what the answer is", None),
        ("The final answer is: **18**", "18"),
        ("**Answer:** 18 dollars per day", "18"),
        ("The answer is the sum of both, 18.", "18"),
        ("The answer is therefore $x = 18$", "x = 18"),
        (r"the answer is $\frac{1}{2}$, as wanted", r"\frac{1}{2}"),
        ("The answer is\n\\[\n18\n\\]", "18"),
        (r"The answer is \(x\).", "x"),
        (r"The answer is $1$ and $2$.", "$1$ and $2$"),
        (r"The answer is $-1$, $2$, or \(3\).", r"$-1$, $2$, or \(3\)"),
        (r"The answer is \$18.", r"\$18"),
        ("The answer is $18 and not $20.", "$18 and not $20"),
        ("The answer is Evelyn.", "Evelyn"),
        ("The answer is sqrt(2).", "sqrt(2)"),
        ("The answer is 18<|im_end|>", "18"),
        ("<answer>18</answer>", "18"),
        ("<answer>\n$18$\n</answer>", "18"),
        ("Write <answer></answer>. Answer: 18", "18"),
        ("Answer\N{FULLWIDTH COLON}18", "18"),
        ("The answer is minus 18.", "-18"),
        ("The answer is negative $x+1$.", "-(x+1)"),
        ("The answer is minus the sum, 18.", "minus the sum, 18"),
        ("The answer is equal to minus 18", "-18"),
        ("The answer is the same as 20 minus 18", "18"),
        ("The answer is 18 more apples.", "18"),
        ("The answer is 18 meters squared.", "18"),
        ("The answer is 18 apples, because 9+9=18", "18"),
        ("The answer is $18$ since $x=9$.", "18"),
        ("The answer is $18$ apples, not $20$.", "18"),
        ("The answer is $18$ million.", "18 million"),
        ("The answer is $18$ plus $x$.", "18 plus x"),
        ("She has 18 eggs left", None),
        ("", None),
    ],
)
def test_answer_headers(text, found):
    assert extract(text) == found


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B)", "B"),
        ("The answer is (b).", "b"),
        ("Answer: B. Because it is even.", "B"),
        ("Answer: B) 12", "B"),
        ("**Answer:** (B) twelve apples", "B"),
        ("The answer is B", "B"),
        ("The answer is (a)+b", "(a)+b"),
        ("The answer is A. B. C. D.", "A. B. C. D."),
        ("The answer is A. 3 B. 4", "A. 3 B. 4"),
        ("The answer is A. Because A. is even.", "A"),
        ("The answer is Ada", "Ada"),
        ("The answer is A, not B.", "A"),
        ("The answer is (A) rather than (B)", "A"),
        ("The answer is A instead of B", "A"),
        ("The answer is A, not", "A, not"),
        ("The answer is A or B", "A or B"),
        ("<answer>(B)</answer>", "B"),
    ],
)
def test_options(text, letter):
    assert extract(text) == letter


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("She has 18 eggs left", "18"),
        ("from 7-5 to -1,200.50", "-1,200.50"),
        ("7-5", "5"),
        ("three quarters is 3/4", "3/4"),
        ("it costs 2,74 euros", "2,74"),
        ("1,234,567", "1,234,567"),
        ("room B12 holds 30", "30"),
        ("a room B12", None),
        (r"so $x = \frac{1}{2}$.", r"x = \frac{1}{2}"),
        (r"\(x = 1\), that is 5", "5"),
        (r"first 5, then \[ x^2 \]", "x^2"),
        ("she pays $5 and gets $3 back", "3"),
        ("it is at minus 5", "-5"),
        ("7 minus 5", "5"),
        ("about 5 million", "5 million"),
        ("", None),
    ],
)
def test_last_formula_or_number_is_taken_only_when_asked_for(text, found):
    assert extract(text) is None
    assert extract(text, last_number=True) == found


def test_what_is_too_long_is_no_answer():
    assert extract(rf"\boxed{{{'7' * MAX_CHARS}}}") == "7" * MAX_CHARS
    assert extract(rf"\boxed{{{'7' * (MAX_CHARS + 1)}}}") is None


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 200_000,
        r"\boxed{" * 100_000 + "1" + "}" * 100_000,
        r"\boxed{1}, " * 100_000,
        "{" * 1_000_000,
        "answer: " * 200_000,
        "answer" + " " * 1_000_000,
        "final " * 200_000,
        r"\( x " * 300_000,
        r"\[ x " * 300_000,
        "$ x " * 300_000,
        "1,234," * 200_000,
        "7" * 2_000_000,
        "\\" * 1_000_000,
        "the answer is " + "$1$ and " * 100_000,
        r"\boxed{1} is wrong " * 50_000 + "answer: " * 100_000,
        r"\boxed " + "1," * 500_000 + "x",
        r"\boxed" + " " * 1_000_000,
        r"\boxed\frac{" * 100_000,
        r"not \boxed{1} " * 50_000,
        "the answer is minus " * 50_000,
        "<answer>" * 100_000,
        "#" * 1_000_000,
        "answer ** " * 100_000,
    ],
    ids=lambda text: text[:12],
)
def test_megabytes_take_linear_time(text):
    started = time.process_time()
    found = extract(text, last_number=True)
    assert found is None or len(found) <= MAX_CHARS
    assert time.process_time() - started < 5


def test_boxed_format():
    texts = [r"\boxed{1}", "1", r"\boxed{}", r"\boxed{1", r"\boxed{1}</think>2"]
    assert boxed(texts) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert boxed([r"\boxed{1}", r"x</think>\boxed{1}"], think_end="</think>") == [0.0, 1.0]


def test_a_known_text_costs_no_search_and_the_settings_count(monkeypatch):
    text = r"first \boxed{1}, and known from now on: 2"
    assert extract(text) == "1"
    monkeypatch.setattr(extraction, "_extracted", lambda *_: "searched")
    assert extract(text[:10] + text[10:]) == "1"
    assert extract(text, last_number=True) == "searched"
    monkeypatch.setattr(extraction, "MAX_KNOWN", 0)
    assert extract(text + " ") == extract(text) == "searched"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"-\boxed{5}", "-5"),
        (r"So $x = -\boxed{\frac12}$.", r"-\frac12"),
        (r"It is minus \boxed{5}.", "-5"),
        (r"The answer is negative $\boxed{x+1}$.", "-(x+1)"),
        (r"The answer: - \boxed{7}", "-7"),
        (r"We get $7 - 2 = \boxed{5}$.", "5"),
        (r"Thus $9 - \boxed{4}$ is what is left.", "4"),
        (r"a well-\boxed{5}", "5"),
        (r"The answer is not \boxed{5}. The answer is 6", "6"),
        (r"The answer is not \boxed{5}.", "not 5"),
        (r"It is \boxed{5}. Answer: 6", "5"),
    ],
)
def test_a_sign_before_a_box_and_what_follows_a_denied_one(text, answer):
    assert extract(text) == answer
