"""`scripts/seeds.py`: runs grouped by what differs besides seeds, paired differences, and what it refuses."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_folder(root, name, *, seed, exp, after, samples=4, rollouts=(), shares=None):
    """A finished run with an accuracy of `after` at both of two budgets, whose rollouts were as accurate as said.

    `shares` holds, for a format, its share in every window.
    """
    folder = root / name
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"name: {name}\nseed: {seed}\nmodel: {{seed: {seed}, source: {{path: starts/{seed}}}}}\n"
        f"method: {exp}\neval: {{samples: {samples}}}\n"
    )
    phases = {
        phase: {
            "accuracy": value, "anytime_accuracy": value, "final_accuracy": value, "thinking_tokens": 10 * value,
            "k": [2, 4], "pass_at_k": [value, value + 0.05],
            "budgets": [4, 8], "budget_accuracy": [value / 2, value], "budget_accuracy_half_width": [0.1, 0.1],
        }
        for phase, value in (("before", 0.5), ("after", after))
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps({"name": name, **phases}))
    logged = [
        {"step": 2 * i + 2, "rewards/accuracy/mean": a, "entropy": 1 - a}
        | {f"format/{form}": share[i] for form, share in (shares or {}).items()}
        for i, a in enumerate(rollouts)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*logged, {"train_loss": 0.0}]))
    return folder


@pytest.fixture
def seeds(monkeypatch, capsys):
    """seeds(*arguments) -> returncode, stdout, stderr of the script, in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("seeds")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["seeds.py", *map(str, arguments)])
        code, message = 0, ""
        try:
            script.main()
        except SystemExit as left:
            code, message = (1, left.code) if isinstance(left.code, str) else (left.code or 0, "")
        told = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=told.out, stderr=told.err + message)

    return run


def cells_of(found):
    """The cells of every line of the tables."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in found.stdout.splitlines()]


@pytest.fixture
def folders(tmp_path):
    """Two settings with two seeds each."""
    values = {("a", 0): 0.7, ("a", 1): 0.9, ("b", 0): 0.6, ("b", 1): 0.7}
    return [run_folder(tmp_path, f"{exp}-tiny-s{s}", seed=s, exp=exp, after=v) for (exp, s), v in values.items()]


def test_settings_are_compared_over_their_seeds(folders, tmp_path, seeds):
    unfinished = tmp_path / "a-tiny-s2"
    unfinished.mkdir()
    found = seeds(*folders, unfinished, "--picture", tmp_path / "curves.png")
    assert found.returncode == 0, found.stderr
    assert "a-tiny-s2: left out, it has no report.json" in found.stderr
    # .7 and .9: mean .8, s = .141421, t(.975, 1) = 12.706: half width 1.271
    assert "0.800 ± 1.271" in found.stdout and "+0.300 ± 1.271" in found.stdout
    # paired a - b: .1 and .2, mean .15, s = .0707: half width .635
    assert "a-tiny - b-tiny" in found.stdout and "+0.150 ± 0.635" in found.stdout
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_the_plane_has_a_point_for_the_start_and_for_each_setting(folders, tmp_path, seeds, monkeypatch):
    """Of a, .7 and .9: accuracy .8 with half width 1.271, tokens 10 times that; both began at .5."""
    found = seeds(*folders, "--plane", tmp_path / "plane.png")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "plane.png").stat().st_size > 5000
    drawn = {}
    monkeypatch.setattr(importlib.import_module("seeds"), "plane", lambda points, path: drawn.update(points))
    seeds(*folders, "--plane", tmp_path / "plane.png")
    shown = {name: (f"{tokens:.1f}", f"{accuracy:.3f}") for name, (tokens, accuracy) in drawn.items()}
    assert shown["start"] == ("5.0 ± 0.0", "0.500 ± 0.000") and shown["a-tiny"] == ("8.0 ± 12.7", "0.800 ± 1.271")
    assert shown.keys() == {"start", "a-tiny", "b-tiny"}


def test_numbers_of_one_evaluation_are_compared_where_every_report_has_them(folders, seeds):
    """Of .7 and .9: the vote gains .1 and .2, mean .15, s = .0707, half width .635; before, .25 in both runs."""
    for folder, gain in zip(folders[:2], (0.1, 0.2), strict=True):
        path = folder / "report.json"
        report = json.loads(path.read_text())
        for phase, more in (("before", 0.25), ("after", gain)):
            accuracy = report[phase]["accuracy"]
            report[phase] |= {"majority_at_k": [0.1, accuracy], "weighted_majority": accuracy + more}
        path.write_text(json.dumps(report))
    found = seeds(*folders[:2])
    assert found.returncode == 0, found.stderr
    (line,) = (line for line in found.stdout.splitlines() if "weighted_majority - majority_at_k" in line)
    assert "+0.250 ± 0.000" in line and "+0.150 ± 0.635" in line
    assert "self_reward_auroc" not in found.stdout
    assert "weighted_majority" not in seeds(*folders).stdout, "two of the four runs have none"


def test_a_seed_twice_and_no_run_are_refused(folders, tmp_path, seeds):
    again = run_folder(tmp_path, "again", seed=0, exp="a", after=0.8)
    found = seeds(*folders, again)
    assert found.returncode == 1 and "there are two finished runs of a-tiny with seed 0" in found.stderr
    assert seeds(tmp_path).returncode == 1
    other = run_folder(tmp_path, "other", seed=5, exp="a", after=0.8, samples=1)
    found = seeds(*folders, other)
    assert found.returncode == 1 and "eval.samples=1 where runs before it have 4" in found.stderr


def test_evaluations_of_runs_stand_for_what_they_asked(folders, tmp_path, seeds):
    """Asked otherwise, two runs with .7 and .9 after training have .6 and .7: .15 less, half width as above."""
    short = tmp_path / "short"
    short.mkdir()
    results = {"settings": {}, "models": {}}
    for folder, accuracy in zip(folders[:2], (0.6, 0.7), strict=True):
        after = json.loads((folder / "report.json").read_text())["after"]
        results["models"][folder.name] = after | {"accuracy": accuracy}
        how = {"samples": 4, "prompts": {"tldr_style": {"levels": ["short"]}}}
        results["settings"][folder.name] = {"model": f"{folder}/final", "eval": how}
    (short / "metrics.json").write_text(json.dumps(results))
    found = seeds(*folders[:2], short)
    assert found.returncode == 0, found.stderr
    (line,) = (line for line in found.stdout.splitlines() if "a-tiny - a-tiny, short" in line)
    assert "+0.150 ± 0.635" in line
    for one in results["settings"].values():
        one["eval"]["samples"] = 2
    (short / "metrics.json").write_text(json.dumps(results))
    found = seeds(*folders[:2], short)
    assert found.returncode == 1 and "eval.samples=2 where runs before it have 4" in found.stderr


def test_training_is_compared_too(tmp_path, seeds):
    """The means of five steps are .5, .6, .7 at the steps 10, 12 and 14 of one run, and .5 throughout of the other."""
    rises, stays = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], [0.5] * 7
    runs = {("a", 0): rises, ("a", 1): rises, ("b", 0): stays, ("b", 1): stays}
    folders = [
        run_folder(tmp_path, f"{exp}-tiny-s{seed}", seed=seed, exp=exp, after=0.7, rollouts=accuracy)
        for (exp, seed), accuracy in runs.items()
    ]
    found = seeds(*folders, "--level", "0.55")
    assert found.returncode == 0, found.stderr
    cells = cells_of(found)
    # entropies of the last five steps: 1 - .7 and 1 - .5
    assert ["a-tiny", "2", "0.600 ± 0.000", "0.300 ± 0.000", "12.0 ± 0.0", "0"] in cells
    assert ["b-tiny", "2", "0.500 ± 0.000", "0.500 ± 0.000", "14.0 ± 0.0", "2"] in cells
    assert ["a-tiny - b-tiny", "2", "+0.100 ± 0.000", "-0.200 ± 0.000", "-2.0 ± 0.0"] in cells
    assert "0.750 ± 0.000" in found.stdout, "pass@4 after training"
    assert "steps_to_level" not in seeds(*folders).stdout
    bare = run_folder(tmp_path, "c-tiny-s0", seed=0, exp="c", after=0.7)
    found = seeds(*folders, bare, "--level", "0.5")
    assert found.returncode == 1 and "--level: some of the runs logged no accuracy" in found.stderr


def test_any_number_that_was_logged_is_compared_on_demand(tmp_path, seeds):
    """Entropies from 1 to 0.4: 0.7 over all steps and 0.6 in the last five."""
    rollouts = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    runs = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    folders = [run_folder(tmp_path, f"{e}-tiny-s{s}", seed=s, exp=e, after=0.7, rollouts=rollouts) for e, s in runs]
    found = seeds(*folders, "--metric", "entropy")
    assert found.returncode == 0, found.stderr
    cells = ["a-tiny", "2", "0.300 ± 0.000", "0.600 ± 0.000", "0.7000 ± 0.0000", "0.6000 ± 0.0000"]
    assert cells in cells_of(found) and "entropy, last 5" in found.stdout
    missing = seeds(*folders, "--metric", "entropi")
    assert missing.returncode == 1 and "--metric: some of the runs logged no entropi" in missing.stderr


def test_the_shares_of_formats_are_those_of_the_last_windows(tmp_path, seeds):
    """Six windows, of which the first does not count; the largest is that of the means."""
    rollouts, shares = [0.5] * 6, {"short": [0.9, *[0.25] * 5], "code": [0.1, 0.5, 0.5, 0.5, 1.0, 1.0]}
    folders = [
        run_folder(tmp_path, f"a-tiny-s{s}", seed=s, exp="a", after=0.7, rollouts=rollouts, shares=shares)
        for s in (0, 1)
    ]
    found = seeds(*folders)
    means = ["0.500 ± 0.000", "0.500 ± 0.000", "0.250 ± 0.000", "0.700 ± 0.000", "0.700 ± 0.000"]
    assert ["a-tiny", "2", *means] in cells_of(found)
    assert "format/short" in found.stdout and "format/direct" not in found.stdout
    bare = run_folder(tmp_path, "b-tiny-s0", seed=0, exp="b", after=0.7, rollouts=rollouts)
    assert "largest_format" not in seeds(*folders, bare).stdout


def evaluation(root, name, **models):
    """A folder as rltoken.evaluate leaves it: model -> (accuracy, tokens sampled for all of its 8 answers)."""
    folder = root / name
    folder.mkdir()
    results = {
        "models": {model: {"accuracy": accuracy, "samples": 8} for model, (accuracy, _) in models.items()},
        "tokens": {model: {"sampled": tokens} for model, (_, tokens) in models.items()},
    }
    (folder / "metrics.json").write_text(json.dumps(results))
    return folder


def test_ways_of_evaluation_are_compared(tmp_path, seeds):
    """The same differences as above: .1 and .2 in accuracy; 80 and 96 tokens of 8 answers are 10 and 12, mean 11."""
    one = evaluation(tmp_path, "short", a=(0.7, 80), b=(0.9, 96))
    other = evaluation(tmp_path, "direct", a=(0.6, 8), b=(0.7, 24))
    found = seeds("--evaluations", one, other)
    assert found.returncode == 0, found.stderr
    cells = cells_of(found)
    assert ["short", "2", "0.800 ± 1.271", "11.0 ± 12.7"] in cells
    assert ["short - direct", "2", "+0.150 ± 0.635", "+9.0 ± 0.0"] in cells
    third = evaluation(tmp_path, "long", a=(0.6, 8))
    found = seeds("--evaluations", one, third)
    assert found.returncode == 1 and "its models are not those of" in found.stderr
    assert "it has no metrics.json" in seeds("--evaluations", tmp_path).stderr
    assert "name run directories, or --evaluations" in seeds().stderr
