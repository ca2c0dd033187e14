"""Write the benchmarks of conf/eval as tasks of EleutherAI's lm-evaluation-harness: an independent check of a model.

    python scripts/lm_eval_tasks.py TASKS [--data FOLDER]
    lm_eval --model vllm --model_args pretrained=MODEL,max_model_len=34000 --include_path TASKS \
        --tasks rltoken_math500 --apply_chat_template --log_samples --output_path RESULTS

Prompts, sampling and sources are those of rltoken. The harness samples each problem once, and compares the text of the
last box with the gold answer: a lower bound of what rltoken counts, which also takes what is mathematically equal.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from rltoken import config

ROOT = Path(__file__).resolve().parents[1]
PROBLEM = "{{(problem if problem is defined else question) | trim}}"
ANSWER = (
    "{{((answer if answer is defined else final_answer[0]) | string).split('####')[-1].strip().removesuffix('.0')}}"
)
BOX = r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
"""A box with braces in it, two deep."""


def names() -> list[str]:
    """Every benchmark."""
    found = [path.stem for path in (ROOT / "conf/eval").glob("*.yaml")]
    return sorted(name for name in found if name != "default" and not name.startswith("_"))


def task(cfg: DictConfig, local: Path | None) -> dict[str, Any]:
    """A benchmark in the keys of the harness.

    Args:
        cfg: the composed configuration of `rltoken.evaluate`.
        local: a file to read instead of the hub.
    """
    data, sampling = cfg.data.eval, cfg.eval
    source = (
        {"dataset_path": data.hub, "dataset_name": data.name, "test_split": data.split}
        if local is None
        else {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(local)}}, "test_split": "test"}
    )
    return {
        "task": f"rltoken_{sampling.benchmark}",
        **source,
        "output_type": "generate_until",
        "doc_to_text": data.template.replace("{problem}", PROBLEM),
        "doc_to_target": ANSWER,
        "num_fewshot": 0,
        "generation_kwargs": {
            "until": [],
            "do_sample": sampling.temperature > 0,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_gen_toks": sampling.max_new_tokens,
        },
        "filter_list": [
            {
                "name": "box",
                "filter": [
                    {"function": "regex", "regex_pattern": BOX, "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "regexes_to_ignore": [r"\$", r"\s"],  # gold answers of OlympiadBench stand between dollar signs
            }
        ],
        "metadata": {"version": 1.0},
    }


def main() -> None:
    """The entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path, help="the folder to write, for --include_path")
    parser.add_argument("--data", type=Path, help="a folder with NAME.jsonl, read instead of the hub where it is there")
    arguments = parser.parse_args()
    arguments.tasks.mkdir(parents=True, exist_ok=True)
    config.register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        for name in names():
            local = arguments.data and (arguments.data / f"{name}.jsonl").resolve()
            found = task(compose("evaluate", overrides=[f"eval={name}"]), local if local and local.exists() else None)
            text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120)
            (arguments.tasks / f"rltoken_{name}.yaml").write_text(text, encoding="utf-8")
    print(f"{len(names())} tasks: {arguments.tasks}")


if __name__ == "__main__":
    main()
