"""The summary of a table of completions, and what the terminal shows of it."""

import io
import json

import pandas as pd
import pytest
from rich.console import Console

from rltoken import report
from rltoken.evals.metrics import summary, tokens, under_budgets


def table(**columns):
    """Two problems with two samples each: a is right twice, b once."""
    return pd.DataFrame(
        {
            "id": ["a", "a", "b", "b"],
            "correct": [1.0, 1.0, 1.0, 0.0],
            "outcome": ["correct", "correct", "correct", "wrong"],
            "thinking_tokens": [10, 20, 30, 60],
            "completion_tokens": [12, 23, 34, 65],
            "truncated": [False, False, False, True],
            **columns,
        }
    )


def budgets(*rows):
    """Correctness at 10 and at 40 tokens."""
    return {f"correct@{b}": list(column) for b, column in zip((10, 40), zip(*rows, strict=True), strict=True)} | {
        f"outcome@{b}": "wrong" for b in (10, 40)
    }


CURVE = budgets((1.0, 1.0), (0.0, 1.0), (0.0, 1.0), (0.0, 0.0))


def printed(*summaries):
    """What the comparison of several summaries looks like."""
    stream = io.StringIO()
    named = dict(zip("xyz", summaries, strict=False))
    report.show_comparison(named, console=Console(file=stream, width=200))
    return stream.getvalue()


def cells(text, label):
    """The cells of the row that begins with a label."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"│ {label} "))
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_tokens_of_each_part_and_of_correct_and_wrong_completions():
    found = tokens(table())
    assert (found["thinking_tokens"], found["answer_tokens"], found["completion_tokens"]) == (30.0, 3.5, 33.5)
    assert (found["thinking_tokens_median"], found["answer_tokens_median"]) == (25.0, 3.5)
    # the 95th percentile stands at rank .95 * 3 = 2.85 of 10 20 30 60: 30 + .85 * 30
    assert found["thinking_tokens_p95"] == pytest.approx(55.5)
    assert (found["thinking_tokens_correct"], found["thinking_tokens_wrong"]) == (20.0, 60.0)
    assert (found["completion_tokens_correct_median"], found["answer_tokens_wrong_p95"]) == (23.0, 5.0)
    nothing_wrong = tokens(table(correct=1.0))
    assert nothing_wrong["completion_tokens_wrong"] is None and nothing_wrong["thinking_tokens_wrong_p95"] is None


def test_budgets_have_an_area_and_a_regret():
    found = under_budgets(table(**CURVE))
    assert found["budget_accuracy"] == [0.25, 0.75]
    assert found["anytime_accuracy"] == 0.5
    # the mean curve: 10 * .125 + 30 * .5 = 16.25 of 40
    assert found["anytime_area"] == pytest.approx(0.40625) and found["normalised_regret"] == pytest.approx(0.59375)
    low, high = found["final_accuracy_interval"]
    assert low < found["final_accuracy"] < high and found["final_accuracy_half_width"] == pytest.approx(
        (high - low) / 2
    )


def test_a_summary_is_json_with_the_numbers_of_each_problem():
    found = summary(table(answer_class=[0, 0, 1, 2], **CURVE))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["accuracy"], found["k"], found["pass_at_k"], found["majority_at_k"]) == (0.75, [2], [1.0], [0.75])
    assert found["e3"] == pytest.approx(75**2 / 33.5)
    assert found["problem_accuracy"] == {"a": 1.0, "b": 0.5}
    assert found["problem_thinking_tokens"] == {"a": 15.0, "b": 45.0}
    alone = summary(table(**CURVE).iloc[:2])
    assert alone["budget_accuracy_half_width"] == alone["budget_accuracy_interval"] == [None, None]
    assert alone["accuracy_interval"] is alone["accuracy_half_width"] is alone["pass_at_k_interval"][0] is None
    assert json.loads(json.dumps(alone, allow_nan=False)) == alone


def test_the_table_shows_what_samples_and_budgets_allow():
    first = summary(table(answer_class=[0, 0, 1, 2], **CURVE))
    second = summary(table(correct=1.0, answer_class=0, **budgets(*[(1.0, 1.0)] * 4)))
    text = printed(first, second)
    assert cells(text, "accuracy (avg@2)")[0].startswith("0.750 [0.") and "maj@2" in text
    assert cells(text, "pass@2")[1].startswith("1.000 [0.")
    assert cells(text, "thinking tokens, wrong") == ["60.0", "-"]
    # .75 is reached at 40 by the first; the second is above it at 10 already
    assert cells(text, "tokens that reach 0.750") == ["40.0", "10.0"]
    assert cells(printed(second, first), "tokens that reach 1.000") == ["10.0", "never"]
    assert "maj@" not in printed(summary(table())) and "tokens that reach" not in printed(first)
    single = printed(summary(table().iloc[::2]))
    assert "accuracy (avg@1)" in single and "pass@" not in single


def test_models_are_compared_with_the_first_over_the_same_problems():
    first, second = summary(table()), summary(table(correct=0.0))
    text = printed(first, second, second)
    assert [line[:32] for line in text.splitlines() if " - x, accuracy" in line] == [
        "y - x, accuracy: -0.750 (95 % in",
        "z - x, accuracy: -0.750 (95 % in",
    ]
    assert text.count("thinking tokens: +0.0 (95 %") == 2 and "paired over 2 problems): no evidence" in text
    other = summary(table(id=["a", "a", "c", "c"]))
    assert "y - x" not in printed(first, other)


@pytest.mark.parametrize("columns", [CURVE, {}])
def test_curves_are_drawn_with_and_without_intervals(columns, tmp_path):
    made = table(**columns)
    report.curves({"x": summary(made), "alone": summary(made.iloc[:2])}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_a_report_of_before_there_were_these_numbers_is_shown_still():
    new = ("interval", "_at_k", "problem_", "_correct", "_wrong", "e3", "area", "regret")
    old = {name: value for name, value in summary(table(**CURVE)).items() if not any(part in name for part in new)}
    stream = io.StringIO()
    report.show({"name": "old", "before": old, "after": old}, Console(file=stream, width=200))
    assert cells(stream.getvalue(), "accuracy (avg@2)") == [f"0.750 ± {old['accuracy_half_width']:.3f}"] * 2
