"""One table of several evaluations: what it holds, and what is not to be put into one."""

import io
import json
import re

import pandas as pd
import pytest
from rich.console import Console

from rltoken import overview
from rltoken.errors import UserError
from rltoken.evals.metrics import numbers, summary


def evaluated(folder, benchmark, models, problems="all", **changed):
    """A folder of results: of each model every problem right up to the given share."""
    folder.mkdir(parents=True)
    summaries = {}
    for model, (share, tokens) in models.items():
        table = pd.DataFrame({"id": [f"p{number}" for number in range(20)], "thinking_tokens": tokens, "outcome": "x"})
        table = table.assign(correct=(table.index < 20 * share).astype(float), truncated=False)
        table["completion_tokens"] = table["thinking_tokens"] + 2
        summaries[model] = summary(table)
    settings = {
        model: {
            "eval": {"benchmark": benchmark, "seed": 1, **changed},
            "data.eval": {"limit": None},
            "reward": {"funcs": {"a": {"think_end": model}}},
        }
        for model in models
    }
    identity = {model: {"eval_data": f"digest of {problems}"} for model in models}
    (folder / "metrics.json").write_text(json.dumps({"models": summaries, "settings": settings, "identity": identity}))
    rows = [{"model": model, "benchmark": benchmark, **numbers(metrics)} for model, metrics in summaries.items()]
    pd.DataFrame(rows).to_csv(folder / "summary.csv", index=False)
    return folder


def shown(folders, out=None):
    stream = io.StringIO()
    overview.show(folders, out, Console(file=stream, width=200))
    return {cells[0]: cells[1:] for line in stream.getvalue().splitlines() if (cells := re.findall(r"[^│┃]+", line))}


def test_models_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = {"a": (0.25, 100), "b": (0.75, 40)}
    folders = [
        evaluated(tmp_path / "x/aime24/ab", "aime24", both),
        evaluated(tmp_path / "x/amc23/a", "amc23", {"a": (1, 60)}),
    ]
    found = {key.strip(): [cell.strip() for cell in cells] for key, cells in shown(folders).items()}
    assert found["aime24, avg@1"][0].startswith("0.250 [") and found["aime24, avg@1"][1].startswith("0.750 [")
    assert found["aime24, avg@1"][1].endswith("*") and not found["aime24, avg@1"][0].endswith("*")
    assert found["amc23, avg@1"][1] == "-" and found["amc23, thinking tokens"][0].startswith("60.0")
    assert found["mean of benchmarks, accuracy"] == ["0.625", "-"]
    assert found["mean of benchmarks, thinking tokens"] == ["80.0", "-"]
    table = pd.read_csv(tmp_path / "x/summary.csv")
    assert table[["benchmark", "model", "accuracy"]].values.tolist() == [
        ["aime24", "a", 0.25], ["aime24", "b", 0.75], ["amc23", "a", 1.0],
    ]  # fmt: skip
    assert (tmp_path / "x/curves.png").stat().st_size > 5000
    assert "all of them: x/summary.csv, picture: x/curves.png" in capsys.readouterr().out


def test_what_was_not_measured_alike_is_refused(tmp_path):
    first = evaluated(tmp_path / "1", "aime24", {"a": (0.5, 10)})
    with pytest.raises(UserError, match=r"2: eval\.seed is 2 there, and 1 in .*/1; evaluate aime24 alike"):
        overview.collected([first, evaluated(tmp_path / "2", "aime24", {"b": (0.5, 10)}, seed=2)])
    with pytest.raises(UserError, match=r"4: problems is digest of some there, and digest of all in"):
        overview.collected([first, evaluated(tmp_path / "4", "aime24", {"b": (0.5, 10)}, problems="some")])
    with pytest.raises(UserError, match="3: a on aime24 is in another folder too"):
        overview.collected([first, evaluated(tmp_path / "3", "aime24", {"a": (0.5, 10)})])
    with pytest.raises(UserError, match=r"6: budgets in tokens is \[8\] there, and \[4\] in .*/5; evaluate"):
        overview.collected([with_budget(tmp_path / number, tokens) for number, tokens in (("5", 4), ("6", 8))])
    with pytest.raises(UserError, match=r"nowhere: there is no metrics\.json; name folders"):
        overview.collected([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("metrics.json", '{"models', "JSONDecodeError"),
        ("metrics.json", "[]", "TypeError"),
        ("metrics.json", "{}", "KeyError"),
        ("metrics.json", '{"models": {}}', "no model is in it"),
        ("summary.csv", "", "EmptyDataError"),
        ("summary.csv", None, "FileNotFoundError"),
    ],
)
def test_files_that_are_not_as_they_were_written_are_refused(tmp_path, name, text, told):
    folder = evaluated(tmp_path / "1/x", "aime24", {"a": (0.5, 10)})
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=rf"x/{name}: it is not as rltoken\.evaluate writes it \(.*{told}") as refused:
        overview.show([folder])
    assert "\n" not in str(refused.value) and not (tmp_path / "1/curves.png").exists()


def test_results_are_not_written_over_a_file(tmp_path):
    folder = evaluated(tmp_path / "1", "aime24", {"a": (0.5, 10)})
    with pytest.raises(UserError, match=r"^--out: .*metrics\.json is a file; name a folder"):
        overview.show([folder], folder / "metrics.json")


def with_budget(folder, tokens):
    """Results of a model with answers forced at one budget, the same fraction of another length each."""
    evaluated(folder, "amc23", {f"m{tokens}": (0.5, 10)}, budgets=[0.5])
    results = json.loads((folder / "metrics.json").read_text())
    results["models"][f"m{tokens}"]["budgets"] = [tokens]
    (folder / "metrics.json").write_text(json.dumps(results))
    return folder


def test_a_single_problem_and_other_problems_have_no_star(tmp_path):
    found = overview.collected([evaluated(tmp_path / "1", "x", {"a": (0.0, 10), "b": (1.0, 10)})])
    found["x"]["b"]["problem_accuracy"] = {"other": 1.0}
    assert "*" not in overview._cell(found["x"], "b", "a", "accuracy", "{:.3f}")
