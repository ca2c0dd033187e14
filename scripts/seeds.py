#!/usr/bin/env python
"""Compare settings over seeds: before against after, and every setting against every other, paired over seeds.

    python -m rltoken.train +exp=grpo,brpo seed=0,1,2,3,4 'model.seed=${seed}' --multirun
    python scripts/seeds.py runs/*-s* --picture curves.png
    python scripts/seeds.py runs/*-s* --plane plane.png      accuracy against thinking tokens, a point for each setting
    python scripts/seeds.py runs/*-s* --level 0.9       after how many steps rollouts are right nine times in ten
    python scripts/seeds.py runs/*-s* --metric clip_ratio/region_mean    and any other number that training logged
    python scripts/seeds.py runs/grpo-s* ev/short ev/long    runs, and runs as rltoken.evaluate asked them otherwise
    python scripts/seeds.py --evaluations evaluations/*  the same runs, by rltoken.evaluate in several ways

Runs that differ in nothing but their seeds are one setting. Each run's numbers are means over one fixed problem set;
intervals are Student's t over the seeds (95 %), of the paired differences where two things are compared. Run folders
without a report are left out, and said to be. A folder of rltoken.evaluate stands for the runs that it evaluated: its
name, and what came out, in the place of `after`; it may differ from the others in `eval.prompts` alone.

While training: the accuracy of all rollouts of the run, and the entropy of the last five windows, both as logged; of
runs with formats (docs/methods/ada_grpo.md) the shares of these in the last five windows, and the largest of them; of
what --metric names, as metrics.jsonl calls it, the mean of all steps that logged it and that of the last five. The
level is reached at the first optimizer step at which the mean of five windows has it. A run that never does counts with
its last step, which understates differences; how many these are stands beside it.
"""

import argparse
import itertools
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from rltoken import identity
from rltoken.evals.intervals import mean_interval, paired_interval
from rltoken.report import curves as draw
from rltoken.report import plane, read_metrics

METRICS = {
    "accuracy": ".3f",
    "pass_at_k": ".3f",
    "anytime_accuracy": ".3f",
    "final_accuracy": ".3f",
    "normalised_regret": ".3f",
    "thinking_tokens": ".1f",
    "majority_at_k": ".3f",
    "weighted_majority": ".3f",
    "mean_logp_majority": ".3f",
    "self_reward_accuracy": ".3f",
    "self_reward_f1": ".3f",
    "self_reward_auroc": ".3f",
    "mean_logp_auroc": ".3f",
}
"""Numbers that are shown where every report has them -> how; of those at several k, that of all samples."""
AGAINST = (
    ("weighted_majority", "majority_at_k"),
    ("weighted_majority", "mean_logp_majority"),
    ("self_reward_auroc", "mean_logp_auroc"),
)
"""Numbers of one evaluation that are compared with each other."""
FORMATS = tuple(f"format/{name}" for name in ("direct", "short", "code", "long", "broken"))
TRAINING = {
    "rollout_accuracy": ".3f",
    "entropy": ".3f",
    **dict.fromkeys((*FORMATS, "largest_format"), ".3f"),
    "steps_to_level": ".1f",
}
EVALUATION = {"accuracy": ".3f", "sampled_tokens": ".1f"}
"""What is shown of an evaluation; tokens are all that were sampled for one answer, forced answers included."""
FORMS = defaultdict(lambda: ".4f", METRICS | TRAINING | EVALUATION)
SMOOTHED = 5
"""Windows whose mean is looked at while training: the accuracy of one is that of a few dozen completions."""
SEEDS = {"seed", "model.seed", "model.source.seed", "model.source.path", "sft.traces.path"}
"""What differs between the runs of one setting; each seed may begin with a model, or traces, of its own."""
PHASES = {"after": "after training", "training": "while training", "evaluation": "evaluated in several ways"}
EVALUATED = ("eval.", "data.eval.", "reward.", "rollout.max_thinking_tokens")
"""Keys that must agree for numbers to be compared."""
FREE = ("eval.before", "eval.after", "eval.during.", "eval.prompts")
"""Those among them that need not: when runs are evaluated, and what their prompts ask for."""


def read(folders, level=None, logged=()):
    """Setting -> seed -> report of the finished runs, with what `while_training` says of each as a further phase.

    Raises:
        SystemExit: two runs of one setting have the same seed, were evaluated otherwise, or there is none.
    """
    settings, labels, evaluated = defaultdict(dict), {}, {}
    for folder, report, name, how in itertools.chain.from_iterable(map(reports_of, folders)):
        values = identity.settings(OmegaConf.load(folder / "config.yaml"))
        how = {key: value for key, value in (values | how).items() if key.startswith(EVALUATED)}
        how = {key: value for key, value in how.items() if not key.startswith(FREE)}
        for key in sorted(how.keys() | evaluated.keys() if evaluated else ()):
            if how.get(key) != evaluated.get(key):
                sys.exit(
                    f"{folder}: {key}={how.get(key)} where runs before it have {evaluated.get(key)}; compare them apart"
                )
        evaluated = how
        report["training"] = {} if name else while_training(folder, level, logged)
        key = name + json.dumps({name: values[name] for name in sorted(values.keys() - SEEDS)}, default=str)
        label = re.sub(r"-s\d+(?=-|$)|-(model\.)?seed=\d+", "", folder.name)
        label = labels.setdefault(key, f"{label}, {name}" if name else label)
        if values["seed"] in settings[label]:
            sys.exit(f"{folder}: there are two finished runs of {label} with seed {values['seed']}; name one of them")
        settings[label][values["seed"]] = report | {
            phase: of_all_samples(report[phase]) for phase in ("before", "after")
        }
    if len(set(labels.values())) < len(labels):
        sys.exit("two settings would have the same label: give the runs names that say how they differ")
    if not settings:
        sys.exit("no finished run among these folders")
    return settings


def reports_of(folder):
    """Run, report, name and settings of each finished evaluation before and after training that a folder stands for.

    The name is that of a folder of rltoken.evaluate, whose settings of evaluation go before the run's; of a run itself
    it is empty.
    """
    if (folder / "report.json").is_file():
        found = [(folder, json.loads((folder / "report.json").read_text()), "", {})]
    elif (folder / "metrics.json").is_file():
        results = json.loads((folder / "metrics.json").read_text())
        runs = {name: Path(one["model"]).parent for name, one in results["settings"].items()}
        found = [
            (
                runs[name],
                json.loads((runs[name] / "report.json").read_text()) | {"after": after},
                folder.name,
                identity.flat(results["settings"][name]),
            )
            for name, after in results["models"].items()
        ]
    else:
        print(f"{folder}: left out, it has no report.json, so it is not finished", file=sys.stderr)
        found = []
    whole = [one for one in found if one[1]["before"] and one[1]["after"]]
    if len(whole) < len(found):
        print(f"{folder}: left out, it was not evaluated before and after", file=sys.stderr)
    return whole


def of_all_samples(numbers):
    """The numbers of an evaluation, of those at several k that at the last one alone."""
    return {
        name: value[-1] if name in METRICS and isinstance(value, list) else value for name, value in numbers.items()
    }


def while_training(folder, level, logged):
    """Accuracy of the rollouts, entropy at the end, steps to a level and what `logged` names, if the run has them."""
    steps = list(read_metrics(folder / "metrics.jsonl"))
    lines = [line for line in steps if "rewards/accuracy/mean" in line]
    if len(lines) < SMOOTHED:
        return {}
    accuracy = [line["rewards/accuracy/mean"] for line in lines]
    found = {
        "rollout_accuracy": fmean(accuracy),
        "entropy": fmean(line["entropy"] for line in lines[-SMOOTHED:]),
    }
    for name in logged:
        values = [line[name] for line in steps if name in line]  # not only of those that sampled
        found |= dict(zip(columns_of(name), (fmean(values), fmean(values[-SMOOTHED:])), strict=True)) if values else {}
    if formats := [name for name in FORMATS if name in lines[-1]]:
        found |= {name: fmean(line[name] for line in lines[-SMOOTHED:]) for name in formats}
        found["largest_format"] = max(found[name] for name in formats)
    if level is None:
        return found
    smooth = [fmean(accuracy[end - SMOOTHED : end]) for end in range(SMOOTHED, len(accuracy) + 1)]
    reached = [line["step"] for line, value in zip(lines[SMOOTHED - 1 :], smooth, strict=True) if value >= level]
    return found | {"steps_to_level": reached[0] if reached else lines[-1]["step"], "never": not reached}


def columns_of(name):
    """How the mean of a logged number over all steps, and that over the last five, are called."""
    return f"{name}, all", f"{name}, last {SMOOTHED}"


def difference(after, before, form):
    """The mean paired difference with its interval."""
    found = paired_interval(after, before)
    return f"{found.mean:+{form}} ± {found.half_width:{form}}"


def read_evaluations(folders):
    """Folder's name -> model -> its accuracy and tokens, in the shape of what `read` gives of runs.

    Raises:
        SystemExit: a folder is no finished evaluation, or holds other models than the one before it.
    """
    found = {}
    for folder in folders:
        if not (folder / "metrics.json").is_file():
            sys.exit(f"{folder}: it has no metrics.json, so it is no finished evaluation")
        results = json.loads((folder / "metrics.json").read_text())
        found[folder.name] = {
            name: {
                "evaluation": {
                    "accuracy": numbers["accuracy"],
                    "sampled_tokens": results["tokens"][name]["sampled"] / numbers["samples"],
                }
            }
            for name, numbers in results["models"].items()
        }
        if found[folder.name].keys() != next(iter(found.values())).keys():
            sys.exit(f"{folder}: its models are not those of {folders[0]}; evaluate the same runs in each way")
    return found


def each_evaluation(found):
    """Every way in which the same models were evaluated."""
    table = Table(title="evaluated in several ways; ± is the half width of the 95 % t interval over models")
    for column in ("evaluation", "models", *EVALUATION):
        table.add_column(column.replace("_", " "), justify="left" if column == "evaluation" else "right")
    for label, models in found.items():
        values = [[model["evaluation"][metric] for model in models.values()] for metric in EVALUATION]
        means = [f"{mean_interval(each):{form}}" for each, form in zip(values, EVALUATION.values(), strict=True)]
        table.add_row(label, str(len(models)), *means)
    return table


def each_setting(settings, metrics):
    """Before, after and their paired difference of every setting."""
    table = Table(title="before and after; ± is the half width of the 95 % t interval over seeds")
    for column in ("setting", "seeds", "", *metrics):
        table.add_column(column.replace("_", " "), justify="left" if column in ("setting", "") else "right")
    for label, reports in settings.items():
        values = {phase: {m: [r[phase][m] for r in reports.values()] for m in metrics} for phase in ("before", "after")}
        for phase, name in (("before", label), ("after", "")):
            means = [f"{mean_interval(values[phase][metric]):{FORMS[metric]}}" for metric in metrics]
            table.add_row(name, str(len(reports)) if name else "", phase, *means)
        change = [difference(values["after"][m], values["before"][m], FORMS[m]) for m in metrics]
        table.add_row("", "", "after - before", *change, end_section=True)
    return table


def each_training(settings, metrics):
    """What every setting was like while it trained."""
    table = Table(title="while training")
    for column in ("setting", "seeds", *metrics, *(["never"] if "steps_to_level" in metrics else [])):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for label, reports in settings.items():
        runs = [report["training"] for report in reports.values()]
        means = [f"{mean_interval([run[metric] for run in runs]):{FORMS[metric]}}" for metric in metrics]
        never = [str(sum(run["never"] for run in runs))] if "steps_to_level" in metrics else []
        table.add_row(label, str(len(reports)), *means, *never)
    return table


def each_pair(settings, metrics, phase):
    """The difference in a phase between every two settings, over the seeds that both have."""
    table = Table(title=f"{PHASES[phase]}, paired over the seeds that both settings have")
    for column in ("difference", "seeds", *metrics):
        table.add_column(column.replace("_", " "), justify="left" if column == "difference" else "right")
    for one, other in itertools.combinations(settings, 2):
        seeds = sorted(settings[one].keys() & settings[other].keys())
        if not seeds:
            continue
        values = [[[settings[label][s][phase][m] for s in seeds] for label in (one, other)] for m in metrics]
        cells = [difference(*pair, FORMS[metric]) for pair, metric in zip(values, metrics, strict=True)]
        table.add_row(f"{one} - {other}", str(len(seeds)), *cells)
    return table


def each_against(settings, pairs):
    """The difference of two numbers of one evaluation, before and after training."""
    table = Table(title="of one evaluation, paired over seeds")
    for column in ("setting", "difference", "seeds", "before", "after"):
        table.add_column(column, justify="left" if column in ("setting", "difference") else "right")
    for label, reports in settings.items():
        for one, other in pairs:
            cells = [
                difference(*([report[phase][name] for report in reports.values()] for name in (one, other)), ".3f")
                for phase in ("before", "after")
            ]
            table.add_row(label, f"{one} - {other}", str(len(reports)), *cells)
    return table


def over_seeds(summaries):
    """One curve out of the curves of all seeds: means with t intervals."""
    columns = zip(*(summary["budget_accuracy"] for summary in summaries), strict=True)
    each = [mean_interval(column) for column in columns]
    return {
        "budgets": summaries[0]["budgets"],
        "budget_accuracy": [estimate.mean for estimate in each],
        "budget_accuracy_interval": [(estimate.low, estimate.high) for estimate in each],
    }


def ends(settings):
    """Where the first setting began, and where training brought each: label -> the numbers of every seed."""
    began = [report["before"] for report in next(iter(settings.values())).values()]
    return {"start": began} | {label: [run["after"] for run in runs.values()] for label, runs in settings.items()}


def place(summaries):
    """Thinking tokens and accuracy over all seeds."""
    return tuple(mean_interval([one[metric] for one in summaries]) for metric in ("thinking_tokens", "accuracy"))


def known(metrics, phases, reports):
    """Those metrics that every report has in these phases."""
    found = [report[phase] for report in reports for phase in phases]
    return [metric for metric in metrics if all(numbers.get(metric) is not None for numbers in found)]


def main() -> None:
    """Print the tables, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories, or folders of evaluations of runs")
    parser.add_argument("--evaluations", nargs="+", type=Path, help="folders of rltoken.evaluate, to compare instead")
    parser.add_argument("--picture", type=Path, help="draw accuracy against thinking budget into this PNG")
    parser.add_argument("--plane", type=Path, help="draw accuracy against thinking tokens into this PNG")
    parser.add_argument("--metric", action="append", default=[], help="a number of metrics.jsonl, to compare too")
    parser.add_argument("--level", type=float, help="count the steps until rollouts have this accuracy")
    options = parser.parse_args()
    if bool(options.runs) == bool(options.evaluations):
        parser.error("name run directories, or --evaluations and folders of rltoken.evaluate")
    if options.evaluations:
        found, console = read_evaluations(options.evaluations), Console(width=160)
        console.print(each_evaluation(found))
        console.print(each_pair(found, EVALUATION, "evaluation"))
        return
    settings = read(options.runs, options.level, options.metric)
    reports = [report for runs in settings.values() for report in runs.values()]
    metrics = known(METRICS, ("before", "after"), reports)
    named = [name for metric in options.metric for name in columns_of(metric)]
    trained = known([*TRAINING, *named], ("training",), reports)
    if missing := sorted(set(named) - set(trained)):
        sys.exit(f"--metric: some of the runs logged no {missing[0]}")
    if options.level is not None and "steps_to_level" not in trained:
        sys.exit("--level: some of the runs logged no accuracy, or that of fewer than five windows")
    console = Console(width=max(160, 40 + 17 * max(len(metrics), len(trained))))
    console.print(each_setting(settings, metrics))
    if trained:
        console.print(each_training(settings, trained))
    if len(settings) > 1:
        console.print(each_pair(settings, metrics, "after"))
        if trained:
            console.print(each_pair(settings, trained, "training"))
    if pairs := [pair for pair in AGAINST if set(pair) <= set(metrics)]:
        console.print(each_against(settings, pairs))
    if options.picture and "anytime_accuracy" not in metrics:
        sys.exit("--picture: no answers were forced at budgets in some of the runs, so there are no curves")
    if options.picture:
        draw({label: over_seeds(each) for label, each in ends(settings).items()}, options.picture)
    if options.plane:
        plane({label: place(each) for label, each in ends(settings).items()}, options.plane)


if __name__ == "__main__":
    main()
