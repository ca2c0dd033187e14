#!/usr/bin/env python
"""What a pipeline costs per step over stock GRPOTrainer: a ratio of medians, in one process, step by step in turns.

    python scripts/bench.py                                  # the identity pipeline on the warm-started tiny world
    python scripts/bench.py +weight=forks --steps 60         # any method, in the words of the command line

Both trainers start from the same weights and seeds and take turns step by step, each with a random state of its own,
so the identity pipeline samples the very tokens that stock GRPO samples, a second later. Absolute seconds depend on the
machine and its neighbours; the ratio is what may be quoted, with the quartiles of the ratios of neighbouring steps.
"""

import argparse
import logging
import statistics
import tempfile
import threading
import time
import warnings

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging
from trl import GRPOTrainer

from rltoken.config import register_schemas, to_grpo_config
from rltoken.pipeline import build
from rltoken.trainer import TokenGRPOTrainer


class Turns:
    """Whose turn it is, out of two; whoever has finished leaves all turns to the other."""

    def __init__(self, names):
        self._condition, self._names, self._finished = threading.Condition(), names, set()
        self._now = names[0]

    def wait(self, name):
        """Block until it is the turn of `name`."""
        with self._condition:
            self._condition.wait_for(lambda: self._now == name)

    def give(self, name, *, finished=False):
        """Give the turn of `name` to the other, if that has not finished."""
        with self._condition:
            self._finished |= {name} if finished else set()
            other = self._names[1 - self._names.index(name)]
            self._now = name if other in self._finished else other
            self._condition.notify_all()


class InTurns(TrainerCallback):
    """Give the turn away at the beginning of every step, keep the random state, and time what lies between."""

    def __init__(self, name, turns):
        self._who, self._turns, self._started = name, turns, None
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        if self._started is not None:
            self.seconds.append(time.perf_counter() - self._started)
        random_state = torch.get_rng_state()
        self._turns.give(self._who)
        self._turns.wait(self._who)
        torch.set_rng_state(random_state)
        self._started = time.perf_counter()


def make(cfg, folder, output_dir, callback, *, stock):
    """A trainer of the configuration: TRL's own, or ours with the configured pipeline."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    think_end = tokenizer.convert_tokens_to_ids(cfg.model.think_end) if cfg.model.think_end else None
    options = {} if stock else {"pipeline": build(instantiate(cfg.method)), "think_end_id": think_end}
    trainer = (GRPOTrainer if stock else TokenGRPOTrainer)(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=list(instantiate(cfg.reward.funcs).values()),
        args=to_grpo_config(cfg.trainer, output_dir=output_dir, seed=cfg.seed),
        train_dataset=instantiate(cfg.data.train),
        processing_class=tokenizer,
        callbacks=[callback],
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(name, trainer, turns, seed):
    """Train when it is the trainer's turn, from a random state that depends on the seed only."""
    turns.wait(name)
    set_seed(seed)
    try:
        trainer.train()
    finally:
        turns.give(name, finished=True)


def main() -> None:
    """Train both in turns and print medians, their ratio and the tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. +weight=forks trainer.num_iterations=2")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each trainer")
    parser.add_argument("--warm-up", type=int, default=5, help="steps that are not counted")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()

    register_schemas()
    quiet = ["trainer.save_strategy=no", "trainer.log_completions=false", f"trainer.max_steps={options.steps}"]
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfg = compose("config", overrides=[*quiet, *options.overrides])
    folder = instantiate(cfg.model.source)
    turns = Turns(["stock", "ours"])
    callbacks = {name: InTurns(name, turns) for name in ("stock", "ours")}
    with tempfile.TemporaryDirectory() as scratch:
        trainers = {
            name: make(cfg, folder, f"{scratch}/{name}", callback, stock=name == "stock")
            for name, callback in callbacks.items()
        }
        threads = [
            threading.Thread(target=train, args=(name, trainer, turns, cfg.seed)) for name, trainer in trainers.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    seconds = {name: callback.seconds[options.warm_up :] for name, callback in callbacks.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [ours / stock for ours, stock in zip(seconds["ours"], seconds["stock"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    for name, trainer in trainers.items():
        print(
            f"{type(trainer).__name__:17} {medians[name]:.4f} s a step (median of {len(ratios)}), "
            f"{trainer.state.num_input_tokens_seen} tokens"
        )
    print(f"ratio of medians  {medians['ours'] / medians['stock']:.4f}; of neighbouring steps: median ", end="")
    print(f"{statistics.median(ratios):.4f}, quartiles {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    main()
