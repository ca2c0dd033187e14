"""Metrics of graded completions, as pure functions. Intervals are two-sided and by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from scipy import stats


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


def summary(table: pd.DataFrame) -> dict[str, float | None]:
    """The numbers of one evaluation that the report prints.

    Returns:
        accuracy with its interval clustered by problem; thinking tokens (mean with interval, median, 95th percentile);
        completion tokens (mean); the share of completions that were cut; the numbers of problems and samples. One
        problem alone has no interval: None.
    """
    accuracy, thinking = clustered(table, "correct"), clustered(table, "thinking_tokens")
    return {
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
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
