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
    ("thinking tokens, mean", "thinking_tokens", "{:.1f}", "thinking_tokens_half_width"),
    ("thinking tokens, median", "thinking_tokens_median", "{:.0f}", None),
    ("thinking tokens, 95th percentile", "thinking_tokens_p95", "{:.0f}", None),
    ("completion tokens, mean", "completion_tokens", "{:.1f}", None),
    ("completions cut", "truncated", "{:.1%}", None),
)
COLOURS = {"before": "#999999", "after": "#0072B2", "curve": "#D55E00"}
"""From the palette of Okabe and Ito, told apart by colour-blind readers too."""


def table(report: Mapping[str, Any]) -> Table:
    """Before and after, with 95 % intervals clustered by problem where there are any."""
    found = [(phase, report[phase]) for phase in ("before", "after") if report.get(phase)]
    numbers = found[-1][1]
    made = Table(
        title=f"{report['name']}: {numbers['problems']} problems x {numbers['samples'] // numbers['problems']} samples",
        caption="± is the half width of the 95 % interval, clustered by problem",
    )
    made.add_column("")
    for phase, _ in found:
        made.add_column(phase, justify="right")
    for label, key, form, half_width in ROWS:
        cells = [
            form.format(metrics[key])
            + (f" ± {form.format(metrics[half_width])}" if metrics.get(half_width) is not None else "")
            for _, metrics in found
        ]
        made.add_row(label, *cells)
    return made


def show(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table, if anything was evaluated."""
    if report.get("before") or report.get("after"):
        (console or Console()).print(table(report))


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
        numbers = report.get(phase)
        if numbers:
            final.errorbar(
                numbers["thinking_tokens"],
                numbers["accuracy"],
                xerr=numbers["thinking_tokens_half_width"],
                yerr=numbers["accuracy_half_width"],
                fmt="o",
                capsize=3,
                color=COLOURS[phase],
                label=phase,
            )
    final.set(xlabel="thinking tokens", ylabel="accuracy", title="evaluation, 95 % intervals")
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
