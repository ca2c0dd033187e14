"""How well the self-reward of LaSeR (arXiv 2510.14943) tells correct completions from wrong ones, as pure functions.

A completion whose self-reward (`rltoken.methods.last_token`) is above 0.5 is held to be correct. With h = 1 for what is
held to be correct, c = 1 for what is, and sums over all completions that have a self-reward:

    accuracy  mean over problems of the share of their completions with h = c
    F1        2 sum h c / (sum h + sum c), of the class correct
    AUROC     the share of the pairs of a correct and a wrong completion in which the correct one scores more, ties
              counting half

The last two are no means over problems, so their intervals are those of their linear parts: what problem i adds to the
number, to first order, is a value that has a mean and a variance over problems. For AUROC that is DeLong's variance
(Biometrics 44, 1988) clustered by problem (Obuchowski, Biometrics 53, 1997); for F1 that of a ratio of sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from rltoken.evals.intervals import Estimate, clustered_share, linear_interval

SELF_REWARD, APPENDED, MEAN_LOGP = "self_reward", "appended_logp", "mean_logp"
"""Columns of a table of completions: the self-reward; the log-probability that it is made of; and the mean
log-probability of the completion's tokens, in nats, all NaN for a completion that was cut."""
THRESHOLD = 0.5
"""A completion whose self-reward is above is held to be correct."""


def verification(table: pd.DataFrame) -> dict[str, Estimate]:
    """How well self-rewards agree with the grader, each number with its interval clustered by problem.

    Args:
        table: one row per completion: id, correct (above 0.5 is right), `SELF_REWARD`, `MEAN_LOGP`.

    Returns:
        Of the completions that have a self-reward: self_reward_accuracy, self_reward_f1 and self_reward_auroc; and as
        a control mean_logp_auroc, of the mean log-probability. NaN where there is nothing to tell: no completion, for
        F1 none that is or is held to be correct, for AUROC not both correct and wrong ones.
    """
    known = table[table[SELF_REWARD].notna()]
    right, held = (known["correct"] > 0.5).to_numpy(), (known[SELF_REWARD] > THRESHOLD).to_numpy()
    problems, nothing = known["id"].to_numpy(), Estimate(math.nan, math.nan, math.nan, 0)
    agreed = known.assign(agreed=(held == right).astype(float))
    return {
        "self_reward_accuracy": clustered_share(agreed, "agreed") if len(known) else nothing,
        "self_reward_f1": f1(held, right, problems),
        "self_reward_auroc": auroc(known[SELF_REWARD], right, problems),
        "mean_logp_auroc": auroc(known[MEAN_LOGP], right, problems),
    }


def f1(held: ArrayLike, right: ArrayLike, problems: Sequence) -> Estimate:
    """F1 of the class correct.

    Args:
        held: [n] bool, what is held to be correct; `right`: [n] bool, what is.
        problems: [n] the problem of each.

    Returns:
        NaN where nothing is correct and nothing held to be.
    """
    held, right = np.asarray(held, dtype=bool), np.asarray(right, dtype=bool)
    size = int(held.sum()) + int(right.sum())
    if not size:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = 2 * int((held & right).sum()) / size
    parts = (2.0 * (held & right) - value * (held.astype(float) + right)) / size
    return _within(linear_interval(value, _of_problems(parts, problems)))


def auroc(scores: ArrayLike, right: ArrayLike, problems: Sequence) -> Estimate:
    """The probability that a correct completion scores above a wrong one, ties counting half.

    Args:
        scores: [n] any numbers; `right`: [n] bool.
        problems: [n] the problem of each.

    Returns:
        NaN unless there are correct and wrong ones.
    """
    scores, right = np.asarray(scores, dtype=float), np.asarray(right, dtype=bool)
    if right.all() or not right.any():
        return Estimate(math.nan, math.nan, math.nan, 0)
    ranks, beaten = rankdata(scores), np.empty(len(scores))
    for own in (right, ~right):  # the share of the other class that is below, ties counting half
        beaten[own] = (ranks[own] - rankdata(scores[own])) / (~own).sum()
    beaten[~right] = 1 - beaten[~right]
    value = float(beaten[right].mean())
    parts = (beaten - value) / np.where(right, right.sum(), (~right).sum())
    return _within(linear_interval(value, _of_problems(parts, problems)))


def _of_problems(parts: NDArray, problems: Sequence) -> list[float]:
    """The sum of the parts of each problem's completions."""
    return pd.Series(parts).groupby(list(problems), sort=False).sum().tolist()


def _within(estimate: Estimate) -> Estimate:
    """The estimate with an interval inside [0, 1], where such a number must be."""
    if estimate.n < 2:
        return estimate
    return Estimate(estimate.mean, max(0.0, estimate.low), min(1.0, estimate.high), estimate.n)
