#!/usr/bin/env python
"""Kill, stop, slow or hold up one of two ranks in each phase; the other must say so, and the run go on exactly.

    python scripts/lost_ranks.py                       # every phase and fault
    python scripts/lost_ranks.py --cells 'stopped.*'   # cells whose name holds the pattern
    python scripts/lost_ranks.py --limit 3             # a few cells, every kind of loss among them

A cell is a short run of two processes on the CPU that saves at every step. In its second step one rank gets SIGKILL or
SIGSTOP, stands still, or needs ten times as long for the phase. Where it is lost, the other rank must end with exit
code 75 within trainer.ddp_timeout and some beats, with one line that names itself, the step, what it waited in and
where its peer was; nothing may be left of either; and the same command must go on to what a run in one piece leaves,
bit for bit. A slow rank is only waited for.

torch and TRL are imported once, and every run is a fork of the process that did (scripts/forks.py).
"""

import argparse
import itertools
import os
import pkgutil
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from compare_runs import differences
from forks import Failed, run, told, train_through, training

from rltoken import logs
from rltoken.preemption import EXIT_CODE
from rltoken.resume import newest_whole

SECONDS = 8
"""trainer.ddp_timeout of the runs that are disturbed: more than a step takes on a busy machine."""
SETTINGS = (
    "+exp=grpo", "name=x", "resume=auto", "model.source.steps=2", "data.train.n=32", "data.eval.n=4",
    "trainer.max_steps=2", "trainer.save_steps=1", "trainer.per_device_train_batch_size=8", "trainer.num_generations=4",
    "trainer.max_completion_length=24", "rollout.max_thinking_tokens=16", "trainer.learning_rate=1e-3",
    "trainer.warmup_steps=0", "trainer.eval_strategy=steps", "trainer.eval_steps=1", "eval.during.samples=1",
    "eval.during.limit=2", "eval.before=false", "eval.after=false",
)  # fmt: skip
PHASES = {
    "sampling": "rltoken.trl_compat.SeamTrainer._generate_single_turn",
    "grading": "rltoken.trl_compat.SeamTrainer._calculate_rewards",
    "forward": "rltoken.trainer.TokenGRPOTrainer.step_loss",
    "backward": "accelerate.Accelerator.backward",
    "saving": "rltoken.trl_saving.SavingTrainer._save_what_is_left_out",
    "evaluation": "rltoken.trainer.TokenGRPOTrainer.evaluate",
}
"""Phase -> a function that each rank calls once in it, in each step."""
LOSSES = ("stopped", "killed", "held up")
FAULTS = (*LOSSES, "slow")
SLOWER = 10


def cells() -> list[tuple[str, str, int]]:
    """(fault, phase, rank): every fault in every phase, the ranks in turn; any three in succession lose differently."""
    pairs = [(LOSSES[(i + j) % 3], phase) for i, phase in enumerate(PHASES) for j in range(3)]
    pairs += [("slow", phase) for phase in PHASES]
    return [(*pair, (number + 1) % 2) for number, pair in enumerate(pairs)]


def disturbed(fault: str, phase: str, rank: int) -> Callable[[], None]:
    """What a process is to do: train, and suffer the fault if it is that rank."""

    def work() -> None:
        if int(os.environ["RANK"]) == rank:
            disturb(fault, PHASES[phase])
        training([*SETTINGS, f"trainer.ddp_timeout={SECONDS}"])()

    return work


def disturb(fault: str, function: str) -> None:
    """Let the second call of a function kill, stop or hold up this process, or every call take longer."""
    owner, name = pkgutil.resolve_name(function.rpartition(".")[0]), function.rpartition(".")[2]
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        started, number = time.monotonic(), next(calls)
        if number == 2 and fault == "held up":
            time.sleep(20 * SECONDS)
        elif number == 2 and fault != "slow":
            os.kill(os.getpid(), signal.SIGSTOP if fault == "stopped" else signal.SIGKILL)
        found = original(*args, **kwargs)
        if fault == "slow":
            time.sleep((SLOWER - 1) * (time.monotonic() - started))
        return found

    setattr(owner, name, wrapped)


def try_cell(fault: str, phase: str, rank: int, folder: Path, whole: Path) -> str:
    """Run a cell; what the rank that was left said.

    Raises:
        Failed: the runs did not end as they should.
    """
    started = time.monotonic()
    # who is killed is the first to end, who is stopped never does
    statuses = run(disturbed(fault, phase, rank), folder, ranks=2, grace=4 * SECONDS if fault == "killed" else 0)
    took, other = time.monotonic() - started, 1 - rank
    line = ""
    if fault == "slow":
        if any(statuses):
            raise Failed(f"a slow rank ended the run with {statuses}: {told(folder)}")
    else:
        log = logs.path(folder / "runs/x", other).read_text()
        found = re.findall(rf"rank {other} leaves at step 2, .*, waiting in .*: .*; rank {rank} .*resume=auto.*", log)
        if statuses[other] != EXIT_CODE or len(found) != 1:
            raise Failed(f"ended with {statuses} and {len(found)} lines that say why: {told(folder)}")
        line = f"{found[0]} [{took:.0f} s in all]"
        checkpoint, damaged = newest_whole(folder / "runs/x")
        if checkpoint is None or damaged:
            raise Failed(f"left {checkpoint}, and damaged ones: {damaged}")
    if left := processes_in(folder):
        raise Failed(f"left processes {left} behind")
    if fault != "slow":
        train_through(SETTINGS, folder, ranks=2)
    if found := differences(whole / "runs/x", folder / "runs/x"):
        raise Failed(f"ended otherwise than the run in one piece: {'; '.join(found)} ({folder})")
    return line


def processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def main() -> None:
    """Run the chosen cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="", metavar="PATTERN", help="only cells whose name holds this pattern")
    parser.add_argument("--limit", type=int, help="only the first so many cells")
    options = parser.parse_args()
    torch.set_num_threads(1)  # here and in every fork, which would wait for threads that it does not have
    out, failed = Path(tempfile.mkdtemp(prefix="lost-ranks-")).resolve(), 0
    named = {f"{fault} in {phase}, rank {rank}": (fault, phase, rank) for fault, phase, rank in cells()}
    chosen = {name: cell for name, cell in named.items() if re.search(options.cells, name)}
    chosen = dict(itertools.islice(chosen.items(), options.limit))
    train_through(SETTINGS, out / "whole", ranks=2)
    for name, cell in chosen.items():
        try:
            print(
                f"{name}: went on exactly. {try_cell(*cell, out / name.replace(' ', '-'), out / 'whole')}", flush=True
            )
        except Failed as failure:
            failed += 1
            print(f"{name}: failed: {failure}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} cells went on exactly")
    if failed:
        print(f"what there is of them is in {out}")
    else:
        shutil.rmtree(out)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
