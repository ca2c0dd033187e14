"""One table of several finished evaluations, models side by side: `python -m rltoken.overview evaluations/*/*`.

Writes summary.csv and curves.png into the folder that all of them are in. A sweep of rltoken.evaluate over benchmarks
(`eval=aime24,math500 --multirun`) ends with the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from rltoken import identity, report
from rltoken.errors import UserError, first_line
from rltoken.evals.intervals import compare
from rltoken.evals.shards import written
from rltoken.evaluate import RESULTS, WHEN

SIGNIFICANT = 0.05
OF_A_MODEL = re.compile(r"eval\.(batch_size|chunk)|.*\.(think_end|workers)")
"""Settings that follow from the model and the machine."""
Found = dict[str, dict[str, Mapping[str, Any]]]
"""Benchmark -> model -> the metrics of that evaluation, in order of appearance."""
ROWS = (
    ("{name}, avg@{each}", "accuracy", "{:.3f}"),
    ("{name}, anytime accuracy", "anytime_accuracy", "{:.3f}"),
    ("{name}, thinking tokens", "thinking_tokens", "{:.1f}"),
)


def main() -> None:
    """The entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help=f"where rltoken.evaluate has written {RESULTS}")
    parser.add_argument("--out", type=Path, help="where to write; by default the folder that all of them are in")
    arguments = parser.parse_args()
    try:
        show(arguments.folders, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def show(folders: Sequence[Path], out: Path | None = None, console: Console | None = None) -> None:
    """Print the table of finished evaluations, and write summary.csv and curves.png.

    Args:
        folders: of results.
        out: where to write; None: the folder that all of them are in.
        console: where to print.

    Raises:
        UserError: a folder has no results, or two hold the same model and benchmark, or were not measured alike.
    """
    found = collected(folders)
    rows = [_read(folder / "summary.csv", pd.read_csv) for folder in folders]
    if out is not None and out.is_file():
        raise UserError(f"--out: {out} is a file; name a folder.")
    out = out or Path(os.path.relpath(os.path.commonpath([folder.absolute().parent for folder in folders])))
    out.mkdir(parents=True, exist_ok=True)
    written(out / "summary.csv", pd.concat(rows, ignore_index=True).to_csv(index=False).encode())
    report.panels(found, out / "curves.png")
    (console or Console()).print(table(found))
    print(f"all of them: {out / 'summary.csv'}, picture: {out / 'curves.png'}")


def collected(folders: Sequence[Path]) -> Found:
    """The metrics in folders of results.

    Raises:
        UserError: as `show`.
    """
    found: Found = {}
    measured: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        if not (folder / RESULTS).is_file():
            raise UserError(f"{folder}: there is no {RESULTS}; name folders that rltoken.evaluate has finished.")
        for model, name, settings, metrics in _read(folder / RESULTS, _evaluations):
            first, expected = measured.setdefault(name, (folder, settings))
            for key in sorted(expected.keys() | settings.keys()):
                if expected.get(key) != settings.get(key):
                    raise UserError(
                        f"{folder}: {key} is {settings.get(key)} there, and {expected.get(key)} in {first}; evaluate "
                        f"{name} alike, or show them apart."
                    )
            if model in found.setdefault(name, {}):
                raise UserError(f"{folder}: {model} on {name} is in another folder too; name one of them.")
            found[name][model] = metrics
    return found


def _read(path: Path, parse: Callable[[Path], Any]) -> Any:
    """What `parse` makes of a file of results.

    Raises:
        UserError: it is not there, or is not as rltoken.evaluate writes it.
    """
    try:
        return parse(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: it is not as rltoken.evaluate writes it ({type(error).__name__}: {first_line(error)}); evaluate "
            "again into another folder."
        ) from error


def _evaluations(path: Path) -> list[tuple[str, str, dict[str, Any], Mapping[str, Any]]]:
    """Model, benchmark, what others of the benchmark must share, and metrics, of each model in a file of results."""
    results = json.loads(path.read_text(encoding="utf-8"))
    found = []
    for model, metrics in results["models"].items():
        settings = results["settings"][model]
        shared = _alike(settings) | {
            "problems": results["identity"][model]["eval_data"],
            "budgets in tokens": metrics.get("budgets"),  # fractions may be of different lengths
        }
        found.append((model, settings["eval"]["benchmark"] or "sampled", shared, metrics))
    if not found:
        raise ValueError("no model is in it")
    return found


def _alike(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What all models of one benchmark must share, besides the problems."""
    flat = identity.flat({key: settings[key] for key in ("reward", "eval")})
    return {key: value for key, value in flat.items() if not (WHEN.fullmatch(key) or OF_A_MODEL.fullmatch(key))}


def table(found: Found) -> Table:
    """One column per model; of each benchmark its accuracy and thinking tokens, and in the end their plain means."""
    models = list(dict.fromkeys(model for each in found.values() for model in each))
    star = f"; * p < {SIGNIFICANT} against {models[0]}, paired" if len(models) > 1 else ""
    made = Table(
        title=f"{len(found)} benchmark{'s' if len(found) > 1 else ''}",
        caption=f"± and [ ] are 95 % intervals, clustered by problem{star}",
    )
    made.add_column("")
    for model in models:
        made.add_column(model, justify="right")
    for name, each in found.items():
        first = next(iter(each.values()))
        for label, key, form in ROWS:
            if all(key in metrics for metrics in each.values()):
                cells = [_cell(each, model, models[0], key, form) for model in models]
                made.add_row(label.format(name=name, each=first["samples"] // first["problems"]), *cells)
    if len(found) > 1:
        for what, key, form in (("accuracy", "accuracy", "{:.3f}"), ("thinking tokens", "thinking_tokens", "{:.1f}")):
            made.add_row(f"mean of benchmarks, {what}", *(_mean(found, model, key, form) for model in models))
    return made


def _cell(each: Mapping[str, Mapping[str, Any]], model: str, base: str, key: str, form: str) -> str:
    if model not in each:
        return "-"
    pairs = f"problem_{key}"
    told = report.cell(each[model], key, form)
    if model == base or base not in each or pairs not in each[model]:
        return told
    if each[base][pairs].keys() != each[model][pairs].keys():
        return told
    return told + (" *" if compare(each[model][pairs], each[base][pairs]).p < SIGNIFICANT else "")


def _mean(found: Found, model: str, key: str, form: str) -> str:
    values = [each[model][key] for each in found.values() if model in each]
    return form.format(sum(values) / len(values)) if len(values) == len(found) else "-"


if __name__ == "__main__":
    main()
