#!/usr/bin/env python
"""What a pipeline costs per step over stock GRPOTrainer, as a ratio of medians over alternating runs in one process.

    python scripts/bench.py                                    # the identity pipeline on the warm-started tiny world
    python scripts/bench.py +weight=forks --rounds 10          # any method, in the words of the command line

Both trainers start each round from the same weights and seeds, so the identity pipeline samples the same tokens as
stock GRPO. Absolute seconds depend on the machine and its neighbours; the ratio is what may be quoted, with its
interval: the quartiles of the ratios of the single rounds.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging
from trl import GRPOTrainer

from rltoken.config import register_schemas, to_grpo_config
from rltoken.pipeline import build
from rltoken.trainer import TokenGRPOTrainer


class StepTimes(TrainerCallback):
    """Wall-clock seconds of each optimizer step, the rollout included."""

    def __init__(self):
        self.seconds = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self.start)
        self.start = now


def train(cfg, folder, *, stock: bool) -> tuple[list[float], int]:
    """Train once; the seconds of each step but the first, and the tokens that were sampled and read."""
    set_seed(cfg.seed)
    times = StepTimes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = (
        {} if stock else {"pipeline": build(instantiate(cfg.method)), "think_end_id": think_end_id(cfg, tokenizer)}
    )
    cls = GRPOTrainer if stock else TokenGRPOTrainer
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = cls(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=list(instantiate(cfg.reward.funcs).values()),
            args=to_grpo_config(cfg.trainer, output_dir=output_dir, seed=cfg.seed),
            train_dataset=instantiate(cfg.data.train),
            processing_class=tokenizer,
            callbacks=[times],
            **options,
        )
        trainer.train()
    return times.seconds[1:], trainer.state.num_input_tokens_seen


def think_end_id(cfg, tokenizer) -> int | None:
    """The id of the model's end-of-thinking token."""
    return tokenizer.convert_tokens_to_ids(cfg.model.think_end) if cfg.model.think_end else None


def main() -> None:
    """Alternate the two trainers and print medians, ratio and tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. +weight=forks trainer.num_iterations=2")
    parser.add_argument("--rounds", type=int, default=8, help="alternating pairs of runs")
    parser.add_argument("--steps", type=int, default=9, help="optimizer steps of a run; the first is not counted")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()

    register_schemas()
    quiet = [f"trainer.max_steps={options.steps}", "trainer.save_strategy=no", "trainer.log_completions=false"]
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfg = compose("config", overrides=["trainer.logging_steps=1000", *quiet, *options.overrides])
    folder = instantiate(cfg.model.source)
    seconds, tokens, ratios = {"stock": [], "ours": []}, {}, []
    for index in range(options.rounds + 1):
        order = ("stock", "ours") if index % 2 else ("ours", "stock")
        round_medians = {}
        for name in order:
            found, tokens[name] = train(cfg, folder, stock=name == "stock")
            round_medians[name] = statistics.median(found)
            if index:  # the first pair warms caches
                seconds[name] += found
        if index:
            ratios.append(round_medians["ours"] / round_medians["stock"])
            print(f"round {index}/{options.rounds}: ratio {ratios[-1]:.4f}", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"stock GRPOTrainer  {medians['stock']:.4f} s a step, {tokens['stock']} tokens a run")
    print(f"TokenGRPOTrainer   {medians['ours']:.4f} s a step, {tokens['ours']} tokens a run")
    print(
        f"ratio of medians   {medians['ours'] / medians['stock']:.4f} (quartiles over rounds {low:.4f} to {high:.4f})"
    )


if __name__ == "__main__":
    main()
