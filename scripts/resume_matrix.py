#!/usr/bin/env python
"""Kill training runs, go on with resume=auto, and compare bit for bit with runs in one piece; exit status 1 if unequal.

    python scripts/resume_matrix.py                      # the whole matrix, with stock TRL beside it
    python scripts/resume_matrix.py --cells 'brpo.*lora' # cells whose name holds the pattern
    python scripts/resume_matrix.py --limit 4            # a few cells, every method among them
    python scripts/resume_matrix.py --kills 100          # kills at random moments instead of chosen ones
    python scripts/resume_matrix.py --kills 10 --method brpo --ranks 4 trainer.max_steps=50

A cell is a short run on the CPU that saves at every step. One goes through; its twin gets SIGKILL at one point and is
started again with resume=auto; then everything that they left is compared (scripts/compare_runs.py says what). The
matrix crosses methods, generation schedules and numbers of processes; adapters, evaluation and logging are spread over
it so that every pair of settings occurs, and the kind of kill is drawn.

Beside it, stock GRPOTrainer goes on from its own checkpoint of the same step. It runs once per schedule and step, as
plain GRPO on all weights in one process without evaluation, whatever the cell has, and no save of it is torn.

With --kills, longer runs that save at every second step are killed after random times, in start-up, evaluation and
saving too. After each kill the newest whole checkpoint must not be older than before, and no more than two logged
steps may be lost; a run that comes to its end must equal one in one piece, and the next one has another seed.

torch and TRL are imported once, and every run is a fork of the process that did (scripts/forks.py). That this makes no
difference is checked with the first cell.
"""

import argparse
import functools
import itertools
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bench import make
from compare_runs import differences
from forks import Failed, in_processes, run, told, train_through, training
from hydra import compose, initialize_config_module
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import GRPOTrainer

from rltoken import config
from rltoken.report import read_metrics
from rltoken.resume import SCRATCH, read_manifest, verify

ROOT = Path(__file__).resolve().parents[1]
STEPS, ACCUMULATION = 6, 2
BATCHES = STEPS * ACCUMULATION
EPOCH = 8
"""Micro-batches of a pass over the data: a multiple of every window and of the accumulation."""
METHODS = ("grpo", "brpo", "hapo_history", "dynamic_sampling")
PER_GENERATION = {4: "above", 2: "equal to", 1: "below"}
"""steps_per_generation -> where that is of the accumulation."""
KILLS = ("inside a window", "window edge", "epoch edge", "last step", "while saving", "random moment", "after training")
TRAINING_STEP = "rltoken.trainer.TokenGRPOTrainer.training_step"
SAVING = ("rltoken.resume.prepare", "rltoken.resume.write_manifest", "rltoken.resume.publish")
"""Called before anything is written, between the last file and the manifest, and before the rename."""
SETTINGS = (
    "name=x",
    "resume=auto",
    "eval.before=false",
    "eval.after=false",
    "data.eval.n=4",
    f"trainer.max_steps={STEPS}",
    f"trainer.gradient_accumulation_steps={ACCUMULATION}",
    "trainer.save_steps=1",
    "trainer.per_device_train_batch_size=8",
    "trainer.num_generations=4",
    "trainer.max_completion_length=32",
    "rollout.max_thinking_tokens=24",
    "trainer.learning_rate=1e-3",
    "trainer.warmup_steps=2",
    "trainer.eval_steps=2",
)
LONG = ("trainer.max_steps=24", "trainer.save_steps=2")
"""With --kills."""
SAVED_EVERY = 2


@dataclass(frozen=True)
class Cell:
    """The settings of a run and the point at which its twin is killed."""

    method: str
    per_generation: int
    iterations: int
    ranks: int
    lora: bool
    evaluation: bool
    logging: int
    kill: str
    extra: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What `--cells` is matched with, and the name of the cell's folder."""
        parts = [self.method, f"g{self.per_generation}", f"i{self.iterations}", f"p{self.ranks}"]
        parts += ["lora" if self.lora else "full", *(["eval"] if self.evaluation else []), f"log{self.logging}"]
        return "-".join([*parts, self.kill.replace(" ", "_")])

    @property
    def window(self) -> int:
        """Micro-batches that are trained on one generation."""
        return self.per_generation * self.iterations

    def overrides(self) -> list[str]:
        """The cell in the words of the command line."""
        prompts = 2 * self.per_generation * self.ranks * EPOCH // self.window
        return [
            f"+exp={self.method}",
            *(["+lora=default"] if self.lora else []),
            *SETTINGS,
            f"data.train.n={prompts + 1}",  # one is left over in each epoch, another one every time
            f"trainer.steps_per_generation={self.per_generation}",
            f"trainer.num_iterations={self.iterations}",
            f"trainer.eval_strategy={'steps' if self.evaluation else 'no'}",
            f"trainer.logging_steps={self.logging}",
            *self.extra,
        ]


def cells(seed: int, extra: tuple[str, ...] = ()) -> list[Cell]:
    """The matrix: methods x schedules x processes, the rest spread over it; any first four hold every method."""
    crossed = list(itertools.product(METHODS, (1, 2), (1, 2), PER_GENERATION))
    kills = list(itertools.islice(itertools.cycle(KILLS), len(crossed)))
    random.Random(seed).shuffle(kills)
    found = []
    for (method, iterations, ranks, per_generation), kill in zip(crossed, kills, strict=True):
        number, place = METHODS.index(method), list(PER_GENERATION).index(per_generation)
        lora, evaluation = (number + iterations + ranks) % 2 == 0, (iterations + place) % 2 == 0
        logging = 3 if (ranks + place) % 2 else 1
        found.append(Cell(method, per_generation, iterations, ranks, lora, evaluation, logging, kill, extra))
    stride = len(found) // len(METHODS) + 1  # has no divisor in common with the length
    return [found[i * stride % len(found)] for i in range(len(found))]


# A cell


def fatal_call(cell: Cell, draw: random.Random) -> tuple[str, int, int] | None:
    """(function, number of the call, rank) at which the cell is killed; None at a random moment."""
    rank, after_first_save = draw.randrange(cell.ranks), range(ACCUMULATION, BATCHES)
    if cell.kill == "random moment":
        return None
    if cell.kill == "while saving":
        return draw.choice(SAVING), draw.randint(2, STEPS), 0
    if cell.kill == "after training":
        return "rltoken.train.finish", 1, 0
    if cell.kill == "inside a window":  # one checkpoint inside it, where a window is longer than a step
        saved_inside = [k for k in after_first_save if k // ACCUMULATION * ACCUMULATION % cell.window]
        chosen = draw.choice(saved_inside or [k for k in after_first_save if k % ACCUMULATION])
    elif cell.kill == "window edge":
        chosen = draw.choice([k for k in after_first_save if k % cell.window == 0 == k % ACCUMULATION])
    else:
        chosen = EPOCH if cell.kill == "epoch edge" else BATCHES - 1
    return TRAINING_STEP, chosen + 1, rank


def killed(cell: Cell, folder: Path, draw: random.Random, seconds: float) -> int:
    """Start the cell's run and kill it; the step of the checkpoint that there is to go on from.

    Raises:
        Failed: it ended before.
    """
    fatal = fatal_call(cell, draw)
    moment = math.inf if fatal else draw.uniform(0.1, 0.9) * seconds
    statuses = run(training(cell.overrides(), fatal), folder, cell.ranks, moment)
    if fatal is None and not any(statuses):  # the machine was busier when the run in one piece was timed
        shutil.rmtree(folder)
        return killed(cell, folder, draw, seconds / 2)
    if -signal.SIGKILL not in statuses:
        raise Failed(f"ended with {statuses} before it was killed: {told(folder)}")
    return newest_step(folder / "runs/x")


def newest_step(run_folder: Path) -> int:
    """The step of the newest whole checkpoint, also one that lacks its rename only; 0 without any."""
    found = [*run_folder.glob("checkpoint-*"), *run_folder.glob(f"{SCRATCH}/checkpoint-*")]
    return max((read_manifest(path)["step"] for path in found if verify(path) is None), default=0)


def learned(run_folder: Path) -> bool:
    """Whether any weight was moved: equal runs that learn nothing would prove nothing."""
    return any(line.get("grad_norm") for line in read_metrics(run_folder / "metrics.jsonl"))


def try_cell(cell: Cell, folder: Path, seed: int) -> dict:
    """Run a cell: `step` it went on from, and `differs`, empty where everything is equal."""
    whole, resumed, draw = folder / "whole", folder / "resumed", random.Random(f"{seed} {cell.name}")
    try:
        seconds = train_through(cell.overrides(), whole, cell.ranks)
        step = killed(cell, resumed, draw, seconds)
        train_through(cell.overrides(), resumed, cell.ranks)
    except Failed as failure:
        return {"step": None, "differs": [str(failure)]}
    differs = differences(whole / "runs/x", resumed / "runs/x")
    if not differs and not learned(whole / "runs/x"):
        differs = ["equal, but nothing was learned"]
    if not differs:
        shutil.rmtree(folder)
    return {"step": step, "differs": differs}


def check_forks(cell: Cell, folder: Path) -> None:
    """Compare a run in a fork of this process with one by the command line.

    Raises:
        Failed: they differ.
    """
    ((_, differs),) = in_processes({"fork": functools.partial(try_fork, cell, folder)}, folder, jobs=1)
    if differs:
        raise Failed(f"a fork trains otherwise than `python -m rltoken.train`: {'; '.join(differs)}")


def try_fork(cell: Cell, folder: Path) -> list[str]:
    """What differs between a run in a fork of this process and one by the command line."""
    train_through(cell.overrides(), folder / "forked", cell.ranks)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(cell.ranks)]
    (folder / "fresh").mkdir()
    subprocess.run(
        [sys.executable, *(launcher if cell.ranks > 1 else []), "-m", "rltoken.train", *cell.overrides()],
        cwd=folder / "fresh",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    return differences(folder / "forked/runs/x", folder / "fresh/runs/x")


# Stock TRL


def stock_training(arguments: list[str], checkpoint: Path | None) -> Callable[[], None]:
    """What a process is to do: train stock GRPOTrainer, and save its weights in the folder `final`."""

    def work() -> None:
        config.register_schemas()
        with initialize_config_module("rltoken.conf", version_base="1.3"):
            cfg = compose("config", overrides=arguments)
        trainer = make(GRPOTrainer, cfg, "run", TrainerCallback())
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        trainer.save_model("final")

    return work


def try_stock(schedule: tuple[int, int], folder: Path, extra: tuple[str, ...]) -> dict[str, float]:
    """Step -> largest difference of a weight between stock runs in one piece and resumed at that step.

    Raises:
        Failed: one of them did not end well.
    """
    cell = Cell("grpo", *schedule, ranks=1, lora=False, evaluation=False, logging=1, kill="", extra=extra)
    arguments = [*cell.overrides(), "trainer.save_total_limit=null"]

    def weights(name: str, checkpoint: Path | None) -> dict[str, torch.Tensor]:
        if any(statuses := run(stock_training(arguments, checkpoint), folder / name, 1)):
            raise Failed(f"stock GRPOTrainer ended with {statuses}: {told(folder / name)}")
        return load_file(folder / name / "final/model.safetensors")

    whole, found = weights("whole", None), {}
    for step in range(1, STEPS + 1):
        resumed = weights(f"from-{step}", folder / f"whole/run/checkpoint-{step}")
        found[str(step)] = max((value - resumed[name]).abs().max().item() for name, value in whole.items())
    return found


def stock_beside(chosen: list[Cell], folder: Path, jobs: int) -> dict[tuple[int, int], dict[str, float]]:
    """(steps_per_generation, num_iterations) -> what `try_stock` gives."""
    works = {
        schedule: functools.partial(try_stock, schedule, folder / "-".join(map(str, schedule)), chosen[0].extra)
        for schedule in sorted({(cell.per_generation, cell.iterations) for cell in chosen}, reverse=True)
    }
    print(f"stock GRPOTrainer in {len(works)} schedules", flush=True)
    return dict(in_processes(works, folder, jobs))


# The matrix


def try_cells(chosen: list[Cell], folder: Path, seed: int, jobs: int) -> dict[Cell, dict]:
    """The result of every cell, told as it comes."""
    works = {cell: functools.partial(try_cell, cell, folder / cell.name, seed) for cell in chosen}
    found, started = {}, time.monotonic()
    for cell, result in in_processes(works, folder, jobs):
        found[cell] = result
        left = (time.monotonic() - started) / len(found) * (len(chosen) - len(found))
        print(f"{len(found)}/{len(chosen)}, {clock(left)} left: {cell.name}: {outcome(result)}", flush=True)
        for line in result["differs"]:
            print(f"    {line}", flush=True)
    return {cell: found[cell] for cell in chosen}


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def outcome(result: dict) -> str:
    """The result of a cell in a word or two."""
    return "differs" if result["differs"] else "identical"


def cell_table(found: dict[Cell, dict], stock: dict[tuple[int, int], dict[str, float]]) -> str:
    """A row of Markdown for each cell; without stock runs their column is empty."""
    head = (
        "method", "steps per generation", "iterations", "processes", "trains", "evaluates", "logs every",
        "killed", "went on from step", "rltoken", "stock GRPO",
    )  # fmt: skip
    rows = []
    for cell, result in found.items():
        place = f"{cell.per_generation} ({PER_GENERATION[cell.per_generation]} accumulation)"
        trains, evaluates = "adapter" if cell.lora else "all", "yes" if cell.evaluation else "no"
        settings = (cell.method, place, cell.iterations, cell.ranks, trains, evaluates, cell.logging, cell.kill)
        beside = stock.get((cell.per_generation, cell.iterations), {}).get(str(result["step"]))
        rows.append((*settings, result["step"], outcome(result), "" if beside is None else distance(beside)))
    return markdown(head, rows)


def stock_table(stock: dict[tuple[int, int], dict[str, float]]) -> str:
    """A row of Markdown for each schedule, a column for each step that stock GRPOTrainer went on from."""
    head = ("steps per generation", "iterations", *(f"from step {step}" for step in range(1, STEPS + 1)))
    return markdown(head, [(*schedule, *map(distance, found.values())) for schedule, found in sorted(stock.items())])


def markdown(head: tuple, rows: list[tuple]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ("---",) * len(head), *rows))


def distance(value: float) -> str:
    """The largest difference of a weight in words."""
    return f"differs by {value:.1g}" if value else "exact"


def matrix(options: argparse.Namespace) -> bool:
    """Run the chosen cells and print their table; whether all are identical.

    Raises:
        Failed: no cell has that name, or a run outside the cells did not end well.
    """
    chosen = [cell for cell in cells(options.seed, tuple(options.override)) if re.search(options.cells, cell.name)]
    chosen = chosen[: options.limit]
    if not chosen:
        raise Failed(f"--cells: no cell's name holds '{options.cells}'")
    if not options.quick:
        check_forks(chosen[0], options.out / "fork")
    found = try_cells(chosen, options.out, options.seed, options.jobs)
    stock = {} if options.quick else stock_beside(chosen, options.out / "stock", options.jobs)
    identical = sum(not result["differs"] for result in found.values())
    print(f"\n{cell_table(found, stock)}\n\n{identical} of {len(found)} cells are identical\n")
    if stock:
        print(f"stock GRPOTrainer:\n\n{stock_table(stock)}\n")
    return identical == len(found)


# Random kills


def survive(cell: Cell, folder: Path, draw: random.Random, kills: int) -> tuple[dict[str, int], int]:
    """Kill one run at random moments, at most so many times, until it ends by itself.

    Returns:
        How many kills fell into what, and the most steps that one of them lost.

    Raises:
        Failed: the run did not go on, lost more than what was not saved, or ended otherwise than one in one piece.
    """
    whole, killed = folder / "whole", folder / "killed"
    seconds, arguments = train_through(cell.overrides(), whole, cell.ranks), cell.overrides()
    moments, newest, lost = Counter(), 0, 0
    while moments.total() < kills:
        started = time.time()
        statuses = run(training(arguments), killed, cell.ranks, draw.uniform(0, seconds / 2))
        if not any(statuses):
            break
        if not set(statuses) <= {0, -signal.SIGKILL}:
            raise Failed(f"{cell.name} did not go on: {told(killed)}")
        moments[moment(killed / "runs/x", started)] += 1
        before, newest = newest, newest_step(killed / "runs/x")
        lost = max(lost, last_logged(killed / "runs/x") - newest)
        if newest < before or lost > SAVED_EVERY:
            raise Failed(f"{cell.name} fell back from step {before} to {newest}, {lost} steps lost: {folder}")
    train_through(arguments, killed, cell.ranks)
    if differs := differences(whole / "runs/x", killed / "runs/x"):
        raise Failed(f"{cell.name} ended otherwise ({folder}): {'; '.join(differs)}")
    shutil.rmtree(folder)
    return moments, lost


def moment(run_folder: Path, started: float) -> str:
    """What a run was at when it was killed."""
    metrics = run_folder / "metrics.jsonl"
    if (run_folder / SCRATCH).exists():
        return "saving"
    return "steps and evaluation" if metrics.exists() and metrics.stat().st_mtime > started else "start-up"


def last_logged(run_folder: Path) -> int:
    """The last step that a run has logged."""
    path = run_folder / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0) if path.exists() else 0


def kill_often(options: argparse.Namespace) -> bool:
    """Kill run after run until there were enough kills: True, since a run that does not survive them ends it.

    Raises:
        Failed: one did not.
    """
    moments, lost = Counter(), 0
    for number in itertools.count():
        method = options.method or METHODS[number % len(METHODS)]
        ranks = options.ranks or 1 + (number + number // len(METHODS)) % 2
        extra = (*LONG, f"seed={options.seed + number}", *options.override)
        cell = Cell(method, 4, 2, ranks, lora=False, evaluation=True, logging=1, kill=f"run {number}", extra=extra)
        draw = random.Random(f"{options.seed} {number}")
        folder, left = options.out / cell.name, options.kills - moments.total()
        work = functools.partial(survive, cell, folder / "runs", draw, left)
        ((_, (found, most)),) = in_processes({"run": work}, folder, jobs=1)
        moments, lost = moments + Counter(found), max(lost, most)
        processes = {1: "one process", 2: "two processes"}.get(ranks, f"{ranks} processes")
        print(
            f"{moments.total()}/{options.kills}: {method}, {processes}, {sum(found.values())} kills, identical",
            flush=True,
        )
        if moments.total() >= options.kills:
            break
    fell = ", ".join(f"{count} in {name}" for name, count in moments.most_common())
    print(f"{number + 1} runs ended identical to runs in one piece; kills: {fell}; at most {lost} steps lost at once")
    return True


def main() -> None:
    """Run the matrix, or kill at random."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("override", nargs="*", help="further overrides of every run, such as model.source.steps=200")
    parser.add_argument("--cells", default="", metavar="PATTERN", help="only cells whose name holds this pattern")
    parser.add_argument("--limit", type=int, help="only the first so many cells")
    parser.add_argument("--quick", action="store_true", help="leave out stock TRL and the check of forks")
    parser.add_argument("--kills", type=int, help="instead of the matrix: so many kills at random moments")
    parser.add_argument("--method", choices=METHODS, help="with --kills: this one alone")
    parser.add_argument("--ranks", type=int, help="with --kills: always so many processes, all of them killed together")
    parser.add_argument("--out", type=Path, help="new folder for runs that differ (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0, help="draws the kills; with --kills the first run's seed too")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    options = parser.parse_args()
    options.out = (options.out or Path(tempfile.mkdtemp(prefix="resume-matrix-"))).absolute()
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out: {options.out} is not empty, and runs in it would be gone on with; name another")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # here and in every fork, which would wait for threads that it does not have
    started = time.monotonic()
    try:
        well = kill_often(options) if options.kills else matrix(options)
    except Failed as failure:
        print(f"failed: {failure}")
        well = False
    print(f"{clock(time.monotonic() - started)} minutes" + ("" if well else f"; what differs is in {options.out}"))
    sys.exit(not well)


if __name__ == "__main__":
    main()
