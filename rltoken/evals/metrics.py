"""Metrics of graded completions, as pure functions. Intervals are two-sided and by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy import stats

AT_BUDGET = "correct@"
"""What the name of a column begins with that holds correctness at a budget; the budget in tokens follows."""
OUTCOME = "outcome"
"""The column that holds what became of the grading; `outcome@B` is that of the answer forced at budget B."""
UNGRADED, MALFORMED = "ungraded", "malformed"
"""Besides the outcomes of `rltoken.rewards.outcomes`: no gold answer to grade by; a right answer after thinking that
was ended twice or abandoned."""


@dataclass(frozen=True)
class Estimate:
    """A mean, half the width of its interval, and the number of independent units behind it (problems or seeds)."""

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half_width

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec or '.3f'}} ± {self.half_width:{spec or '.3f'}}"


def mean_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean of independent values with its t interval: mean ± t(level, n - 1) * s / sqrt(n), s with n - 1.

    One value alone has an infinite interval.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, math.inf, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    quantile = float(stats.t.ppf((1 + level) / 2, n - 1))
    return Estimate(mean, quantile * math.sqrt(variance / n), n)


def clustered(table: pd.DataFrame, column: str, level: float = 0.95) -> Estimate:
    """Mean of a column with an interval clustered by problem: the samples of one problem are not independent.

    Args:
        table: one row per sample, with the problem in `id`; every problem has equally many samples.
        column: what to average.
    """
    return mean_interval(table.groupby("id", sort=False)[column].mean().tolist(), level)


def paired_interval(after: Sequence[float], before: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean difference of paired values (the same seeds or problems) with its t interval.

    Raises:
        ValueError: the two have different lengths.
    """
    return mean_interval([a - b for a, b in zip(after, before, strict=True)], level)


def budgets_of(table: pd.DataFrame) -> list[int]:
    """The budgets at which answers were forced, ascending."""
    return sorted(int(name.removeprefix(AT_BUDGET)) for name in table.columns if name.startswith(AT_BUDGET))


def under_budgets(table: pd.DataFrame) -> dict[str, Any]:
    """Accuracy of the answers forced at each budget, with intervals clustered by problem.

    Returns:
        budgets (tokens), budget_accuracy and its half widths, one per budget; anytime_accuracy, the mean over the
        budgets, and final_accuracy, that of the last one (BRPO, arXiv 2505.13438, section 4), with their half widths.
        Nothing where no answer was forced.
    """
    budgets = budgets_of(table)
    if not budgets:
        return {}
    columns = [f"{AT_BUDGET}{budget}" for budget in budgets]
    each = [clustered(table, column) for column in columns]
    anytime = clustered(table.assign(anytime=table[columns].mean(axis=1)), "anytime")
    return {
        "budgets": budgets,
        "budget_accuracy": [estimate.mean for estimate in each],
        "budget_accuracy_half_width": [_finite(estimate.half_width) for estimate in each],
        "anytime_accuracy": anytime.mean,
        "anytime_accuracy_half_width": _finite(anytime.half_width),
        "final_accuracy": each[-1].mean,
        "final_accuracy_half_width": _finite(each[-1].half_width),
    }


def summary(table: pd.DataFrame) -> dict[str, Any]:
    """The numbers of one evaluation that the report prints.

    Returns:
        accuracy with its interval clustered by problem; thinking tokens (mean with interval, median, 95th percentile);
        completion tokens (mean); the share of completions that were cut; the numbers of problems and samples; how many
        completions and forced answers met each outcome of the grader; and what `under_budgets` gives. One problem alone
        has no interval: None.
    """
    accuracy, thinking = clustered(table, "correct"), clustered(table, "thinking_tokens")
    return {
        **under_budgets(table),
        "accuracy": accuracy.mean,
        "accuracy_half_width": _finite(accuracy.half_width),
        "thinking_tokens": thinking.mean,
        "thinking_tokens_half_width": _finite(thinking.half_width),
        "thinking_tokens_median": float(table["thinking_tokens"].median()),
        "thinking_tokens_p95": float(table["thinking_tokens"].quantile(0.95)),
        "completion_tokens": float(table["completion_tokens"].mean()),
        "truncated": float(table["truncated"].mean()),
        "problems": int(table["id"].nunique()),
        "samples": len(table),
        "outcomes": counted(table, [OUTCOME]),
        "forced_outcomes": counted(table, [f"{OUTCOME}@{budget}" for budget in budgets_of(table)]),
    }


def counted(table: pd.DataFrame, columns: Sequence[str]) -> dict[str, int]:
    """How often each outcome stands in the columns, the most frequent first."""
    return {name: int(count) for name, count in table[columns].stack().value_counts().items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
