"""The end of a run for people: a table of before and after, and a picture of the way there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from rltoken.evals.efficiency import tokens_to_reach
from rltoken.evals.intervals import Estimate, compare, told

ROWS = (
    ("weighted majority", "weighted_majority", "{:.3f}"),
    ("majority by mean log-prob", "mean_logp_majority", "{:.3f}"),
    ("self-reward, accuracy", "self_reward_accuracy", "{:.3f}"),
    ("self-reward, F1", "self_reward_f1", "{:.3f}"),
    ("self-reward, AUROC", "self_reward_auroc", "{:.3f}"),
    ("mean log-prob, AUROC", "mean_logp_auroc", "{:.3f}"),
    ("appended log-prob, mean", "appended_logp", "{:.2f}"),
    ("appended log-prob, std", "appended_logp_std", "{:.2f}"),
    ("anytime accuracy", "anytime_accuracy", "{:.3f}"),
    ("accuracy at the last budget", "final_accuracy", "{:.3f}"),
    ("thinking tokens, mean", "thinking_tokens", "{:.1f}"),
    ("thinking tokens, median", "thinking_tokens_median", "{:.0f}"),
    ("thinking tokens, p95", "thinking_tokens_p95", "{:.0f}"),
    ("thinking tokens, correct", "thinking_tokens_correct", "{:.1f}"),
    ("thinking tokens, wrong", "thinking_tokens_wrong", "{:.1f}"),
    ("completion tokens, mean", "completion_tokens", "{:.1f}"),
    ("completions cut", "truncated", "{:.1%}"),
)
DRAWN = (("pass@{}", "pass_at_k"), ("maj@{}", "majority_at_k"))
"""Metrics of several samples, of which the table shows that of all samples."""
COMPARED = (("accuracy", "problem_accuracy", ".3f"), ("thinking tokens", "problem_thinking_tokens", ".1f"))
COUNTED = ("outcomes", "forced_outcomes")
PLAIN = {"correct", "wrong"}
"""Outcomes that the accuracies tell already."""
PALETTE = ("#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLOURS = {"before": "#999999", "after": "#0072B2", "curve": "#D55E00"}
"""Both from the palette of Okabe and Ito, told apart by colour-blind readers too."""
MARKERS = "os^Dv"
"""Of points, where there are more of them than colours."""


def table(title: str, evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column per evaluation (a phase, or a model), with 95 % intervals clustered by problem where there are any."""
    numbers = list(evaluations.values())
    problems = numbers[0]["problems"]
    each = numbers[0]["samples"] // problems
    made = Table(
        title=f"{title}{problems} problems x {each} samples",
        caption="± (half width) and [ ] are 95 % intervals, clustered by problem",
    )
    made.add_column("")
    for name in evaluations:
        made.add_column(name, justify="right")
    made.add_row(f"accuracy (avg@{each})", *(cell(metrics, "accuracy", "{:.3f}") for metrics in numbers))
    for label, key in DRAWN:
        if all(key in metrics and metrics["k"] == numbers[0]["k"] for metrics in numbers):
            made.add_row(
                label.format(numbers[0]["k"][-1]), *(cell(last(metrics, key), key, "{:.3f}") for metrics in numbers)
            )
    for label, key, form in ROWS:
        if all(key in metrics for metrics in numbers):
            made.add_row(label, *(cell(metrics, key, form) for metrics in numbers))
    if len(numbers) > 1 and all("budgets" in metrics for metrics in numbers):
        reference = numbers[0]["final_accuracy"]
        made.add_row(f"tokens that reach {reference:.3f}", *(reached(metrics, reference) for metrics in numbers))
    for outcome in sorted({name for metrics in numbers for kind in COUNTED for name in metrics.get(kind, {})} - PLAIN):
        made.add_row(f"graded as {outcome.replace('_', ' ')}", *(counts(metrics, outcome) for metrics in numbers))
    return made


def last(metrics: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The last of a list of numbers, and its interval."""
    return {name: metrics[name][-1] for name in (key, f"{key}_interval")}


def reached(metrics: Mapping[str, Any], reference: float) -> str:
    """The thinking budget at which the accuracy of forced answers reaches a reference."""
    found = tokens_to_reach(metrics["budgets"], metrics["budget_accuracy"], reference)
    return "never" if found is None else f"{found:.1f}"


def comparisons(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What paired tests say of every evaluation and the first one, where they hold numbers of the same problems."""
    (first, base), *others = evaluations.items()
    return [
        told(compare(metrics[key], base[key]), name, first, what, form)
        for name, metrics in others
        for what, key, form in COMPARED
        if key in base and base[key].keys() == metrics.get(key, {}).keys()
    ]


def counts(metrics: Mapping[str, Any], outcome: str) -> str:
    """How many completions, and how many forced answers, met an outcome of the grader."""
    completions, forced = (metrics.get(kind, {}).get(outcome, 0) for kind in COUNTED)
    return f"{completions}" + (f", {forced} forced" if metrics.get(COUNTED[1]) else "")


def cell(metrics: Mapping[str, Any], key: str, form: str) -> str:
    """A number with the ends of its interval, or half its width, where it has one; a dash where there is no number."""
    if metrics[key] is None:
        return "-"
    number = form.format(metrics[key])
    if ends := metrics.get(f"{key}_interval"):
        return f"{number} [{form.format(ends[0])}, {form.format(ends[1])}]"
    spread = metrics.get(f"{key}_half_width")
    return number if spread is None else f"{number} ± {form.format(spread)}"


def curve(axis: Any, metrics: Mapping[str, Any], label: str, colour: str) -> None:
    """Draw accuracy against thinking budget with its interval; where no answer was forced, one point at its length."""
    if "budgets" in metrics:
        means = metrics["budget_accuracy"]
        axis.plot(metrics["budgets"], means, marker="o", markersize=3, color=colour, label=label)
        # one problem alone has no interval
        ends = [found or (mean, mean) for found, mean in zip(metrics["budget_accuracy_interval"], means, strict=True)]
        axis.fill_between(metrics["budgets"], *zip(*ends, strict=True), color=colour, alpha=0.15, linewidth=0)
    else:
        mean, ends = metrics["accuracy"], metrics["accuracy_interval"]
        axis.errorbar(
            metrics["thinking_tokens"],
            mean,
            xerr=metrics["thinking_tokens_half_width"],
            yerr=None if ends is None else [[mean - ends[0]], [ends[1] - mean]],
            fmt="o",
            capsize=3,
            color=colour,
            label=label,
        )
    axis.set(xlabel="thinking tokens" + (" allowed" if "budgets" in metrics else ""), ylabel="accuracy")


def evaluated(axis: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Draw the accuracies that were evaluated during training against the step."""
    keys = dict.fromkeys(
        key for line in metrics for key in line if key.startswith("eval/") and key.endswith("/accuracy")
    )
    for i, key in enumerate(keys):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        label = f"{key.split('/')[1]}, evaluated"
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=PALETTE[3:][i % 4], label=label)


def show(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table of a run, if anything was evaluated, and what after differs in from before."""
    found = {phase: report[phase] for phase in ("before", "after") if report.get(phase)}
    if found:
        _print(f"{report['name']}: ", found, console or Console())


def show_comparison(
    evaluations: Mapping[str, Mapping[str, Any]], benchmark: str | None = None, console: Console | None = None
) -> None:
    """Print the comparison of several models, and what each differs in from the first."""
    _print(f"{benchmark}: " if benchmark else "", evaluations, console or Console())


def _print(title: str, evaluations: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    console.print(table(title, evaluations))
    for sentence in comparisons(evaluations):
        console.print(sentence, markup=False, highlight=False)


def curves(summaries: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy against thinking budget of several models into one PNG, intervals shaded."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for i, (name, metrics) in enumerate(summaries.items()):
        curve(axis, metrics, name, PALETTE[i % len(PALETTE)])
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plane(points: Mapping[str, tuple[Estimate, Estimate]], path: Path) -> None:
    """Draw settings as points with their intervals into one PNG: thinking tokens to the right, accuracy upwards.

    Args:
        points: name -> (thinking tokens, accuracy).
        path: where to write.
    """
    figure, axis = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for i, (name, (tokens, accuracy)) in enumerate(points.items()):
        axis.errorbar(
            tokens.mean,
            accuracy.mean,
            xerr=tokens.half_width,
            yerr=accuracy.half_width,
            fmt=MARKERS[i // len(PALETTE) % len(MARKERS)],
            color=PALETTE[i % len(PALETTE)],
            capsize=2,
            label=name,
        )
    axis.set(xlabel="thinking tokens, mean", ylabel="accuracy")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def panels(found: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Draw accuracy against thinking tokens, a panel for each benchmark and a colour for each model, into one PNG.

    Args:
        found: benchmark -> model -> metrics as `rltoken.evals.metrics.summary` gives them.
        path: where to write.
    """
    models = list(dict.fromkeys(model for each in found.values() for model in each))
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.6 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, (name, each) in zip(axes.flat, found.items(), strict=False):
        for model, metrics in each.items():
            curve(axis, metrics, model, PALETTE[models.index(model) % len(PALETTE)])
        axis.set_title(name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
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
        if axis is rewards:
            evaluated(axis, metrics)
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
