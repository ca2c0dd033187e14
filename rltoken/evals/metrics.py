"""The numbers of one evaluation, out of its table of graded completions.

    rltoken.evals.samples      avg@k, pass@k, maj@k, weighted majority: what several samples of a problem are worth
    rltoken.evals.efficiency   area, normalised regret, tokens to reach an accuracy, E3: accuracy against tokens
    rltoken.evals.verification how well a model's self-rewards tell its correct completions from wrong ones
    rltoken.evals.intervals    intervals clustered by problem, and the paired test of two evaluations

docs/evaluation.md has each definition as a formula, and how to quote it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from rltoken.evals.efficiency import area, e3
from rltoken.evals.intervals import Estimate, by_problem, clustered, clustered_share, share_interval
from rltoken.evals.samples import NO_ANSWER, majority_at_k, pass_at_k, sample_counts, weighted_majority
from rltoken.evals.verification import APPENDED, MEAN_LOGP, SELF_REWARD, verification

AT_BUDGET = "correct@"
"""What the name of a column begins with that holds correctness at a budget; the budget in tokens follows."""
OUTCOME = "outcome"
"""The column that holds what became of the grading; `outcome@B` is that of the answer forced at budget B."""
UNGRADED, MALFORMED = "ungraded", "malformed"
"""Besides the outcomes of `rltoken.rewards.outcomes`: no gold answer to grade by; a right answer after thinking that
was ended twice or abandoned."""
ANSWER_CLASS, ANSWER = "answer_class", "answer"
"""Columns of which a majority needs one: the number of the answer's class within its problem, as
`rltoken.rewards.math.classes` gives it, -1 or missing where there is none; or else the answer's text, missing or empty
where there is none, of which two are one class if they are written alike."""
WEIGHT = "weight"
"""The column of a weighted majority: what the sample's vote weighs, at least 0. Without it self-rewards weigh votes."""


def budgets_of(table: pd.DataFrame) -> list[int]:
    """The budgets at which answers were forced, ascending."""
    return sorted(int(name.removeprefix(AT_BUDGET)) for name in table.columns if name.startswith(AT_BUDGET))


def under_budgets(table: pd.DataFrame) -> dict[str, Any]:
    """Accuracy of the answers forced at each budget, with intervals clustered by problem.

    Returns:
        budgets (tokens), budget_accuracy, its intervals and their half widths, one per budget; anytime_accuracy, the
        mean over the budgets, and final_accuracy, that of the last one (BRPO, arXiv 2505.13438, section 4);
        anytime_area, up to the last budget, and normalised_regret, what it lacks to 1 (`rltoken.evals.efficiency`).
        Nothing where no answer was forced.
    """
    budgets = budgets_of(table)
    if not budgets:
        return {}
    columns = [f"{AT_BUDGET}{budget}" for budget in budgets]
    each = [clustered_share(table, column) for column in columns]
    means = table[columns].mean(axis=1)
    areas = [area(budgets, row, budgets[-1]) for row in table[columns].to_numpy()]
    made = pd.DataFrame({"id": table["id"], "mean": means, "area": areas})
    under = clustered_share(made, "area")
    return {
        "budgets": budgets,
        "budget_accuracy": [estimate.mean for estimate in each],
        "budget_accuracy_half_width": [_half_width(estimate) for estimate in each],
        "budget_accuracy_interval": [_interval(estimate) for estimate in each],
        **_told("anytime_accuracy", clustered_share(made, "mean")),
        **_told("final_accuracy", each[-1]),
        **_told("anytime_area", under),
        "normalised_regret": 1 - under.mean,
    }


def over_samples(table: pd.DataFrame) -> dict[str, Any]:
    """What several samples of a problem are worth, with intervals clustered by problem.

    Args:
        table: one row per sample: id, correct (above 0.5 is right); if there, `ANSWER_CLASS` or `ANSWER`, and
            `WEIGHT` or `SELF_REWARD`.

    Returns:
        k, the numbers of samples that are looked at; pass_at_k and its intervals, one per k; where there are answers
        also majority_at_k; with weights weighted_majority, with self-rewards that and mean_logp_majority, of all
        samples. Nothing where some problem has one sample.
    """
    right = table["correct"] > 0.5
    groups = table.groupby("id", sort=False).indices.values()
    counts = sample_counts(min(map(len, groups)))
    if not counts:
        return {}
    samples, found = [len(group) for group in groups], [int(right.iloc[group].sum()) for group in groups]
    numbers = {"k": counts, **_each("pass_at_k", [share_interval(pass_at_k(found, samples, k)) for k in counts])}
    classes = answer_classes(table)
    if classes is None:
        return numbers

    def voted(majority: Callable[..., float], *columns: np.ndarray, **settings: Any) -> Estimate:
        return share_interval([majority(*(column[group] for column in columns), **settings) for group in groups])

    votes = (classes, right.to_numpy(dtype=float))
    numbers |= _each("majority_at_k", [voted(majority_at_k, *votes, k=k) for k in counts])
    for name, weights in vote_weights(table).items():
        numbers |= _told(name, voted(weighted_majority, *votes, weights))
    return numbers


def vote_weights(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Weighted majority -> [rows] weights of the votes in it; none where the table has nothing that weighs.

    A self-reward is brought into [0, 1]; its control weighs by the geometric mean of the tokens' probabilities. What
    has none of them, since it was cut, weighs 0.
    """
    weights = {"weighted_majority": table[WEIGHT]} if WEIGHT in table else {}
    if SELF_REWARD in table:
        weights.setdefault("weighted_majority", table[SELF_REWARD].clip(0, 1).fillna(0.0))
        weights["mean_logp_majority"] = np.exp(table[MEAN_LOGP]).fillna(0.0)
    return {name: column.to_numpy(dtype=float) for name, column in weights.items()}


def self_rewards(table: pd.DataFrame) -> dict[str, Any]:
    """How well self-rewards tell correct completions from wrong ones, with intervals clustered by problem.

    Returns:
        What `rltoken.evals.verification.verification` gives, None where there is nothing to tell; and appended_logp and
        appended_logp_std, mean and standard deviation of the log-probability that self-rewards are made of, which
        before training are the reference and how constant it is. Nothing where no self-rewards were asked for.
    """
    if SELF_REWARD not in table:
        return {}
    told = {
        name: value for key, estimate in verification(table).items() for name, value in _told(key, estimate).items()
    }
    logps = table[APPENDED]
    told |= {"appended_logp": logps.mean(), "appended_logp_std": logps.std()}
    return {name: _finite(value) if isinstance(value, float) else value for name, value in told.items()}


def answer_classes(table: pd.DataFrame) -> np.ndarray | None:
    """[rows] number of each answer's class, `NO_ANSWER` where there is none; None if the table tells no answers."""
    if ANSWER_CLASS in table:
        classes = table[ANSWER_CLASS].fillna(NO_ANSWER)
        return classes.where(classes >= 0, NO_ANSWER).to_numpy(dtype=int)
    if ANSWER in table:
        answers = table[ANSWER]
        return pd.factorize(answers.mask(answers == ""))[0]
    return None


def tokens(table: pd.DataFrame) -> dict[str, Any]:
    """Lengths in tokens: mean, median and 95th percentile of all completions, and of correct and of wrong ones.

    Returns:
        PART_tokens, PART_tokens_median and PART_tokens_p95 for each part: thinking; answer, which is what follows the
        thinking, with the token that ends it; completion, which is both. Likewise PART_tokens_correct and
        PART_tokens_wrong, None where there are none. The mean thinking has an interval over problems.
    """
    parts = {
        "thinking": table["thinking_tokens"],
        "answer": table["completion_tokens"] - table["thinking_tokens"],
        "completion": table["completion_tokens"],
    }
    right = table["correct"] > 0.5
    kinds = {"": right | True, "_correct": right, "_wrong": ~right}
    numbers: dict[str, Any] = {}
    for part, lengths in parts.items():
        for kind, rows in kinds.items():
            name, of_kind = f"{part}_tokens{kind}", lengths[rows]
            numbers[name] = _finite(of_kind.mean())
            numbers[f"{name}_median"] = _finite(of_kind.median())
            numbers[f"{name}_p95"] = _finite(of_kind.quantile(0.95))
    thinking = clustered(table, "thinking_tokens")
    return numbers | {"thinking_tokens": thinking.mean, "thinking_tokens_half_width": _half_width(thinking)}


def summary(table: pd.DataFrame) -> dict[str, Any]:
    """The numbers of one evaluation that the report prints.

    Returns:
        accuracy with its interval clustered by problem; what `over_samples`, `self_rewards`, `under_budgets` and
        `tokens` give; e3 in percent, of completion tokens; the share of completions that were cut; the numbers of
        problems and samples; how many completions and forced answers met each outcome of the grader; and each problem's
        accuracy and thinking tokens, by which two evaluations are compared. One problem alone has no interval: None.
    """
    accuracy, lengths = clustered_share(table, "correct"), tokens(table)
    names = [str(name) for name in table["id"].drop_duplicates()]
    return {
        **under_budgets(table),
        **_told("accuracy", accuracy),
        **over_samples(table),
        **self_rewards(table),
        **lengths,
        "e3": e3(accuracy.mean, lengths["completion_tokens"]) if lengths["completion_tokens"] else None,
        "truncated": float(table["truncated"].mean()),
        "problems": int(table["id"].nunique()),
        "samples": len(table),
        "outcomes": counted(table, [OUTCOME]),
        "forced_outcomes": counted(table, [f"{OUTCOME}@{budget}" for budget in budgets_of(table)]),
        "problem_accuracy": dict(zip(names, by_problem(table, "correct"), strict=True)),
        "problem_thinking_tokens": dict(zip(names, by_problem(table, "thinking_tokens"), strict=True)),
    }


def numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """What `summary` gives as single numbers: those that are ones, `correct@B`, `pass@k` and `maj@k`.

    Args:
        metrics: from `summary`.
    """
    lists = ((AT_BUDGET, "budgets", "budget_accuracy"), ("pass@", "k", "pass_at_k"), ("maj@", "k", "majority_at_k"))
    return {key: value for key, value in metrics.items() if isinstance(value, int | float) or value is None} | {
        f"{name}{place}": value
        for name, places, values in lists
        for place, value in zip(metrics.get(places, ()), metrics.get(values, ()), strict=False)
    }


def counted(table: pd.DataFrame, columns: Sequence[str]) -> dict[str, int]:
    """How often each outcome stands in the columns, the most frequent first."""
    return {name: int(count) for name, count in table[columns].stack().value_counts().items()}


def _told(name: str, estimate: Estimate) -> dict[str, Any]:
    """A number, the half width of its interval, and the interval, which are None of one problem alone."""
    return {
        name: estimate.mean,
        f"{name}_half_width": _half_width(estimate),
        f"{name}_interval": _interval(estimate),
    }


def _each(name: str, estimates: Sequence[Estimate]) -> dict[str, Any]:
    return {name: [one.mean for one in estimates], f"{name}_interval": [_interval(one) for one in estimates]}


def _half_width(estimate: Estimate) -> float | None:
    return estimate.half_width if estimate.n > 1 else None


def _interval(estimate: Estimate) -> list[float] | None:
    return [estimate.low, estimate.high] if estimate.n > 1 else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
