"""The tasks for lm-evaluation-harness and lighteval give word for word the prompts of rltoken."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from datasets import load_dataset
from jinja2 import Environment, StrictUndefined

from rltoken.data import load
from tests.evals.test_benchmarks import NAMES, composed

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "gsm8k": ({"question": " What is {2} + 3?\n", "answer": "<<2+3=5>>\n#### 5"}, "5"),
    "olympiadbench": ({"question": "Find $\\{x\\}$.", "final_answer": ["\\frac{1}{2}"]}, "\\frac{1}{2}"),
    "amc23": ({"question": "How far?", "answer": 27.0}, "27"),
    "math500": ({"problem": "Say {{ x }} %} \\[p\\]", "answer": "p - q"}, "p - q"),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The tasks by name, of local files where there is a row."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (row, _) in ROWS.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    command = [sys.executable, ROOT / "scripts/lm_eval_tasks.py", folder / "out", "--data", folder]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""}, timeout=120)
    return {path.stem: yaml.safe_load(path.read_text()) for path in (folder / "out").glob("*.yaml")}


def test_every_benchmark_is_a_task(tasks):
    assert sorted(tasks) == [f"rltoken_{name}" for name in NAMES]
    aime = tasks["rltoken_aime24"]
    assert (aime["task"], aime["dataset_path"], aime["test_split"]) == (
        "rltoken_aime24",
        "HuggingFaceH4/aime_2024",
        "train",
    )
    sampling = {"until": [], "do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_gen_toks": 32768}
    assert aime["generation_kwargs"] == sampling


@pytest.mark.parametrize("name", ROWS)
def test_the_prompt_is_the_same(tasks, name):
    task = tasks[f"rltoken_{name}"]
    (row,) = load_dataset(task["dataset_path"], **task["dataset_kwargs"], split=task["test_split"])
    render = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string
    ours = load(path=task["dataset_kwargs"]["data_files"]["test"], template=composed(f"eval={name}").data.template)
    assert render(task["doc_to_text"]).render(**row) == ours[0]["prompt"][0]["content"]
    assert render(task["doc_to_target"]).render(**row) == ROWS[name][1]


def test_the_last_box_is_what_is_compared(tasks):
    pattern = tasks["rltoken_math500"]["filter_list"][0]["filter"][0]["regex_pattern"]
    text = "First \\boxed{1}, then \\boxed{\\left( 3, \\frac{\\pi}{\\sqrt{2}} \\right)}."
    assert re.findall(pattern, text) == ["1", "\\left( 3, \\frac{\\pi}{\\sqrt{2}} \\right)"]


@pytest.fixture
def lighteval_tasks(monkeypatch, tmp_path):
    """The tasks of scripts/lighteval_tasks.py by name, with records in the place of lighteval's classes."""
    made = {
        "lighteval.metrics.metrics": {
            "Metrics": SimpleNamespace(avg_at_n_math=lambda sample_params: sample_params["n"])
        },
        "lighteval.tasks.lighteval_task": {"LightevalTaskConfig": SimpleNamespace},
        "lighteval.tasks.requests": {"Doc": SimpleNamespace},
    }
    for name, content in made.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "math500").mkdir()
    (tmp_path / "math500/test.jsonl").write_text("{}")
    monkeypatch.setenv("RLTOKEN_TASK_DATA", str(tmp_path))
    spec = importlib.util.spec_from_file_location("lighteval_tasks", ROOT / "scripts/lighteval_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {task.name: task for task in module.TASKS_TABLE}


def test_lighteval_has_the_same_tasks(lighteval_tasks, tmp_path):
    assert sorted(lighteval_tasks) == [f"rltoken_{name}" for name in NAMES]
    aime, gsm8k = lighteval_tasks["rltoken_aime24"], lighteval_tasks["rltoken_gsm8k"]
    assert (aime.hf_repo, aime.evaluation_splits, aime.metrics) == ("HuggingFaceH4/aime_2024", ["train"], [64])
    assert (gsm8k.hf_repo, gsm8k.hf_subset, gsm8k.metrics) == ("openai/gsm8k", "main", [1])
    assert lighteval_tasks["rltoken_math500"].hf_repo == str(tmp_path / "math500")


@pytest.mark.parametrize("name", ROWS)
def test_the_prompt_for_lighteval_is_the_same(lighteval_tasks, tmp_path, name):
    row, gold = ROWS[name]
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    ours = load(path=str(tmp_path / "own.jsonl"), template=composed(f"eval={name}").data.template)
    doc = lighteval_tasks[f"rltoken_{name}"].prompt_function(row, "task")
    assert doc.query == ours[0]["prompt"][0]["content"]
    assert doc.choices == [f"\\boxed{{{gold}}}"]
