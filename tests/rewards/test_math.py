"""Equality of answers, outcomes and rewards, votes, gold checks, and what is refused by its syntax."""

import json
import pickle
import threading
from pathlib import Path

import pytest

from rltoken.errors import UserError
from rltoken.rewards.equality import Rules, equal, parses, readable
from rltoken.rewards.limits import hard
from rltoken.rewards.math import accuracy, classes, gradable, judge, outcomes
from rltoken.rewards.outcomes import FAILURES, Outcome, shares

PROBLEMS = [
    json.loads(line)
    for line in Path(__file__).with_name("own_problems.jsonl").read_text(encoding="utf-8").split("\n")
    if line
]
HANGS = r"\int_0^1 \frac{x^7}{\sin(x)+e^{x^2}} dx"


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: str(problem["gold"]))
def test_own_problems(problem):
    golds = [problem["gold"]] if isinstance(problem["gold"], str) else problem["gold"]
    assert all(parses(gold) for gold in golds)
    assert [form for form in problem["right"] if not any(equal(form, gold) for gold in golds)] == []
    assert [form for form in problem["wrong"] if any(equal(form, gold) for gold in golds)] == []


def test_there_are_enough_own_problems():
    assert len(PROBLEMS) >= 60


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("", "5"),
        ("0.33", r"\frac{1}{3}"),
        ("[1, 2)", "(1, 2)"),
        ("(3, -2)", "(-2, 3)"),
        (r"\{1,2\}", "(1,2)"),
        ("(1,2)", r"\{1,2\}"),
        ("p - q", "q - p"),
        ("listen", "silent"),
        ("on", r"\text{no}"),
        ("x", "x_1"),
        (r"10^{-20}", r"2\times10^{-20}"),
        ("32, 349", "32349"),
        ("nan", "5"),
        ("5 or maybe 6 or even 7 apples", "5"),
        ("1/0", r"\infty"),
        ("6", "6m"),
    ],
)
def test_unequal_answers(prediction, gold):
    assert not equal(prediction, gold)


def test_the_gold_answer_decides_how_an_assignment_is_read():
    assert equal("x = 5", "5") and equal("5", "x = 5")
    assert not equal("11a + c", "7 = 11a + c")
    assert equal("6 m", "6") and not equal("6", "6m")


def test_tolerance_is_relative_and_off_by_default():
    assert not equal("3.14", r"\pi")
    assert equal("3.14", r"\pi", Rules(tolerance=1e-3))
    assert not equal("3.15", r"\pi", Rules(tolerance=1e-3))
    assert equal("(0.6, 2.6667]", r"(\frac35, \frac83]", Rules(tolerance=1e-4))
    assert equal(
        r"\begin{pmatrix}0.33\\2\end{pmatrix}", r"\begin{pmatrix}\frac13\\2\end{pmatrix}", Rules(tolerance=0.02)
    )
    assert not equal("(0.6, 2.6667)", r"(\frac35, \frac83]", Rules(tolerance=1e-4))
    assert not equal("1000001", "1000002") and equal("1000001", "1000002", Rules(tolerance=1e-5))
    assert not equal("x", "y", Rules(tolerance=1.0))


def test_percent_signs_may_be_bare_unless_told_otherwise():
    for bare in (True, False):
        assert equal("50%", "0.5", Rules(bare_percent=bare))
        assert equal(r"12.5\%", "12.5 percent", Rules(bare_percent=bare))
        assert not equal("0.5", "50", Rules(bare_percent=bare))
        assert not equal("0.5%", "0.5", Rules(bare_percent=bare))
        assert equal("12.5", r"12.5\%", Rules(bare_percent=bare)) is bare
        assert equal(r"50\%", "50", Rules(bare_percent=bare)) is bare
        assert equal("0.5", "50%", Rules(bare_percent=bare)) is not bare
        assert equal("5000%", "50", Rules(bare_percent=bare)) is not bare


@pytest.mark.parametrize("gold", ["50%", "50", "0.5", r"\frac12", "1", r"0.5\%", "1%"])
def test_no_two_bare_numbers_a_factor_of_100_apart_are_both_right(gold):
    value = gold.replace("%", "").replace("\\", "") if "%" in gold else gold
    assert equal(value, gold)
    assert not equal(f"{value}/100", gold) and not equal(rf"{value}\cdot 100", gold)


@pytest.mark.parametrize(
    "gold", ["", "  ", "???", "-", r"\frac{1", "see the solution above", "It is easy to see that it holds", "7" * 501]
)
def test_gold_answers_that_no_grader_can_read(gold):
    assert not parses(gold)
    assert outcomes([r"\boxed{1}"], [gold], workers=1) == [None]


def test_gradable_is_parses_for_many_and_for_several():
    golds = ["5", 7, r"\frac12", "???", ["???", "3"], ["???"], [], r"\text{no real solution}"]
    assert gradable(golds, workers=1) == [True, True, True, False, True, False, False, True]


def test_every_outcome_and_its_reward():
    completions = [r"\boxed{7.0}", r"\boxed{8}", "no idea", r"\boxed{\frac{7}}", rf"\boxed{{{HANGS}}}", r"\boxed{7}"]
    expected = ["correct", "wrong", "no_answer", "unparsable", "timed_out"]
    gold = ["7"] * 5 + ["see the solution above"]
    assert outcomes(completions, gold, workers=2, seconds=1.0) == [*map(Outcome, expected), None]
    assert accuracy(completions, gold, workers=2, seconds=1.0) == [1.0, 0.0, 0.0, 0.0, 0.0, None]
    assert accuracy(completions, gold, workers=2, seconds=1.0, on_failure=None)[3:] == [0.0, None, None]


def test_a_grader_that_raises_is_no_wrong_answer(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("rltoken.rewards.math.equal", broken)
    assert outcomes([r"\boxed{\frac{13}{17}}"], ["7"], workers=0) == [Outcome.CRASHED]


def test_accuracy_has_trls_signature_for_both_forms_of_completions():
    texts = [r"\boxed{7}", r"\boxed{8}", "no idea", r"\boxed{7}", r"\boxed{8}"]
    gold = ["7", "7", "7", "see the solution above", ["7", "8"]]
    conversational = [[{"role": "assistant", "content": text}] for text in texts]
    expected = [1.0, 0.0, 0.0, None, 1.0]
    assert accuracy(texts, gold, workers=1) == expected
    assert accuracy(prompts=gold, completions=conversational, answer=gold, workers=1, trainer_state=None) == expected


def test_accuracy_logs_outcomes_and_the_share_of_each():
    columns, metrics = {}, {}
    texts = [r"\boxed{7}", r"\boxed{8}", "no idea", r"\boxed{7}", r"\boxed{7}"]
    gold = ["7", "7", "7", "???", "7"]
    accuracy(texts, gold, workers=1, log_extra=columns.__setitem__, log_metric=metrics.__setitem__)
    assert columns == {"outcome": ["correct", "wrong", "no_answer", None, "correct"]}
    assert metrics == {
        "outcome/correct": 0.5,
        "outcome/wrong": 0.25,
        "outcome/no_answer": 0.25,
        "outcome/unparsable": 0.0,
        "outcome/timed_out": 0.0,
        "outcome/crashed": 0.0,
    }


def test_shares_name_every_outcome_even_of_nothing():
    assert shares([]) == dict.fromkeys(Outcome, 0.0)
    assert sum(shares([Outcome.WRONG, None, Outcome.CRASHED]).values()) == 1.0


def test_the_judge_can_be_sent_to_a_process():
    item = (r"\frac{14}{2}", ("7",), Rules())
    assert pickle.loads(pickle.dumps(judge))(pickle.loads(pickle.dumps(item))) is Outcome.CORRECT


def test_grading_works_in_a_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(accuracy([r"\boxed{\frac{10}{4}}"], [r"2\frac12"])))
    thread.start()
    thread.join(60)
    assert results == [[1.0]]


@pytest.mark.parametrize(
    ("answers", "numbers"),
    [
        (["0.5", r"\frac{1}{2}", "1/2", r"\dfrac{2}{4}", "$.5$", "0.50", r"\frac12"], [0] * 7),
        (["1,000", "1000", r"1{,}000", "1000.0", r"\$1000", "999"], [0, 0, 0, 0, 0, 1]),
        (["(x+1)^2", "x^2+2x+1", "x^2+1", "(1+x)^2"], [0, 0, 1, 0]),
        ([r"\text{East}", "east", "West", "East."], [0, 0, 1, 0]),
        (["5", "x = 5", "x = 6", "6"], [0, 0, 1, 1]),
        (["B", "(B)", "C", "b"], [0, 0, 1, 0]),
        (["???", "!!!", "???"], [0, 1, 0]),
        (["1", "-1", "1/3", "0.33", "x", "yes"], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_classes_join_ways_to_write_an_answer(answers, numbers):
    assert classes([rf"\boxed{{{answer}}}" for answer in answers], [0] * len(answers), workers=2) == numbers


def test_classes_are_numbered_in_each_group_from_the_first_answer_on():
    texts = [r"\boxed{2}", r"\boxed{1}", "none", r"\boxed{1}", r"\boxed{\frac42}", r"\boxed{2}", "none"]
    assert classes(texts, [0, 0, 0, 1, 0, 1, 1], workers=2) == [0, 1, -1, 0, 0, 1, -1]
    assert classes(texts, [7, 7, 7, 7, 7, 7, 7], workers=2) == [0, 1, -1, 1, 0, 0, -1]
    assert classes([], []) == []
    assert classes([r"\boxed{7}"], [0], think_end="</think>") == [-1]
    assert classes(["about 7"], [0], last_number=True) == [0]


REFUSED = [
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
    "100!!",
    r"\binom{999999999}{99999999}",
    r"{999999999 \choose 99999999}",
    r"2^{100000!}",
    r"10^{10^{10}}",
    r"10^{10^3 \cdot 10^3}",
    "(" * 60 + "1" + ")" * 60,
    r"\frac{" * 60 + "1" + "}{2}" * 60,
    "7" * 501,
    "1e999999999",
    "1e-999999999",
    "1.5E99999999",
]


@pytest.mark.parametrize("expression", REFUSED, ids=lambda text: text[:20])
def test_what_never_ends_is_refused_by_its_syntax(expression):
    assert hard(expression)
    assert not readable(expression)
    assert not equal(expression, "7")


ORDINARY = [
    "2^{3^2}",
    "2^{2^{10}}",
    "(10^{10})^{10}",
    "2^{10000}",
    "10^{100}",
    "1e100",
    "e^{-x^2}",
    "100!",
    "(3!)!",
    r"2^{3!}",
    r"\frac{100!}{2^{50}}",
    r"\binom{100}{50}",
    r"x^{12}+y^{13}+z^{14}+w^{15}",
    "x^{1000000}",
    "3^{2n+1}",
    "2^{(n+1)^2}",
    r"2^{2021}\cdot 3^{2020}\cdot 5^{2019}",
    r"\left(\left(\frac12\right)^{3}\right)^{4}",
]


@pytest.mark.parametrize("expression", ORDINARY)
def test_ordinary_expressions_are_not_refused(expression):
    assert not hard(expression)
    assert parses(expression) and equal(f"{expression}+0", expression) and not equal(f"{expression}+1", expression)


CHANGED = (
    *("tenths", "sixths", "eighths", "hundredths", "thousandths", "lakh", "crore", "quadrillion", "tens", "score"),
    *("gross", "doubled", "halved", "squared", "factorial", "reciprocal", "negative", "point five", "root two"),
    *("at most", "multiplied by six", "less than x", "more than x", "below zero", "base two", "plus six", "cos x"),
)
"""What a number is another one with."""
NO_HEDGE = [
    (r"5\text{ or 6}", "5"),
    (r"3\text{ hours and 20 minutes}", "3"),
    ("5 million", "5"),
    (r"2.5 \text{ billion}", "2.5"),
    ("3 dozen", "3"),
    ("5 squared", "5"),
    ("5 halves", "5"),
    (r"3\text{i}", "3"),
    (r"2\mathrm{x}", "2"),
    (r"2\mathbf{x}", r"2\mathbf{y}"),
    ("(A) or (B)", "A"),
    ("(A) is wrong, so (B)", "A"),
    ("A: no, C", "A"),
    ("B. C", "B"),
    (r"17 \bmod 12", "17"),
    (r"5\pmod{7}", r"5\pmod{8}"),
    ("6=5", "5"),
    ("1=2=3=4=5", "5"),
    ("x+y=5", "5"),
    ("x^2=5", "5"),
    ("2x=5", "5"),
    ("|x|=5", "5"),
    ("f'(x)", "f(x)"),
    (r"1,2,3,\ldots", "1,2,3"),
    (r"0.3\ldots", "0.3"),
    ("(b,a)=(5,6)", "(5,6)"),
    ("(b,a)=(5,6)", "(a,b)=(5,6)"),
    (r"\sin x=5", "5"),
    (r"\arctan x = 5", "5"),
    ("A. B. C. D.", "A"),
    (r"\begin{cases}x=1\\y=2\end{cases}", "x=2, y=1"),
    (r"\begin{cases}x&x>0\\-x&x<0\end{cases}", "x"),
    (r"\textcolor{red}{6}", "7"),
    ("fourteen", "40"),
    ("twenty-ten", "30"),
    ("2(3)", "5"),
    ("f2(3)", "6"),
    *((f"5 {word}", "5") for word in CHANGED),
    *((rf"5\text{{ {word}}}", "5") for word in CHANGED),
    (r"12\text{ base eight}", "12"),
    ("2 and a half", "2"),
    ("5 half", "2.5"),
    ("minus five", "5"),
    (r"\text{negative }5", "5"),
    (r"\not=5", "5"),
    (r"\sum_{k=1}^{10} k", "1"),
    (r"\sum_{k=1}^{10} k = 54", "55"),
    (r"\displaystyle 101", "101_2"),
    ("A^T", "A"),
    ("A", r"A^{\top}"),
    ("C", r"(D)\ 4"),
    ("third", r"\frac13"),
    ("twenty-third", r"\frac{20}{3}"),
    ("2.5(3)", r"2.5\overline{3}"),
    ("x=y=5", "6"),
]
PLAIN = [
    ("5 million", "5000000"),
    ("3 dozen", "36"),
    (r"\$5\text{ million}", "5{,}000{,}000"),
    (r"5\text{ million dollars}", "5000000"),
    (r"5\text{ cm}^2", "5"),
    (r"5\text{ cm^2}", "5"),
    (r"10\ \mathrm{m/s}", "10"),
    ("5 square units", "5"),
    ("x=2+3=5", "5"),
    ("1+1=2", "2"),
    (r"\text{Area}=5", "5"),
    ("P(5)=10", "10"),
    (r"\angle A = 30^\circ", "30"),
    (r"\frac{a}{b} = \frac12", r"\frac12"),
    ("f(x)=x+1", "x+1"),
    ("(B) 12", "B"),
    ("B. twelve", "B"),
    (r"5\pmod{7}", "5"),
    ("(a,b)=(5,6)", "(5,6)"),
    (r"\left(x, y\right) = (5,6)", "(5,6)"),
    ("(b,a)=(5,6)", "(b,a)=(5,6)"),
    (r"\cos 60^\circ=\frac12", r"\frac12"),
    (r"\begin{cases}x=1\\y=2\end{cases}", "x=1, y=2"),
    (r"\left\{\begin{cases} x &= 1 \\ y &= 2 \end{cases}\right.", "x=1, y=2"),
    (r"\color{red}6", "6"),
    (r"{\color{red} 6}", "6"),
    (r"\textcolor{red}{6}", "6"),
    (r"\textcolor{red}{\frac{1}{2}}", "0.5"),
    ("2(3)", "6"),
    ("2(3)+1", "7"),
    ("five", "5"),
    ("5", r"\text{Five}"),
    ("Twenty-one", "21"),
    ("ninety", "90"),
    ("half", r"\frac12"),
    ("one half", "0.5"),
    ("two-thirds", r"\frac23"),
    ("2 thirds", r"\frac23"),
    (r"5\text{ tenths}", "0.5"),
    ("a dozen", "12"),
    ("two hundred", "200"),
    ("3 lakh", "300000"),
    ("minus five", "-5"),
    (r"\text{negative five}", "-5"),
    (r"\text{minus }5", "-5"),
    ("minus one half", r"-\frac12"),
    ("negative infinity", r"-\infty"),
    ("5 more apples", "5"),
    ("5 feet below the lake", "5"),
    (r"\sum_{k=1}^{10} k", "55"),
    (r"x = \prod_{i=1}^{4} i = 24", "24"),
    ("x=y=5", "5"),
    (r"\displaystyle \text{(C)}", "C"),
    (r"\textstyle 101_2", "101_2"),
    (r"x \not= 2", r"x \ne 2"),
    (r"A^TB", r"A^{T}B"),
    ("D", r"(D)\ 4"),
    (r"\{x: -1<x<1\}", "(-1,1)"),
    (r"\binom52", "10"),
    (r"\dbinom{5}{2}", "10"),
    ("0.(3)", r"\frac13"),
    ("6.02 x 10^23", r"6.02\times10^{23}"),
]
OTHER_SCRIPTS = [
    ("2⅛", r"\frac{17}{8}"),
    ("2⁵", "32"),
    ("10⁻³", "0.001"),
    ("10²³", "10^{23}"),
    *((f"{chr(zero + 1)}{chr(zero + 2)}", "12") for zero in (0x0660, 0x06F0, 0x0966, 0xFF10)),
]
SAME_MEASURE = [
    ("3 km", r"3\text{ km}"),
    ("3 km", "3000 m"),
    (r"3000\text{ m}", r"3\text{ km}"),
    ("300 cents", r"\$3"),
    ("1 hour", "60 minutes"),
    ("72 km/h", r"20\text{ m/s}"),
    ("60 mph", "60 miles per hour"),
    ("2 square feet", "288 in^2"),
    ("2 liters", "2000 mL"),
    ("2 L", r"2000\text{ cm}^3"),
    ("5 apples", "5 pears"),
    ("2 h", r"2\text{ hours}"),
    ("3, 5 cm", "5, 3 cm"),
    ("3g+2m", "2m+3g"),
    ("5", "5 km"),
    ("5", "€5"),
    ("5", "5°C"),
    ("5", r"5\text{ radians}"),
    ("€5", "5 euros"),
    ("£2", "32 oz"),
    ("¥5 million", "5000000 yen"),
    ("5°C", r"5\text{ degrees Celsius}"),
    (r"5^{\circ}\mathrm{F}", "5 Fahrenheit"),
    (r"180^\circ", r"\pi\text{ radians}"),
    ("3 cm squared", r"3\text{ cm}^2"),
    ("1 hour 30 minutes", "90 minutes"),
    (r"1\text{ hour and }30\text{ minutes}", "1.5 hours"),
    ("5 feet 6 inches", "66 in"),
    ("1 h 30 min", "90"),
]
OTHER_MEASURE = [
    (r"\$3", "3 cents"),
    (r"3\text{ km}", r"3\text{ m}"),
    ("3 km", "3 m"),
    ("3 hours", "3 minutes"),
    (r"3\text{ cm}", r"3\text{ cm}^2"),
    ("3 km", "3 kg"),
    ("3 km/h", "3 m/s"),
    ("3 cm squared", "3 cm"),
    ("1 hour 30 minutes", "30 minutes"),
    ("1 hour 30 minutes", "1.3 hours"),
    ("30 minutes 1 hour", "31 minutes"),
    ("1 hour 30 meters", "30 meters"),
    (r"5^\circ", r"5\text{ radians}"),
    ("5 degrees", "5 rad"),
    ("5°C", "5°F"),
    ("5 Celsius", "5 Fahrenheit"),
    *((money, r"\$5") for money in ("€5", "£5", "¥5", "5 euros", "5 pounds", "5 yen")),
    ("€5", "£5"),
]
SPACED = [
    ("5 1/2", "51/2", False),
    ("5 1/2", r"\frac{11}{2}", True),
    ("2 3", "23", False),
    (r"1\ 2", "12", False),
    (r"1\quad 2", "12", False),
    ("(1 2, 3)", "(12,3)", False),
    ("1 000", "1000", True),
    (r"1\,000", "1000", True),
    ("x + 1", "x+1", True),
    (r"\left( 1, 2 \right)", "(1,2)", True),
]
LISTS = [
    ("1,5", "(1,5)", True),
    ("(1,5)", "1,5", True),
    ("5,1", "(1,5)", False),
    ("(5,1)", "1,5", False),
    ("5,1", "1,5", True),
    ("100,200", "100200", True),
    ("100200", "100,200", True),
    ("100, 200", "100,200", True),
    ("100200", "100, 200", False),
    ("100,200", "(100,200)", True),
    ("100200", "(100,200)", False),
    ("(100,200)", "100,200", False),
]
BASES = [
    ("1010_2", "10_{10}", True),
    ("101_{2}", "101_2", True),
    ("10", "10_{10}", True),
    ("10_{10}", "10", True),
    ("5_2", "5_2", True),
    ("101", "101_2", False),
    ("101_2", "101", False),
    ("5", "101_2", False),
    ("5_6", "5", False),
    ("5_2", "5_3", False),
]


@pytest.mark.parametrize(("prediction", "gold"), NO_HEDGE)
def test_what_says_more_than_the_gold_answer_is_not_it(prediction, gold):
    assert not equal(prediction, gold)


@pytest.mark.parametrize(("prediction", "gold"), PLAIN)
def test_units_magnitudes_names_and_steps_do_not_hide_an_answer(prediction, gold):
    assert equal(prediction, gold)


@pytest.mark.parametrize(("prediction", "gold"), OTHER_SCRIPTS)
def test_digits_of_other_scripts_and_raised_ones_are_read(prediction, gold):
    assert equal(prediction, gold)


@pytest.mark.parametrize(("prediction", "gold", "same"), SPACED)
def test_a_space_between_digits_is_no_nothing(prediction, gold, same):
    assert equal(prediction, gold) is same


@pytest.mark.parametrize(("prediction", "gold"), SAME_MEASURE)
def test_measures_are_equal_in_any_unit_of_their_kind(prediction, gold):
    assert equal(prediction, gold) and equal(gold, prediction)


@pytest.mark.parametrize(("prediction", "gold"), OTHER_MEASURE)
def test_a_number_in_another_unit_is_another_measure(prediction, gold):
    assert not equal(prediction, gold) and not equal(gold, prediction)


@pytest.mark.parametrize(("prediction", "gold", "same"), LISTS)
def test_brackets_make_a_list_ordered_and_commas_between_three_digits_make_a_number(prediction, gold, same):
    assert equal(prediction, gold) is same


@pytest.mark.parametrize(("prediction", "gold", "same"), BASES)
def test_a_base_is_part_of_an_answer(prediction, gold, same):
    assert equal(prediction, gold) is same


@pytest.mark.parametrize(
    "text",
    [
        *("not 5.", "less than 5", "between 4 and 5", "5 apples or 6 apples", "5 apples plus 6", "3 hours 20 minutes"),
        *("5 and a half", "5 and x", "5 apples as well as six pears", "simply 5 million", "3 sixteenths of an inch"),
        *("minus 5", "negative 5.", "minus $5$", "minus five", "equal to negative 5", "minus the value 5"),
        *(f"5 {word}" for word in CHANGED),
        *(f"$5$ {word}" for word in CHANGED),
        *("$5$ million.", "$5$ times $6$", "$5$ to the power of $2$", "$5$ remainder $2$", "$5$ minus one", "$5$/2"),
        *("$5$ of $6$", "$5$ < $x$", "$5$ hours $30$ minutes", "$5$, or maybe $6$", "$5$ + x", "$5$ as well as $6$"),
    ],
)
def test_a_header_does_not_make_part_of_a_sentence_an_answer(text):
    assert not {Outcome.CORRECT, *FAILURES} & set(outcomes([f"The answer is {text}"] * 2, ["5", "3"], workers=0))


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("minus 5.", "-5"),
        ("negative $5$", "-5"),
        ("minus five", "-5"),
        (r"minus $\frac{1}{2}$", "-0.5"),
        ("negative $x+1$", "-x-1"),
        ("equal to negative 5", "-5"),
        ("minus 5 million", "-5000000"),
        ("2 thirds", r"\frac23"),
        ("3 quarters", "0.75"),
        ("$5$ thousand", "5000"),
        ("simply 5 million.", "5000000"),
        ("$3$ dozen eggs", "36"),
        ("$5$% of all", r"5\%"),
        ("$x$ = $5$", "5"),
    ],
)
def test_what_changes_a_number_counts_after_a_header(text, gold):
    assert outcomes([f"The answer is {text}"], [gold], workers=0) == [Outcome.CORRECT]


@pytest.mark.parametrize(
    "text", [r"not \boxed{5}.", r"not $\boxed{5}$", r"not \[\boxed{5}\]", r"neither \boxed{5} nor \boxed{6}"]
)
@pytest.mark.parametrize("last_number", [True, False])
def test_a_box_that_is_denied_is_not_correct(text, last_number):
    for gold in ("5", "6", "5, 6"):
        found = outcomes([f"The answer is {text}"], [gold], last_number=last_number, workers=0)
        assert found[0] in (Outcome.WRONG, Outcome.UNPARSABLE)


def test_odd_columns_are_read_or_left_out():
    assert outcomes([r"\boxed{5}"] * 4, [None, [None, 5], (4, 5), []], workers=0) == [None, "correct", "correct", None]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": r"\boxed{5}"}]}]
    assert outcomes([[], parts], ["5", "5"], workers=0) == [Outcome.NO_ANSWER, Outcome.CORRECT]


@pytest.mark.parametrize("gold", [True, {"value": "5"}, ["5", ["6"]], [False], b"5", 5j, {5}])
def test_a_gold_answer_of_another_type_is_refused(gold):
    with pytest.raises(UserError, match=r"answer: a gold answer is a text, a number or a list of these"):
        accuracy([r"\boxed{5}"], [gold], workers=0)
    with pytest.raises(UserError, match="answer: "):
        gradable([gold], workers=0)


@pytest.mark.parametrize("gold", [None, "", " ", float("nan"), [], [None, float("nan")]])
def test_a_missing_gold_answer_leaves_the_completion_out(gold):
    assert accuracy([r"\boxed{5}"], [gold], workers=0) == [None]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("workers", value) for value in (-1, 1.5, True, "2")),
        *(("seconds", value) for value in (0, True, float("nan"), "5")),
    ],
)
def test_settings_of_the_pool_are_checked_where_none_is_needed(name, value):
    with pytest.raises(ValueError, match=f"{name}: "):
        accuracy([r"\boxed{5}"], ["5"], **{name: value})
    with pytest.raises(ValueError, match=f"{name}: "):
        classes([r"\boxed{5}"], [0], **{name: value})
    with pytest.raises(ValueError, match=f"{name}: "):
        gradable([], **{name: value})
