"""Intervals of means over problems, and a paired test between two evaluations, as pure functions.

What varies independently is the problem: its samples share its difficulty. So every interval here is that of a mean
over problems, each of which counts once, with the average of its samples. This is clustering by problem (Miller,
"Adding Error Bars to Evals", 2024, arXiv 2411.00640). With P problems, x_p their averages, m and v the mean and the
variance (with P - 1) of those, and t the quantile of Student's distribution with P - 1 degrees of freedom:

    any number       m +- t sqrt(v / P)
    shares           Wilson's score interval (1927) with t in place of the normal quantile, at n effective problems:
                     n = P (m (1 - m) + a) / (v + a),  a = 1 / (8 P)
                     (m + t^2 / 2n +- t sqrt(m (1 - m) / n + t^2 / 4n^2)) / (1 + t^2 / n)

m (1 - m) is the variance of problems that are always right or always wrong, so n is P where samples of a problem always
agree, and more where they do not (Korn and Graubard, Survey Methodology 24, 1998, for surveys). `a` is ours: near 0
and 1 the few problems that differ say little about v, and it pulls n to P there. docs/evaluation.md has the coverage
that was measured, and what else was tried.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95
"""The level of every interval that a report prints."""


@dataclass(frozen=True)
class Estimate:
    """A mean, its interval, and the number of independent units behind it (problems or seeds)."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the width of the interval, which need not be symmetric about the mean."""
        return (self.high - self.low) / 2

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec or '.3f'}} ± {self.half_width:{spec or '.3f'}}"


@dataclass(frozen=True)
class Comparison:
    """The mean difference of two evaluations of the same problems with its interval, and the p of no difference."""

    difference: Estimate
    p: float


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean of independent values with its t interval: mean ± t(level, n - 1) * s / sqrt(n), s with n - 1.

    One value alone has an infinite interval.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, -math.inf, math.inf, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half_width = float(stats.t.ppf((1 + level) / 2, n - 1)) * math.sqrt(variance / n)
    return Estimate(mean, mean - half_width, mean + half_width, n)


def linear_interval(value: float, parts: Sequence[float], level: float = LEVEL) -> Estimate:
    """A number that is no mean, with the t interval of its linear part.

    Args:
        value: the number, as a ratio of sums over problems.
        parts: what each problem adds to it, to first order; they sum to 0.
    """
    return mean_interval([value + len(parts) * part for part in parts], level)


def share_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean of the problems' shares, each in [0, 1], with the interval that `share_ends` gives.

    Raises:
        ValueError: a value outside [0, 1].
    """
    low, high = share_ends(values, level)
    return Estimate(math.fsum(values) / len(values), float(low), float(high), len(values))


def share_ends(values: ArrayLike, level: float = LEVEL) -> tuple[NDArray, NDArray]:
    """Ends of the interval of a mean of shares: Wilson's at the effective number of problems (see above).

    Args:
        values: [..., P] shares of P problems in [0, 1]; leading dimensions are independent evaluations.
        level: of the two-sided interval.

    Returns:
        [...] low and high, in [0, 1]; 0 and 1 where there is one problem alone.

    Raises:
        ValueError: a value outside [0, 1].
    """
    values = np.asarray(values, dtype=float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("there are values outside [0, 1], which are no shares; take mean_interval")
    problems = values.shape[-1]
    mean = values.mean(-1)
    if problems < 2:
        return np.zeros_like(mean), np.ones_like(mean)
    t = stats.t.ppf((1 + level) / 2, problems - 1)
    between, prior = mean * (1 - mean), 1 / (8 * problems)
    n = problems * (between + prior) / (values.var(-1, ddof=1) + prior)
    centre = mean + t**2 / (2 * n)
    spread = t * np.sqrt(between / n + (t / (2 * n)) ** 2)
    # rounding may push an end past 0, 1 or the mean itself
    low, high = ((centre + sign * spread) / (1 + t**2 / n) for sign in (-1, 1))
    return np.clip(np.minimum(low, mean), 0, 1), np.clip(np.maximum(high, mean), 0, 1)


def by_problem(table: pd.DataFrame, column: str) -> list[float]:
    """The mean of a column over the samples of each problem, in order of appearance of the problems in `id`."""
    return table.groupby("id", sort=False)[column].mean().tolist()


def clustered(table: pd.DataFrame, column: str, level: float = LEVEL) -> Estimate:
    """Mean over problems of a column of any numbers, with its t interval.

    Args:
        table: one row per sample, with the problem in `id`.
        column: what to average, first over the samples of a problem.
    """
    return mean_interval(by_problem(table, column), level)


def clustered_share(table: pd.DataFrame, column: str, level: float = LEVEL) -> Estimate:
    """The same of a column of shares, such as correctness, with the interval of `share_interval`.

    A reward function of one's own may leave [0, 1]; its means then have a t interval.
    """
    shares = table[column].between(0, 1).all()
    return (share_interval if shares else mean_interval)(by_problem(table, column), level)


def paired_interval(after: Sequence[float], before: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean difference of paired values (the same seeds or problems) with its t interval.

    Raises:
        ValueError: the two have different lengths.
    """
    return mean_interval([a - b for a, b in zip(after, before, strict=True)], level)


def paired_p(differences: ArrayLike) -> NDArray:
    """p of the two-sided paired t test that the mean difference is zero, and never less than 2 / 2^d.

    d is the number of problems that differ. Under the hypothesis each difference is as likely as its opposite, so that
    of the 2^d equally likely signs at least two give a mean as far from zero as the one found. The t test alone would
    call two problems that differ by the same amount a proof.

    Args:
        differences: [..., P] of P problems; leading dimensions are independent comparisons.

    Returns:
        [...] p; 1 where nothing differs, or where there is one problem alone.
    """
    differences = np.asarray(differences, dtype=float)
    problems = differences.shape[-1]
    least = np.minimum(1.0, 2.0 ** (1 - np.count_nonzero(differences, axis=-1)))
    if problems < 2:
        return least
    mean, error = differences.mean(-1), differences.std(-1, ddof=1) / math.sqrt(problems)
    t = np.divide(np.abs(mean), error, out=np.where(mean == 0, 0.0, np.inf), where=error > 0)
    return np.maximum(least, 2 * stats.t.sf(t, problems - 1))


def compare(after: Mapping[Hashable, float], before: Mapping[Hashable, float], level: float = LEVEL) -> Comparison:
    """Compare two evaluations problem by problem: `after` - `before`.

    Args:
        after: problem -> the average of its samples; `before` likewise.
        level: of the interval.

    Raises:
        ValueError: they are of different problems.
    """
    if after.keys() != before.keys():
        raise ValueError("these are evaluations of different problems, which cannot be paired")
    pairs = [(value, before[name]) for name, value in after.items()]
    p = paired_p([value - reference for value, reference in pairs])
    return Comparison(paired_interval(*zip(*pairs, strict=True), level), float(p))


def told(comparison: Comparison, after: str, before: str, what: str, form: str = ".3f", alpha: float = 0.05) -> str:
    """What a comparison says, in words.

    Args:
        comparison: of `after` with `before`, the names of the two.
        what: was compared, as in "accuracy".
        form: of the difference.
        alpha: below this p a difference is called one.
    """
    found = comparison.difference
    start = f"{after} - {before}, {what}: {found.mean:+{form}}"
    if found.n < 2:
        return f"{start}; one problem alone says nothing about others."
    p = f"p = {comparison.p:.3f}" if comparison.p >= 0.001 else "p < 0.001"
    often = f"about {round(1000 * comparison.p)}" if comparison.p >= 0.001 else "fewer than 1"
    verdict = "a difference" if comparison.p < alpha else "no evidence of a difference"
    return (
        f"{start} (95 % interval {found.low:+{form}} to {found.high:+{form}}, {p}, paired over {found.n} problems): "
        f"{verdict}; two equal models would differ at least as much in {often} of 1000 such comparisons."
    )
