"""An evaluation that is killed goes on where it was, and ends with the files of one that never was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from rltoken import identity
from rltoken.errors import UserError
from rltoken.evals import shards

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (
    "model.source.steps=2", "data.eval.n=10", "eval.samples=4", "eval.batch_size=4", "eval.max_new_tokens=96",
    "eval.budgets=[8,48]",
)  # fmt: skip
RESULTS = ("metrics.json", "summary.csv", "tiny.parquet", "curves.png")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def start(tmp_path_factory, cache):
    """start(name): an evaluation of the tiny model, its output in the folder of that name."""
    cwd = tmp_path_factory.mktemp("killed")

    def begin(name, *more):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RLTOKEN_CACHE": str(cache)}
        command = [sys.executable, "-m", "rltoken.evaluate", *COMMAND, *more, f"out={name}"]
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return process, cwd / name

    return begin


def finished(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def whole(start):
    """The folder of an evaluation that was never stopped."""
    process, folder = start("whole")
    finished(process)
    return folder


def test_killed_in_the_middle_and_gone_on_with(start, whole):
    process, folder = start("killed")
    batches = folder / "tiny.shards"
    deadline = time.monotonic() + 200
    while len(list(batches.glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in batches.glob("*.parquet")}
    assert 3 <= len(kept) < 10 and not any((folder / name).exists() for name in RESULTS)
    process, _ = start("killed")
    while len(list(batches.glob("*.parquet"))) <= len(kept) and process.poll() is None:
        time.sleep(0.01)
    assert {name: (batches / name).stat().st_mtime_ns for name in kept} == kept, "none was sampled again"
    finished(process)
    assert not batches.exists() and sorted(path.name for path in folder.iterdir()) == sorted(RESULTS)
    for name in RESULTS:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    table = pd.read_parquet(folder / "tiny.parquet")
    assert len(table) == 40 and not table.duplicated(["id", "sample"]).any()


def test_results_say_how_they_came_about(whole):
    results = json.loads((whole / "metrics.json").read_text())
    settings = results["settings"]["tiny"]
    assert (settings["eval"]["temperature"], settings["eval"]["top_p"], settings["eval"]["samples"]) == (1.0, 1.0, 4)
    assert settings["eval"]["budgets"] == [8, 48] and settings["sampled_by"] == "hf" and results["versions"]["torch"]
    table = pd.read_parquet(whole / "tiny.parquet")
    assert results["tokens"]["tiny"]["sampled"] == table["sampled_tokens"].sum() > table["completion_tokens"].sum()
    assert set(table["answer_class"]) >= {-1} and "answer" in table.columns
    answered = table[table["answer_class"] >= 0]
    assert answered["answer"].notna().all() and table[table["answer_class"] < 0]["answer"].isna().all()
    (row,) = pd.read_csv(whole / "summary.csv").to_dict("records")
    assert row["model"] == "tiny" and row["accuracy"] == results["models"]["tiny"]["accuracy"]
    assert row["correct@48"] == results["models"]["tiny"]["budget_accuracy"][1] and row["top_p"] == 1.0


FACTS = {"settings": {"eval.seed": 1}, "model": "a", "eval_data": "b", "versions": {"torch": "2"}, "code": {}}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"settings": {"eval.seed": 2}}, "eval.seed was 1 and is 2"),
        ({"model": "z"}, "the model is another than then"),
        ({"eval_data": "z"}, "the evaluation data are others than then"),
        ({"versions": {"torch": "3"}}, "it was written by torch 2 and this is 3"),
        ({"code": {"own.py": "z"}}, "own.py is not as it was"),
    ],
)
def test_whatever_matters_is_in_the_key(tmp_path, changed, told):
    folder = tmp_path / "x.shards"
    shards.begin(folder, FACTS)
    shards.check(folder, FACTS | changed)  # nothing is finished yet
    shards.write(folder, 0, pd.DataFrame({"id": ["a"]}))
    shards.begin(folder, FACTS)
    shards.check(folder, FACTS)
    with pytest.raises(UserError, match=told):
        shards.check(folder, FACTS | changed)


def test_a_half_written_shard_is_none(tmp_path, monkeypatch):
    folder = tmp_path / "x.shards"
    shards.begin(folder, FACTS)

    def die(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        shards.write(folder, 3, pd.DataFrame({"id": ["a"]}))
    assert shards.read(folder, 3) is None and list(folder.glob("*.partial"))


def test_a_model_is_known_by_its_content(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.save(torch.ones(2), tmp_path / name / "pytorch_model.bin")
        (tmp_path / name / "config.json").write_text("{}")
    assert identity.digest_of_model(str(tmp_path / "one")) == identity.digest_of_model(str(tmp_path / "two"))
    (tmp_path / "two/README.md").write_text("Of no consequence.")
    assert identity.digest_of_model(str(tmp_path / "one")) == identity.digest_of_model(str(tmp_path / "two"))
    (tmp_path / "two/config.json").write_text('{"a": 1}')
    assert identity.digest_of_model(str(tmp_path / "one")) != identity.digest_of_model(str(tmp_path / "two"))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"], ids=["empty", "half", "a list", "no text"])
def test_damaged_results_are_told(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"out: .*metrics\.json is damaged"):
        shards.results(path)


def test_a_damaged_batch_is_told(tmp_path):
    shards.begin(tmp_path / "shards", {"model": "a"})
    shards.write(tmp_path / "shards", 0, pd.DataFrame({"id": ["a"]}))
    assert shards.read(tmp_path / "shards", 0)["id"].tolist() == ["a"]
    (tmp_path / "shards/000000.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"000000\.parquet is damaged .* remove it to do its part again"):
        shards.read(tmp_path / "shards", 0)
    (tmp_path / "shards/facts.json").write_text("{")
    with pytest.raises(UserError, match=r"facts\.json is damaged"):
        shards.check(tmp_path / "shards", {"model": "a"})
