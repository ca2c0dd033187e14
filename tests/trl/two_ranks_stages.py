"""What every shape and credit stage makes of replayed rollouts, on one rank or more: started by test_two_ranks.py."""

import gc
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_ranks import APPENDED, ReplayedWithEnds, arguments, reward

from rltoken.cli import leave_process_group
from rltoken.config import register_schemas
from rltoken.pipeline import build
from rltoken.types import Template
from tests.trl.teachers import a_teacher

CONF = Path(__file__).resolve().parents[2] / "conf"
SETTINGS = {
    "shape/ada_grpo": ["model.formats.direct=A", "model.formats.short=B", "model.structures=null"],
    "shape/tldr_style": ["+prompt=tldr_style"],
    "shape/l1_exact": ["+prompt=l1", "method.prompts.l1.least=2", "method.prompts.l1.most=8"],
    "shape/l1_max": ["+prompt=l1", "method.prompts.l1.least=2", "method.prompts.l1.most=8"],
    "shape/laser": ["method.shapes.laser.target=4"],
    "shape/laser_d": [f"method.shapes.laser_d.{setting}" for setting in ("lowest=2", "highest=8", "interval=1")],
    "shape/laser_de": [f"method.shapes.laser_de.{setting}" for setting in ("lowest=2", "highest=8", "interval=1")],
    "shape/fast_math_r1": ["method.shapes.fast_math_r1.longest=8"],
    "shape/optima": ["method.shapes.optima.fewest=2", "method.shapes.optima.most=6"],
    "shape/think_prune": ["method.shapes.think_prune.limit=4"],
    "shape/hbpo": ["+prompt=hbpo"],
    "credit/hbpo": ["+prompt=hbpo", "+shape=hbpo"],
    "shape/ttrl_extra": ["+rows=extra_votes", "method.rows.extra_votes.votes=5"],
    "credit/self_reward": [
        "+mark=class_balance",
        "+aux=self_reward",
        "method.aux.self_reward.scale=5.0",
        "method.credits.self_reward.after=0",
    ],
    "credit/brpo": None,  # has rows of its own: test_two_ranks_equal_one
    "credit/group_centred": None,
    "credit/mrt": None,  # so have these three
    "credit/mrt_episodes": None,
    "shape/mrt_progress": None,
}
"""Settings at the size of these rollouts, and what a stage needs beside it. None: it acts on added rows only."""


def classes(texts, group):
    """Three answers, told apart by the number of words, or none."""
    return [len(text.split()) % 4 - 1 for text in texts]


def stages():
    """Every shape and credit stage that acts on thinking rows, as 'group/name'."""
    names = [f"{group}/{path.stem}" for group in ("shape", "credit") for path in sorted((CONF / group).glob("*.yaml"))]
    return [name for name in names if SETTINGS.get(name, []) is not None]


def method(name):
    """The method of one stage, and the list that gets the rewards and advantages of each window of all ranks."""
    group, _, stage = name.partition("/")
    cfg = compose("config", overrides=["+exp=grpo", f"+{group}={stage}", *SETTINGS.get(name, [])])
    seen = []

    def look(advantages, rewards, mask):
        seen.append((rewards.clone(), (advantages * mask).clone()))
        return advantages

    made = instantiate(cfg.method, _convert_="object")
    return build({**made, "credits": {**made["credits"], "look": look}}), seen


def main(model, data, out, rows):
    """Two windows of 4 prompts x 4 generations for each stage, on however many ranks there are."""
    register_schemas()
    gc.freeze()  # each training asks for full collections
    found, dataset = {}, load_from_disk(data)
    dataset = dataset.add_column("original_tokens", [4 + i % 5 for i in range(len(dataset))])
    for name in stages():
        with initialize_config_module("rltoken.conf", version_base="1.3"):
            pipeline, seen = method(name)
        trainer = ReplayedWithEnds(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=reward,
            args=arguments(out, rows, learning_rate=0.0),
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(model),
            pipeline=pipeline,
            template=Template(think_end_id=7, cut=(7,)),
            classes=classes,
            appended_id=APPENDED,
            teacher=a_teacher(model) if pipeline.needs("teacher_logps") else None,
        )
        trainer.train()
        found[name] = seen
    if trainer.accelerator.is_main_process:
        torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_process_group()
