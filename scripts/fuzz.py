#!/usr/bin/env python
"""Train random configurations for two steps each: every one must train, or be refused in one line that says why.

    python scripts/fuzz.py                       # a hundred configurations
    python scripts/fuzz.py --count 500 --seed 1
    python scripts/fuzz.py --only 17             # one of them again

A configuration is an exp, further stages of any group, and settings of the trainer, the rollout, the model, the world
and the evaluation, all drawn by (seed, number). Most combinations of methods make no sense, so that more are refused
than are trained. Exit status 1 if one ends otherwise: with a traceback, a signal, or without its two steps.

torch and TRL are imported once, and every run is a fork of the process that did (scripts/forks.py).
"""

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from forks import run, training

from rltoken.report import read_metrics

ROOT = Path(__file__).resolve().parents[1]
STEPS = 2
SMALL = (
    "name=x", "model.source.steps=2", "data.train.n=32", "data.eval.n=4", f"trainer.max_steps={STEPS}",
    "trainer.save_steps=1", "trainer.per_device_train_batch_size=8", "trainer.num_generations=4",
    "trainer.max_completion_length=24", "rollout.max_thinking_tokens=16", "eval.samples=1",
)  # fmt: skip
NEEDED = {
    "exp=ada_grpo": ("data.traces.n=64", "sft.trainer.max_steps=1"),
    "exp=fast_math_r1": ("data.traces.n=64", "sft.trainer.max_steps=1"),
    "exp=kdrl": ("teacher.source.steps=2",),
    "control=length_schedule": ("method.controls.length_schedule.start=8",),
    "teacher=tiny": ("teacher.source.steps=2",),
    "sft=tiny": ("data.traces.n=64", "sft.trainer.max_steps=1"),
}
"""What a choice needs on this scale."""
STAGES = ("prompt", "control", "rows", "shape", "credit", "mark", "bounds", "weight", "ratio", "aux")
MOST_STAGES = 3
CHOICES = {
    "lora": ("default", "attention", "rslora", "dora"),
    "teacher": ("tiny", "base"),
    "sft": ("tiny",),
    "world": ("formats", "label_free", "tagged", "shortcut"),
    "trainer.loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "trainer.importance_sampling_level": ("token", "sequence"),
    "trainer.scale_rewards": ("group", "batch", "none"),
    "trainer.num_iterations": (1, 2),
    "trainer.steps_per_generation": (1, 2, 4),
    "trainer.gradient_accumulation_steps": (1, 2),
    "trainer.num_generations": (2, 8, 3),
    "trainer.beta": (0.0, 0.1),
    "trainer.top_entropy_quantile": (0.2,),
    "trainer.mask_truncated_completions": ("true",),
    "trainer.gradient_checkpointing": ("true",),
    "trainer.temperature": (0.7, 1.3),
    "trainer.top_k": (5,),
    "trainer.eval_strategy": ("steps", "epoch"),
    "trainer.save_strategy": ("no", "epoch"),
    "trainer.max_grad_norm": (0, 0.2),
    "trainer.report_to": ("tensorboard",),
    "rollout.pack_tokens": (40, "null", 100000),
    "rollout.packing": ("rows", "tree"),
    "rollout.normaliser": ("all",),
    "rollout.batch_rows": (3,),
    "eval.budgets": ("null", "[4,8]", "[0.5,1.0]"),
    "eval.temperature": (0,),
    "eval.format": ("short", "consensus"),
    "model.think_end": ("null",),
    "model.dtype": ("bfloat16",),
    "seed": (1, 7),
}
"""Other settings, each left out in seven of eight configurations."""
SHARE = 8


def exps() -> list[str]:
    """The names of all experiments but those at a paper's scale."""
    names = sorted(str(path.relative_to(ROOT / "conf/exp"))[:-5] for path in ROOT.glob("conf/exp/**/*.yaml"))
    return [name for name in names if not name.startswith("paper/")]


def drawn(seed: int, number: int) -> list[str]:
    """The configuration of that number, in the words of the command line."""
    draw = random.Random(f"{seed} {number}")
    chosen = [f"exp={draw.choice(exps())}"]
    for group in draw.sample(STAGES, draw.choice(range(MOST_STAGES + 1))):
        names = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        chosen.append(f"{group}={draw.choice(names)}")
    overrides = [f"+{item}" for item in chosen]
    for key, values in CHOICES.items():
        if draw.randrange(SHARE) == 0:
            item = f"{key}={draw.choice(values)}"
            chosen.append(item)
            overrides.append(f"+{item}" if key == "lora" else item)
    needed = itertools.chain.from_iterable(NEEDED.get(item.split("/")[0], ()) for item in chosen)
    return [*SMALL, *dict.fromkeys(needed), *overrides]


def outcome(folder: Path, status: int) -> tuple[str, str]:
    """('trained' | 'refused' | 'failed', what there is to say of it) of a run that ended with a status in a folder."""
    lines = (folder / "log.txt").read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if any(line.startswith("Traceback") for line in lines) or status not in (0, 2):
        return "failed", f"status {status}: {lines[-1] if lines else 'no output'}"
    if status == 2:
        return ("refused", errors[0]) if len(errors) == 1 else ("failed", f"{len(errors)} lines say why")
    metrics = read_metrics(folder / "runs/x/metrics.jsonl")
    steps = max((line["step"] for line in metrics), default=0)
    report = json.loads((folder / "runs/x/report.json").read_text())
    if report["steps"] != STEPS or (metrics and steps != STEPS):
        return "failed", f"ended at step {report['steps']}, logged {steps}"
    return "trained", ""


def main() -> None:
    """Draw, run, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="how many configurations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the configuration of this number alone")
    parser.add_argument("--out", type=Path, help="folder for the output of runs that fail (default: a temporary one)")
    options = parser.parse_args()
    out = (options.out or Path(tempfile.mkdtemp(prefix="fuzz-"))).absolute()
    torch.set_num_threads(1)  # here and in every fork, which would wait for threads that it does not have
    started, found = time.monotonic(), Counter()
    for number in range(options.count) if options.only is None else [options.only]:
        overrides, folder = drawn(options.seed, number), out / str(number)
        (status,) = run(training(overrides), folder, ranks=1)
        what, told = outcome(folder, status)
        found[what] += 1
        print(f"{number}: {what}: {' '.join(overrides[len(SMALL) :])}{told and f': {told}'}", flush=True)
        if what != "failed":
            shutil.rmtree(folder)
    minutes = (time.monotonic() - started) / 60
    print(f"{found['trained']} trained, {found['refused']} refused, {found['failed']} failed; {minutes:.1f} minutes")
    if found["failed"]:
        print(f"what failed is in {out}")
    sys.exit(bool(found["failed"]))


if __name__ == "__main__":
    main()
