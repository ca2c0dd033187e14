"""The end of a run for people: a table of before and after, and a picture of the way there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

ROWS = (
    ("accuracy", "accuracy", "{:.3f}", "accuracy_half_width"),
    ("anytime accuracy (mean over budgets)", "anytime_accuracy", "{:.3f}", "anytime_accuracy_half_width"),
    ("accuracy at the last budget", "final_accuracy", "{:.3f}", "final_accuracy_half_width"),
    ("thinking tokens, mean", "thinking_tokens", "{:.1f}", "thinking_tokens_half_width"),
    ("thinking tokens, median", "thinking_tokens_median", "{:.0f}", None),
    ("thinking tokens, 95th percentile", "thinking_tokens_p95", "{:.0f}", None),
    ("completion tokens, mean", "completion_tokens", "{:.1f}", None),
    ("completions cut", "truncated", "{:.1%}", None),
)
COUNTED = ("outcomes", "forced_outcomes")
PLAIN = {"correct", "wrong"}
"""Outcomes that the accuracies tell already."""
PALETTE = ("#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLOURS = {"before": "#999999", "after": "#0072B2", "curve": "#D55E00"}
"""Both from the palette of Okabe and Ito, told apart by colour-blind readers too."""


def table(title: str, evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column per evaluation (a phase, or a model), with 95 % intervals clustered by problem where there are any."""
    numbers = list(evaluations.values())
    problems = numbers[0]["problems"]
    made = Table(
        title=f"{title}{problems} problems x {numbers[0]['samples'] // problems} samples",
        caption="± is the half width of the 95 % interval, clustered by problem",
    )
    made.add_column("")
    for name in evaluations:
        made.add_column(name, justify="right")
    for label, key, form, half_width in ROWS:
        if all(key in metrics for metrics in numbers):
            made.add_row(label, *(cell(metrics, key, form, half_width) for metrics in numbers))
    for outcome in sorted({name for metrics in numbers for kind in COUNTED for name in metrics.get(kind, {})} - PLAIN):
        made.add_row(f"graded as {outcome.replace('_', ' ')}", *(counts(metrics, outcome) for metrics in numbers))
    return made


def counts(metrics: Mapping[str, Any], outcome: str) -> str:
    """How many completions, and how many forced answers, met an outcome of the grader."""
    completions, forced = (metrics.get(kind, {}).get(outcome, 0) for kind in COUNTED)
    return f"{completions}" + (f", {forced} forced" if metrics.get(COUNTED[1]) else "")


def cell(metrics: Mapping[str, Any], key: str, form: str, half_width: str | None) -> str:
    """A number with the half width of its interval, where it has one."""
    spread = metrics.get(half_width)
    return form.format(metrics[key]) + (f" ± {form.format(spread)}" if spread is not None else "")


def curve(axis: Any, metrics: Mapping[str, Any], label: str, colour: str) -> None:
    """Draw accuracy against thinking budget with its interval; where no answer was forced, one point at its length."""
    if "budgets" in metrics:
        # one problem alone has no interval
        spread = [half_width or 0.0 for half_width in metrics["budget_accuracy_half_width"]]
        means = metrics["budget_accuracy"]
        axis.plot(metrics["budgets"], means, marker="o", markersize=3, color=colour, label=label)
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(metrics["budgets"], low, high, color=colour, alpha=0.15, linewidth=0)
    else:
        axis.errorbar(
            metrics["thinking_tokens"],
            metrics["accuracy"],
            xerr=metrics["thinking_tokens_half_width"],
            yerr=metrics["accuracy_half_width"],
            fmt="o",
            capsize=3,
            color=colour,
            label=label,
        )
    axis.set(xlabel="thinking tokens" + (" allowed" if "budgets" in metrics else ""), ylabel="accuracy")


def show(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table of a run, if anything was evaluated."""
    found = {phase: report[phase] for phase in ("before", "after") if report.get(phase)}
    if found:
        (console or Console()).print(table(f"{report['name']}: ", found))


def show_comparison(evaluations: Mapping[str, Mapping[str, Any]], console: Console | None = None) -> None:
    """Print the comparison of several models."""
    (console or Console()).print(table("", evaluations))


def curves(summaries: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy against thinking budget of several models into one PNG, intervals shaded."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for i, (name, metrics) in enumerate(summaries.items()):
        curve(axis, metrics, name, PALETTE[i % len(PALETTE)])
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def picture(report: Mapping[str, Any], metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw reward and accuracy, thinking tokens, and before against after into one PNG.

    Args:
        report: `name`, and `before` and `after` as `rltoken.evals.metrics.summary` gives them (or None).
        metrics: the lines of metrics.jsonl.
        path: where to write.
    """
    figure, (rewards, lengths, final) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    steps = [line["step"] for line in metrics if "reward" in line]
    for axis, series, label in (
        (
            rewards,
            {"reward": ("reward", "curve"), "rewards/accuracy/mean": ("accuracy", "after")},
            "mean over the window",
        ),
        (lengths, {"thinking_tokens": ("thinking tokens", "curve")}, "tokens, mean over the window"),
    ):
        for key, (name, colour) in series.items():
            values = [line.get(key) for line in metrics if "reward" in line]
            if any(value is not None for value in values):
                axis.plot(steps, values, color=COLOURS[colour], label=name)
        axis.set(xlabel="optimizer step", ylabel=label)
        axis.legend()
    rewards.set_title("training reward")
    lengths.set_title("training length")
    for phase in ("before", "after"):
        if report.get(phase):
            curve(final, report[phase], phase, COLOURS[phase])
    final.set_title("evaluation, 95 % intervals")
    if report.get("before") or report.get("after"):
        final.legend()
    figure.suptitle(report["name"])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
