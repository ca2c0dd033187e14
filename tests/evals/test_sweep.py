"""Benchmarks from the command line: several in one sweep, and a run that brings its model but not its data."""

import json

import pandas as pd
import pytest
from omegaconf import OmegaConf

from tests.cli.conftest import cache, cli  # noqa: F401  (fixtures)

SHORT = ("eval.samples=2", "eval.max_new_tokens=8", "eval.limit=2")


@pytest.fixture
def files(tmp_path):
    """Thirty easy problems under the name of each AIME."""
    for name in ("aime24", "aime25"):
        rows = [{"problem": f"{name}: {number} + 1?", "answer": str(number + 1)} for number in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.eval_path={tmp_path}/${{eval.benchmark}}.jsonl"


def test_several_benchmarks_are_a_sweep(cli, files):  # noqa: F811
    command = ("eval=aime24,aime25", "data=jsonl", files, *SHORT, "model.source.steps=2", "--multirun")
    found = cli.evaluate(*command)
    assert found.status == 0, found.err
    for name in ("aime24", "aime25"):
        folder = found.cwd / "evaluations" / name / "tiny"
        results = json.loads((folder / "metrics.json").read_text())
        settings = results["settings"]["tiny"]
        assert (settings["eval"]["benchmark"], settings["eval"]["temperature"]) == (name, 0.6)
        assert "Please reason step by step" in settings["data.eval"]["template"]
        assert results["models"]["tiny"]["problems"] == 2 and results["models"]["tiny"]["samples"] == 4
        assert pd.read_csv(folder / "summary.csv")["benchmark"].tolist() == [name]
        assert f"{name}: 2 samples a problem, temperature 0.6, top-p 0.95, at most 8 tokens" in found.out
    table = pd.read_csv(found.cwd / "evaluations/summary.csv")
    assert table[["benchmark", "model"]].values.tolist() == [["aime24", "tiny"], ["aime25", "tiny"]]
    assert "2 benchmarks" in found.out and "all of them: evaluations/summary.csv" in found.out
    again = cli.evaluate(*command)
    assert again.status == 0 and again.out.count("finished already") == 2


def test_a_run_brings_its_model_and_the_benchmark_all_else(cli, files):  # noqa: F811
    """How thinking ends is the model's, and counts for the reward that the benchmark brings."""
    run = cli("+exp=grpo", "name=run", "eval.before=false", "eval.after=false", "trainer.max_steps=1")
    assert run.status == 0, run.err
    path = run.runs / "run/config.yaml"
    cfg = OmegaConf.load(path)
    cfg.model.think_end = None
    OmegaConf.save(cfg, path)
    found = cli.evaluate(f"runs=[{run.runs}/run]", "eval=aime24", files, *SHORT)
    assert found.status == 0, found.err
    settings = json.loads((found.cwd / "evaluations/aime24/run/metrics.json").read_text())["settings"]["run"]
    assert settings["reward"]["funcs"]["accuracy"]["_target_"] == "rltoken.rewards.math.accuracy"
    assert settings["reward"]["funcs"]["accuracy"]["think_end"] is None
    assert (settings["eval"]["samples"], settings["eval"]["top_p"]) == (2, 0.95)


def test_training_on_a_benchmark_is_refused(cli):  # noqa: F811
    found = cli("eval=aime24")
    assert found.status == 2 and "error: eval: aime24 is a benchmark for rltoken.evaluate" in found.err


def test_a_set_of_another_size_is_refused(cli, files, tmp_path):  # noqa: F811
    (tmp_path / "aime24.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    found = cli.evaluate("eval=aime24", files, "model.source.steps=2")
    assert found.status == 2 and "eval.count: aime24 has 30 problems, and 1 were found" in found.err
    assert not (found.cwd / "evaluations").exists()
