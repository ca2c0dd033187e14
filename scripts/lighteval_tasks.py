"""The benchmarks of conf/eval as tasks of Hugging Face's lighteval 0.13: an independent check of a model.

    lighteval accelerate "model_name=MODEL,generation_parameters={temperature:0.6,top_p:0.95,max_new_tokens:32768}" \
        rltoken_aime24 --custom-tasks scripts/lighteval_tasks.py --save-details --output-dir RESULTS

Prompts, sources and numbers of samples are those of rltoken, which need not be installed there; temperature, top-p and
length are lighteval's to be told, as above. It grades by its own reading of answers, and reports avg@n. Problems are
read from $RLTOKEN_TASK_DATA, a folder with NAME/test.jsonl, where they are there, and else from the hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

CONF = Path(__file__).resolve().parents[1] / "conf/eval"
COLUMNS = {"problem": ("problem", "question"), "answer": ("answer", "final_answer")}


def read(name: str) -> dict[str, Any]:
    """A file of conf/eval."""
    return yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))


def names() -> list[str]:
    """Every benchmark."""
    found = [path.stem for path in CONF.glob("*.yaml")]
    return sorted(name for name in found if name != "default" and not name.startswith("_"))


def gold(value: Any) -> str:
    """An answer in a box, where lighteval reads mathematics; of several the first."""
    first = value[0] if isinstance(value, list) else value
    text = str(first).split("####")[-1].strip().removesuffix(".0").strip("$")
    return f"\\boxed{{{text}}}"


def prompt(template: str) -> Callable[[Mapping[str, Any], str], Doc]:
    """What makes the prompt of a row."""

    def made(row: Mapping[str, Any], task_name: str | None = None) -> Doc:
        problem, answer = (next(row[name] for name in known if name in row) for known in COLUMNS.values())
        query = template.replace("{problem}", problem.strip())
        return Doc(task_name=task_name, query=query, choices=[gold(answer)], gold_index=0)

    return made


def task(name: str, local: Path | None) -> LightevalTaskConfig:
    """A benchmark in lighteval's terms.

    Args:
        name: of the benchmark.
        local: a folder with test.jsonl, or None for the hub.
    """
    template, own = read("_benchmark")["data"]["template"], read(name)
    data, split = own["data"], "test" if local else own["data"]["eval_split"]
    return LightevalTaskConfig(
        name=f"rltoken_{name}",
        prompt_function=prompt(template),
        hf_repo=str(local or data["eval_hub"]),
        hf_subset="default" if local else data.get("eval_subset", "default"),
        hf_avail_splits=[split],
        evaluation_splits=[split],
        few_shots_split=None,
        few_shots_select=None,
        generation_size=None,
        stop_sequence=[],
        metrics=[Metrics.avg_at_n_math(sample_params={"n": own["eval"]["samples"]})],
    )


def local_of(name: str) -> Path | None:
    """The folder of a benchmark's file, where there is one."""
    folder = Path(os.environ.get("RLTOKEN_TASK_DATA", "")) / name
    return folder.resolve() if (folder / "test.jsonl").is_file() else None


TASKS_TABLE = [task(name, local_of(name)) for name in names()]
