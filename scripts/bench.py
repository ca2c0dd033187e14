#!/usr/bin/env python
"""What methods cost per step over stock GRPOTrainer: ratios, in one process, step by step in turns.

    python scripts/bench.py                                  # the identity pipeline on the warm-started tiny world
    python scripts/bench.py --arm '+weight=forks' --arm '+exp=brpo' --common 'trainer.num_iterations=2' --steps 40

Each arm is a method in the words of the command line, after those of --common. All trainers start from the same weights
and seeds and take turns step by step, each with a random state of its own, so the identity pipeline samples the very
tokens that stock GRPO samples, a second later; with trainer.learning_rate=0 every arm does that changes no logits.
Absolute seconds depend on the machine and its neighbours; the ratios are what may be quoted: that of the medians, and
the median of the paired ratios, each to stock in the same turn, with their quartiles. Where the two disagree, a
neighbour slowed one trainer more often than another, and the paired one suffers less from it.

With --clock cpu the seconds are those that the trainer's thread had of the CPU: on a machine with busy neighbours they
are steadier than those of the wall, and leave out what other processes and devices do.

A window that is used for several steps is sampled in its first one. So what is compared are means over the steps of a
window, and all arms must use theirs equally often.

With --metric NAME a column has the mean of what the steps have logged under that name: what a method costs may hang on
what it finds, as that of THR (thr/scored) does.
"""

import argparse
import logging
import shlex
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging
from trl import GRPOTrainer

from rltoken import adapters, parts
from rltoken.config import register_schemas, to_grpo_config
from rltoken.pipeline import build
from rltoken.trainer import TokenGRPOTrainer

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
PHASES = ("thinking", "summaries", "grading", "window", "forward, backward", "optimizer, rest")
"""Parts of a step; without a rows stage TRL samples and grades inside the window, so those parts stand there."""


class Turns:
    """Whose turn it is; whoever has finished is left out."""

    def __init__(self, count):
        self._condition, self._waiting = threading.Condition(), list(range(count))

    def wait(self, who):
        """Block until it is the turn of `who`."""
        with self._condition:
            self._condition.wait_for(lambda: self._waiting[0] == who)

    def give(self, who, *, finished=False):
        """Give the turn of `who` to the next one."""
        with self._condition:
            self._waiting = self._waiting[1:] + ([] if finished else [who])
            self._condition.notify_all()


class InTurns(TrainerCallback):
    """Give the turn away at the beginning of every step, keep the random state, and time what lies between."""

    def __init__(self, who, turns, warm_up, clock):
        self._who, self._turns, self._warm_up, self._started, self.clock = who, turns, warm_up, None, clock
        self.seconds, self.parts = [], Counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self._stop()
        random_state = torch.get_rng_state()
        self._turns.give(self._who)
        self._turns.wait(self._who)
        torch.set_rng_state(random_state)
        if state.global_step == self._warm_up:
            self.parts.clear()
        self._started = self.clock()

    def on_train_end(self, args, state, control, **kwargs):
        self._stop()

    def _stop(self):
        if self._started is not None:
            self.seconds.append(self.clock() - self._started)


class Timed(TokenGRPOTrainer):
    """Keeps the seconds that each part of a step took; a part within another one counts as its own only."""

    def __init__(self, *args, callbacks, **kwargs):
        self.parts, self._clock, self._inner = callbacks[0].parts, callbacks[0].clock, [0.0]
        super().__init__(*args, callbacks=callbacks, **kwargs)

    def _timed(self, part, call, *args, **kwargs):
        self._inner.append(0.0)
        started = self._clock()
        try:
            return call(*args, **kwargs)
        finally:
            taken = self._clock() - started
            self.parts[part] += taken - self._inner.pop()
            self._inner[-1] += taken

    def sample(self, *args, **kwargs):
        return self._timed("thinking", super().sample, *args, **kwargs)

    def extend(self, *args, **kwargs):
        return self._timed("summaries", super().extend, *args, **kwargs)

    def grade(self, *args, **kwargs):
        return self._timed("grading", super().grade, *args, **kwargs)

    def make_window(self, *args, **kwargs):
        return self._timed("window", super().make_window, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        return self._timed("forward, backward", super().training_step, *args, **kwargs)


def make(cls, cfg, output_dir, callback):
    """A trainer of the configuration: TRL's own, or one of ours with the configured pipeline."""
    folder = parts.source(cfg.model)
    tokenizer = parts.tokenizer(cfg.model, folder)
    funcs, weights, classes = parts.rewards(cfg.reward)
    args = to_grpo_config(cfg.trainer, output_dir=output_dir, seed=cfg.seed)
    args.reward_weights = weights or args.reward_weights
    pipeline = build(instantiate(cfg.method, _convert_="object"))
    options = {} if cls is GRPOTrainer else {
        "pipeline": pipeline,
        "teacher": parts.teacher(cfg, pipeline, tokenizer),
        "template": parts.template(cfg.model, tokenizer),
        "appended_id": parts.appended(cfg.model, tokenizer),
        "pack_tokens": cfg.rollout.pack_tokens,
        "batch_rows": cfg.rollout.batch_rows,
        "packing": cfg.rollout.packing,
        "normaliser": cfg.rollout.normaliser,
        "classes": classes,
    }  # fmt: skip
    trainer = cls(
        model=parts.model(cfg.model, folder, trainable=True),
        reward_funcs=list(funcs.values()),
        args=args,
        train_dataset=parts.problems(cfg.data, "train", tokenizer),
        processing_class=tokenizer,
        peft_config=adapters.lora(cfg.model.lora),
        callbacks=[callback],
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(who, trainer, turns, seed):
    """Train when it is the trainer's turn, from a random state that depends on the seed only."""
    turns.wait(who)
    set_seed(seed)
    try:
        trainer.train()
    finally:
        turns.give(who, finished=True)


def in_turns(cfgs, scratch, warm_up, clock):
    """Train stock GRPO with the first configuration and ours with every one: the trainers, and seconds per step."""
    turns = Turns(1 + len(cfgs))
    callbacks = [InTurns(who, turns, warm_up, clock) for who in range(1 + len(cfgs))]
    trainers = [
        make(GRPOTrainer if who == 0 else Timed, cfg, f"{scratch}/{who}", callbacks[who])
        for who, cfg in enumerate([cfgs[0], *cfgs])
    ]
    if len(schedules := {window_steps(trainer) for trainer in trainers}) > 1:
        sys.exit(f"bench: windows are used for {sorted(schedules)} steps; give all arms one schedule, as by --common")
    if len(by_window([0.0] * trainers[0].args.max_steps, *schedules, warm_up)) < 2:
        sys.exit("bench: fewer than two whole windows come after the warm-up; raise --steps")
    threads = [
        threading.Thread(target=train, args=(who, trainer, turns, cfgs[0].seed)) for who, trainer in enumerate(trainers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return trainers, [callback.seconds for callback in callbacks]


def window_steps(trainer):
    """Optimizer steps for which a window is used."""
    args = trainer.args
    return max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)


def by_window(seconds, steps, warm_up):
    """Mean seconds of a step in each whole window that begins after the warm-up, from the seconds of each step."""
    first = -(-warm_up // steps) * steps
    return [statistics.fmean(seconds[i : i + steps]) for i in range(first, len(seconds) - steps + 1, steps)]


def mean_logged(trainer, metric):
    """Mean over the steps that have logged the metric, as text; empty where none has."""
    found = [entry[metric] for entry in trainer.state.log_history if metric in entry]
    return f"{statistics.fmean(found):.3f}" if found else ""


def report(names, trainers, seconds, warm_up, metrics=()):
    """One row per trainer: its step, the ratios to stock, tokens, metrics, and where the time of a step went."""
    steps, total = window_steps(trainers[0]), len(seconds[0])
    means = [by_window(own, steps, warm_up) for own in seconds]
    table = Table(title=f"{len(means[0])} windows of {steps} steps, in turns; medians of windows, parts are means")
    for column in ("", "s a step", "ratio of medians", "paired ratio", "quartiles", "tokens", *metrics, *PHASES):
        table.add_column(column, justify="left" if not column else "right")
    stock = statistics.median(means[0])
    for name, trainer, own, each_step in zip(names, trainers, means, seconds, strict=True):
        median = statistics.median(own)
        low, paired, high = statistics.quantiles([a / b for a, b in zip(own, means[0], strict=True)], n=4)
        spent = getattr(trainer, "parts", None)
        shares = [""] * len(PHASES)
        if spent is not None:
            each = {part: seconds / (total - warm_up) for part, seconds in spent.items()}
            each[PHASES[-1]] = statistics.fmean(each_step[warm_up:]) - sum(each.values())
            shares = [f"{each[part]:.3f}" if part in each else "in the window" for part in PHASES]
        ratios = [f"{median / stock:.3f}", f"{paired:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(
            name,
            f"{median:.3f}",
            *(["", "", ""] if trainer is trainers[0] else ratios),
            str(int(trainer.state.num_input_tokens_seen)),
            *(mean_logged(trainer, metric) for metric in metrics),
            *shares,
        )
    Console(width=200).print(table)


def prepared(*jobs):
    """The configurations of jobs in the words of the command line; leaves one thread, and the terminal to a table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfgs = [compose("config", overrides=list(job)) for job in jobs]
    for cfg in cfgs:
        adapters.settle(cfg)
    return cfgs


def main() -> None:
    """Train all of them in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", action="append", help="a method as Hydra overrides; by default the empty pipeline")
    parser.add_argument("--common", default="", help="overrides of every arm, and of stock GRPO")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each trainer")
    parser.add_argument("--warm-up", type=int, default=5, help="steps that are not counted in the medians")
    parser.add_argument("--metric", action="append", default=[], help="a logged metric to show, as thr/scored")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="whose seconds")
    options = parser.parse_args()

    quiet = ["trainer.save_strategy=no", "trainer.log_completions=false", f"trainer.max_steps={options.steps}"]
    arms = options.arm or ["+exp=grpo"]
    cfgs = prepared(*([*quiet, *shlex.split(options.common), *shlex.split(arm)] for arm in arms))
    with tempfile.TemporaryDirectory() as scratch:
        trainers, seconds = in_turns(cfgs, scratch, options.warm_up, CLOCKS[options.clock])
    report(["stock GRPOTrainer", *arms], trainers, seconds, options.warm_up, options.metric)


if __name__ == "__main__":
    main()
