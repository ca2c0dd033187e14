#!/usr/bin/env python
"""Before against after over the seeds of one setting, with a paired t interval over seeds.

    python -m rltoken.train +exp=grpo seed=0,1,2,3,4 'model.source.seed=${seed}' --multirun
    python scripts/seeds.py runs/grpo-tiny-s*

Each run is one seed; its accuracy is a mean over the same fixed problem set before and after training.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rltoken.evals.metrics import mean_interval, paired_interval

METRICS = {"accuracy": "{:.3f}", "thinking_tokens": "{:.1f}", "truncated": "{:.3f}"}


def main() -> None:
    """Print one row per run and one per mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, one per seed")
    folders = parser.parse_args().runs
    reports = {folder.name: json.loads((folder / "report.json").read_text()) for folder in folders}
    table = Table(title=f"{len(reports)} seeds; ± is the half width of the 95 % t interval over seeds")
    for column in ("run", *(f"{name} {phase}" for name in METRICS for phase in ("before", "after"))):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, report in reports.items():
        cells = [form.format(report[phase][key]) for key, form in METRICS.items() for phase in ("before", "after")]
        table.add_row(name, *cells)
    means, differences = [], []
    for key, form in METRICS.items():
        before, after = ([report[phase][key] for report in reports.values()] for phase in ("before", "after"))
        means += [f"{mean_interval(values):{form[2:-1]}}" for values in (before, after)]
        differences.append(f"{key} {paired_interval(after, before):+{form[3:-1]}}".replace("± +", "± "))
    table.add_section()
    table.add_row("mean", *means)
    console = Console(width=160)
    console.print(table)
    console.print(f"after - before, paired over seeds: {'; '.join(differences)}")


if __name__ == "__main__":
    main()
