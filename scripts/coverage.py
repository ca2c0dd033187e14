#!/usr/bin/env python
"""Measure what `rltoken.evals` claims of its intervals, of pass@k and of the paired test, on data whose truth is known.

    python scripts/coverage.py                        # the tables in docs/evaluation.md, two minutes on one core
    python scripts/coverage.py --simulations 100000   # the same with less noise

Each simulated evaluation draws the difficulty of every problem from a beta distribution of the given mean accuracy and
then its samples, which share it. `a + b` of the distribution says how unlike the problems are: 0.5, most are always
right or always wrong; 10, most are alike. The truth is the mean over all problems that could be drawn, not over those
of the benchmark. A coverage of 0.95 measured in 10000 evaluations has a standard error of 0.002, and in the 400 of
the bootstrap, 0.011.
"""

import argparse
import itertools

import numpy as np
from scipy import special, stats

from rltoken.evals.intervals import paired_p, share_ends
from rltoken.evals.samples import pass_at_k

PROBLEMS, ACCURACIES = (10, 30, 100, 300), (0.5, 0.8, 0.95, 0.98)
SPREADS, SAMPLES = (0.5, 2, 10), (1, 4, 16)
FEW, RESAMPLES = 400, 400
"""Evaluations for the bootstrap, and its resamples of each."""


def difficulties(rng, shape, accuracy, spread):
    """The probability of a right sample of each problem."""
    return rng.beta(accuracy * spread, (1 - accuracy) * spread, shape)


def moments(values):
    """Mean and standard error over problems, and the t quantile."""
    problems = values.shape[-1]
    return values.mean(-1), values.std(-1, ddof=1) / problems**0.5, stats.t.ppf(0.975, problems - 1)


def by_t(values):
    """Mean ± t standard errors."""
    mean, error, t = moments(values)
    return mean - t * error, mean + t * error


def by_logit(values):
    """The t interval of the logit; nothing is covered where all are right, or all wrong."""
    mean, error, t = moments(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre, spread = special.logit(mean), t * error / (mean * (1 - mean))
        return special.expit(centre - spread), special.expit(centre + spread)


def by_plain_wilson(values):
    """Wilson's interval at the effective number of problems, all of them where that cannot be told."""
    mean, error, t = moments(values)
    between = mean * (1 - mean)
    n = np.divide(between, error**2, out=np.full_like(mean, values.shape[-1]), where=error > 0)
    centre, spread = mean + t**2 / (2 * n), t * np.sqrt(between / n + (t / (2 * n)) ** 2)
    return (centre - spread) / (1 + t**2 / n), (centre + spread) / (1 + t**2 / n)


def by_bootstrap_t(values, rng):
    """The bootstrap-t interval, of resampled problems."""
    ends = []
    for shares in values:
        mean, error, _ = moments(shares)
        means, errors, _ = moments(shares[rng.integers(0, len(shares), (RESAMPLES, len(shares)))])
        t = (means - mean)[errors > 0] / errors[errors > 0]
        low, high = np.quantile(t, [0.025, 0.975]) if len(t) else (0.0, 0.0)
        ends.append((mean - high * error, mean - low * error))
    return np.array(ends).T


def covered(ends, truth):
    """Share of intervals that hold the truth."""
    low, high = ends
    return float(((low <= truth) & (truth <= high)).mean())


def coverage(rng, simulations):
    """Coverage of the 95 % interval of accuracy, by several methods: the lowest and the highest of 9 kinds of data."""
    methods = {"t": by_t, "logit t": by_logit, "Wilson, n effective": by_plain_wilson, "here": share_ends}
    header("problems", "accuracy", "bootstrap t", *methods)
    for problems, accuracy in itertools.product(PROBLEMS, ACCURACIES):
        found = {name: [] for name in ("bootstrap t", *methods)}
        for spread, samples in itertools.product(SPREADS, SAMPLES):
            values = rng.binomial(samples, difficulties(rng, (simulations, problems), accuracy, spread)) / samples
            found["bootstrap t"].append(covered(by_bootstrap_t(values[:FEW], rng), accuracy))
            for name, method in methods.items():
                found[name].append(covered(method(values), accuracy))
        row(problems, accuracy, *(f"{min(all_):.3f} to {max(all_):.3f}" for all_ in found.values()))


def passes(rng, simulations, *, problems=100, samples=16, accuracy=0.5, spread=2):
    """Mean error of pass@k, of 1 - (1 - c/n)^k beside it, and the coverage of its interval."""
    a, b = accuracy * spread, (1 - accuracy) * spread
    right = rng.binomial(samples, difficulties(rng, (simulations, problems), accuracy, spread))
    header("k", "truth", "mean error", "its standard error", "error of 1 - (1 - c/n)^k", "coverage")
    for k in (1, 2, 4, 8, 16):
        truth = 1 - np.exp(special.betaln(a, b + k) - special.betaln(a, b))
        found = pass_at_k(right, samples, k)
        errors, naive = found.mean(-1) - truth, (1 - (1 - right / samples) ** k).mean() - truth
        noise = errors.std() / simulations**0.5
        cells = (f"{truth:.4f}", f"{errors.mean():+.5f}", f"{noise:.5f}", f"{naive:+.4f}")
        row(k, *cells, f"{covered(share_ends(found), truth):.3f}")


def pairs(rng, simulations, *, accuracy=0.5, spread=0.5):
    """How often two evaluations of the same problems differ by p < 0.05, with a test that forgets the pairs beside it.

    `same`: the two are one model. `other`: on half of the problems the second is another model as good on average.
    The last ones: the second solves that share of what the first does not.
    """
    kinds = ("same", "other", "+2 %", "+5 %", "+10 %", "+20 %")
    header("problems", "samples", *kinds, "+10 %, unpaired")
    for problems, samples in itertools.product((30, 100, 300), SAMPLES):
        first = difficulties(rng, (simulations, problems), accuracy, spread)
        fresh = difficulties(rng, first.shape, accuracy, spread)
        second = {"same": first, "other": np.where(rng.random(first.shape) < 0.5, first, fresh)}
        second |= {kind: first + (1 - first) * float(kind.strip("+ %")) / 100 for kind in kinds[2:]}
        before = rng.binomial(samples, first) / samples
        after = {kind: rng.binomial(samples, chances) / samples for kind, chances in second.items()}
        rates = [(paired_p(after[kind] - before) < 0.05).mean() for kind in kinds]
        rates.append((stats.ttest_ind(after["+10 %"], before, axis=-1).pvalue < 0.05).mean())
        row(problems, samples, *(f"{rate:.3f}" for rate in rates))


def row(*cells):
    """Print a row of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def header(*cells):
    """Print the head of a Markdown table."""
    print()
    row(*cells)
    row(*["---"] * len(cells))


def main():
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=10_000, help="evaluations of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    for measured in (coverage, passes, pairs):
        measured(rng, options.simulations)


if __name__ == "__main__":
    main()
