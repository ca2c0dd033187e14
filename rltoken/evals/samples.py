"""What several samples of one problem are worth: pass@k, maj@k and a weighted majority, as pure functions.

Of n samples of a problem, c of them right, each metric is an expectation over k of them drawn without replacement, so
that it uses all n, has no luck of a draw in it, and is unbiased for k fresh samples:

    avg@k    c / n, whatever k: the mean of k samples (`rltoken.evals.intervals.clustered_share`)
    pass@k   1 - C(n - c, k) / C(n, k): any of k is right (Chen et al., 2021, arXiv 2107.03374, equation 1)
    maj@k    the answer that most of k give is right (Wang et al., 2022, arXiv 2203.11171)

A majority is one of equivalence classes of answers. Of classes with equally many votes each wins with equal
probability. A sample without an answer has no vote; where none has one, the majority is wrong. All members of a class
should get the same grade; where the grader judged them differently, its worth is the share of them that are right.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

NO_ANSWER = -1
"""The class of a sample without an answer."""


def sample_counts(samples: int) -> list[int]:
    """The k at which to look at `samples` samples: the powers of two from 2 on, and all of them; none of one sample."""
    return sorted({2**i for i in range(1, samples.bit_length())} | {samples}) if samples > 1 else []


def pass_at_k(right: ArrayLike, samples: ArrayLike, k: int) -> NDArray:
    """Probability that any of k samples, drawn from those of a problem without replacement, is right.

    Args:
        right: [...] right samples of each problem.
        samples: [...] samples of each problem.
        k: samples to draw.

    Returns:
        [...] 1 - C(n - c, k) / C(n, k), as the product over i < k of (n - c - i) / (n - i), which cannot overflow.

    Raises:
        ValueError: there are fewer than k samples, or more right ones than samples.
    """
    right, samples = np.broadcast_arrays(np.asarray(right), np.asarray(samples))
    _check_k(k, int(samples.min()))
    if (right < 0).any() or (right > samples).any():
        raise ValueError("there are more right samples than samples")
    none = np.ones(right.shape)
    for i in range(k):
        none *= np.maximum(samples - right - i, 0) / (samples - i)
    return 1 - none


def majority_at_k(classes: Sequence[int], right: Sequence[float], k: int) -> float:
    """Probability that the majority of k samples, drawn from those of one problem without replacement, is right.

    Args:
        classes: [n] the class of each sample's answer, `NO_ANSWER` where there is none.
        right: [n] 1 where a sample is right, else 0.
        k: samples to draw; k = n is the majority of all of them, k = 1 the mean of those that have an answer.

    Raises:
        ValueError: there are fewer than k samples, or not one grade per class.
    """
    _check_k(k, len(classes))
    votes = Counter(classes)
    silent = votes.pop(NO_ANSWER, 0)
    found = sum(
        share * chance_to_win(votes[name], tuple(sorted(votes[other] for other in votes if other != name)), silent, k)
        for name, share in worth(classes, right).items()
        if share > 0
    )
    return min(1.0, found)  # rounding may push it past 1


def weighted_majority(classes: Sequence[int], right: Sequence[float], weights: Sequence[float]) -> float:
    """Worth of the answer of one problem whose samples have the largest sum of weights; of several, their mean.

    Args:
        classes: [n], `right`: [n], as in `majority_at_k`.
        weights: [n] at least 0: a self-reward, or the score of a reward model. Equal ones give maj@n, and so does 0
            for all that answer.

    Raises:
        ValueError: a weight that is negative or no number, or not one per sample.
    """
    shares = worth(classes, right)
    sums = dict.fromkeys(shares, 0.0)
    for name, weight in zip(classes, weights, strict=True):
        if not 0 <= weight < np.inf:
            raise ValueError(f"{weight} is no weight; a vote weighs a finite number from 0")
        if name != NO_ANSWER:
            sums[name] += weight
    if sums and not any(sums.values()):
        return weighted_majority(classes, right, [1.0] * len(classes))
    most = max(sums.values(), default=0.0)
    # sums of the same weights in another order differ in the last bits
    winners = [shares[name] for name, total in sums.items() if total >= most * (1 - 1e-9)]
    return sum(winners) / len(winners) if winners else 0.0


def worth(classes: Sequence[int], right: Sequence[float]) -> dict[int, float]:
    """Class -> the share of its members that are right, in order of appearance; none for `NO_ANSWER`."""
    members: dict[int, list[float]] = {}
    for name, value in zip(classes, right, strict=True):
        if name != NO_ANSWER:
            members.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in members.items()}


@functools.lru_cache(maxsize=65536)
def chance_to_win(own: int, others: tuple[int, ...], silent: int, k: int) -> float:
    """Probability that one class has the most votes among k samples; it wins ties with j others 1 time in j + 1.

    To draw k of n samples is to keep each with probability k / n, given that k are kept. So what a class of size s
    gives is binomial, and sums over classes are convolutions. `ways[r, j]` is the probability that the classes so far
    gave r votes, none of them more than `votes`, and j of them exactly that many.

    Args:
        own: samples of the class.
        others: sizes of the other classes, ascending.
        silent: samples without an answer.
        k: samples that are drawn, from 1 to all.
    """
    n = own + sum(others) + silent
    kept = {size: stats.binom.pmf(np.arange(k + 1), size, k / n) for size in {own, silent, n, *others}}
    total = 0.0
    for votes in range(1, min(own, k) + 1):
        if kept[own][votes] == 0:  # of all samples only one number of votes can come
            continue
        rest = k - votes
        ways = np.zeros((rest + 1, k // votes))
        ways[0, 0] = 1.0
        for size in others:
            ways = _with_class(ways, kept[size], min(size, votes), votes)
        wins = ways @ (1 / np.arange(1, ways.shape[1] + 1))
        total += kept[own][votes] * float(wins @ kept[silent][rest::-1])
    return total / float(kept[n][k])


def _with_class(ways: NDArray, kept: NDArray, most: int, votes: int) -> NDArray:
    """`ways` [r, j] with one class more, that gives u votes with probability `kept[u]`, and no more than `most`."""
    found = np.zeros_like(ways)
    for u in range(min(most, ways.shape[0] - 1) + 1):
        gained = kept[u] * ways[: ways.shape[0] - u]
        if u == votes:
            found[u:, 1:] += gained[:, :-1]
        else:
            found[u:] += gained
    return found


def _check_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k} samples cannot be drawn from {samples}")
