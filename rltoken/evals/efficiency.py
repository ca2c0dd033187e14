"""Accuracy against tokens as one number: area, normalised regret, tokens to reach an accuracy, E3. Pure functions.

A curve is given by K points: tokens, ascending and above 0, and the accuracy with that many of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np


def area(tokens: Sequence[float], accuracy: Sequence[float], horizon: float) -> float:
    """Area under a curve up to `horizon` tokens over `horizon`: the mean accuracy of a budget drawn uniformly below it.

    By trapezia. The curve begins at (0, 0), and its last accuracy is kept beyond its last point.

    Raises:
        ValueError: tokens that do not ascend from above 0, as many accuracies as tokens, a horizon that is not above 0.
    """
    _check_curve(tokens, accuracy)
    if not horizon > 0:
        raise ValueError(f"horizon: {horizon} is not possible; set it to a number above 0")
    x, y = np.array([0.0, *tokens]), np.array([0.0, *accuracy], dtype=float)
    at_horizon = np.interp(horizon, x, y)
    inside = x < horizon
    return float(np.trapezoid([*y[inside], at_horizon], [*x[inside], horizon]) / horizon)


def normalised_regret(tokens: Sequence[float], accuracy: Sequence[float], horizon: float) -> float:
    """What is missing to an oracle that is right from the first token on, in [0, 1]: 1 - `area`.

    Of MRT (Qu et al., 2025, arXiv 2503.07572; as its released analysis computes it), there of each trace, averaged over
    the traces of a problem and then over problems; with the same budgets for all, that is the regret of the mean curve.

    Raises:
        ValueError: as `area`.
    """
    return 1 - area(tokens, accuracy, horizon)


def tokens_to_reach(tokens: Sequence[float], accuracy: Sequence[float], reference: float) -> float | None:
    """The fewest tokens at which a curve reaches the accuracy `reference`, linear between its points.

    The first crossing counts, although a curve may fall again. A curve that is there at its first point gives that
    point: nothing is known below it.

    Returns:
        None where the curve never gets there.

    Raises:
        ValueError: as `area`.
    """
    _check_curve(tokens, accuracy)
    if accuracy[0] >= reference:
        return float(tokens[0])
    for (x, y), (next_x, next_y) in pairwise(zip(tokens, accuracy, strict=True)):
        if next_y >= reference:
            return float(x + (next_x - x) * (reference - y) / (next_y - y))
    return None


def e3(accuracy: float, tokens: float, *, unit: Literal["percent", "share"] = "percent") -> float:
    """A * (A / T), the accuracy times what a token buys of it: E3 of Plan-and-Budget (2025, arXiv 2505.16122).

    Args:
        accuracy: mean over problems, in [0, 1].
        tokens: T, mean completion tokens, above 0.
        unit: of A. Published values only fit percent; the formula alone may also be read with shares, 10^4 times less.

    Raises:
        ValueError: T is not above 0.
    """
    if not tokens > 0:
        raise ValueError(f"tokens: {tokens} is not possible; set it to a number above 0")
    scaled = accuracy * (100 if unit == "percent" else 1)
    return scaled**2 / tokens


def _check_curve(tokens: Sequence[float], accuracy: Sequence[float]) -> None:
    if not tokens or len(tokens) != len(accuracy):
        raise ValueError(f"a curve of {len(tokens)} tokens and {len(accuracy)} accuracies is none")
    if not all(x < y for x, y in pairwise([0, *tokens])):
        raise ValueError(f"tokens: {list(tokens)} do not ascend from above 0")
