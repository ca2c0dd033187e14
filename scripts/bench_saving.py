#!/usr/bin/env python
"""What a checkpoint costs against stock GRPOTrainer's, in one process, by turns: time, bytes, share of a run.

    python scripts/bench_saving.py                                # GRPO on the warm-started tiny world
    python scripts/bench_saving.py '+exp=brpo trainer.num_iterations=2' --steps 20 --turns 5

Stock GRPO and the method in the words of the command line train the same steps in turns and save after each. A save
is timed from the end of the step to the end of the save; from that and the medians of a step follows what a run that
saves every N steps costs over one that saves as stock does, with the method's own step in both. Ours hashes what it
writes and waits for the disk; stock does neither. Absolute times depend on the machine; the shares are what may be
quoted.
"""

import argparse
import itertools
import shlex
import statistics
import tempfile
import time
from pathlib import Path

from bench import make, prepared
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, set_seed
from trl import GRPOTrainer

from rltoken.trainer import TokenGRPOTrainer

TRAINERS = (GRPOTrainer, TokenGRPOTrainer)
EVERY = (1, 5, 20, 100)
"""Steps between two saves for which the share of a run is told."""
SETTINGS = ("trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.logging_steps=100000")


class Timed(TrainerCallback):
    """Seconds of each step and of each save."""

    def __init__(self):
        self.steps, self.saves, self._at = [], [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._at = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self._lap())

    def on_save(self, args, state, control, **kwargs):
        self.saves.append(self._lap())

    def _lap(self):
        before, self._at = self._at, time.perf_counter()
        return self._at - before


def timed(cls, cfg, folder):
    """Train and save after each step: the times, and the bytes of every file of the newest checkpoint."""
    times = Timed()
    trainer = make(cls, cfg, str(folder), times)
    set_seed(cfg.seed)
    trainer.train()
    newest = folder / f"checkpoint-{trainer.state.global_step}"
    return times, {path.name: path.stat().st_size for path in newest.iterdir()}


def report(stock, ours, sizes):
    """The medians with their quartiles, the bytes, and the shares of a run."""
    table = Table(title=f"{len(ours.saves)} saves each, in turns")
    for column in ("", "ms a save", "quartiles", "bytes"):
        table.add_column(column, justify="left" if not column else "right")
    for (name, times), files in zip((("stock GRPOTrainer", stock), ("rltoken", ours)), sizes, strict=True):
        low, median, high = (1e3 * value for value in statistics.quantiles(times.saves, n=4))
        table.add_row(name, f"{median:.1f}", f"{low:.1f} to {high:.1f}", f"{sum(files.values()):,}")
    console = Console(width=120)
    console.print(table)
    own = {name: size for name, size in sizes[1].items() if name.startswith("rltoken")}
    console.print("of these bytes: " + ", ".join(f"{name} {size:,}" for name, size in own.items()))
    step, more = statistics.median(ours.steps), statistics.median(ours.saves) - statistics.median(stock.saves)
    shares = [f"{n}: {more / (n * step + statistics.median(stock.saves)):+.2%}" for n in EVERY]
    console.print(f"a step: {step:.3f} s; a run that saves every N steps costs over stock's saves: {', '.join(shares)}")


def main() -> None:
    """Train in turns and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", default="+exp=grpo", help="Hydra overrides; by default plain GRPO")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps and saves of a turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each trainer")
    options = parser.parse_args()

    (cfg,) = prepared([*shlex.split(options.method), *SETTINGS, f"trainer.max_steps={options.steps}"])
    both, sizes = (Timed(), Timed()), [{}, {}]
    for turn, which in itertools.product(range(options.turns), range(2)):
        with tempfile.TemporaryDirectory() as scratch:
            times, sizes[which] = timed(TRAINERS[which], cfg, Path(scratch))
        if turn or options.turns == 1:  # the first turn warms up
            both[which].steps.extend(times.steps)
            both[which].saves.extend(times.saves)
    report(*both, sizes)


if __name__ == "__main__":
    main()
