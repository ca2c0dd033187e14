"""What happens beside the steps of a run: metrics.jsonl, a progress line, and stopping early."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from rltoken.errors import first_line
from rltoken.preemption import Notice, signals
from rltoken.report import read_metrics

logger = logging.getLogger(__name__)

SHOWN = {"reward": "reward", "rewards/accuracy/mean": "accuracy", "thinking_tokens": "thinking tokens"}
EVALUATED = {
    "accuracy": "accuracy",
    "anytime_accuracy": "anytime accuracy",
    "thinking_tokens": "thinking tokens",
    "truncated": "cut",
}
"""Metrics -> what the progress line calls them, of a window and of an evaluation."""
SUPERVISED = {"loss": "loss", "mean_token_accuracy": "tokens predicted"}
"""The same of a supervised stage."""


class MetricsFile(TrainerCallback):
    """Append one JSON object per log to a file; what is written survives a kill, and a resumed run repeats no step."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Drop what was logged after the checkpoint that training goes on from, and a line that a kill cut short."""
        if state.is_world_process_zero and self._path.exists():
            # what was evaluated before the first step is evaluated again where training begins there
            kept = [line for line in read_metrics(self._path) if line["step"] <= state.global_step > 0]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            partial.replace(self._path)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Write the newest metrics with their step, but not transformers' summary of what this process trained."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            with self._path.open("a", encoding="utf-8") as file:
                line = {"step": state.global_step, "time": time.time(), **_strict(logs)}
                file.write(json.dumps(line) + "\n")


def _strict(logs: dict[str, Any]) -> dict[str, Any]:
    """Not a number and infinity, which JSON lacks, as null; eval_NAME as eval/NAME, as trackers show it."""
    return {
        f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else key: (
            None if isinstance(value, float) and not math.isfinite(value) else value
        )
        for key, value in logs.items()
    }


class ProgressLine(TrainerCallback):
    """Step, a few metrics and time left: a live line on a terminal, plain lines elsewhere.

    Args:
        label: what the live line says is going on.
        shown: metric -> what the line calls it; a log without the first of them is not shown.
    """

    def __init__(
        self, console: Console | None = None, *, label: str = "training", shown: Mapping[str, str] = SHOWN
    ) -> None:
        self._console, self._label, self._shown = console or Console(stderr=True), label, shown
        self._bar: Progress | None = None
        self._started = 0.0
        self._first = 0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the terminal back, also where training ended with an exception."""
        self.close()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start the line."""
        self._started, self._first = time.monotonic(), state.global_step
        if state.is_world_process_zero and self._console.is_terminal:
            self._bar = Progress(
                TextColumn(self._label),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self._label, total=state.max_steps, completed=state.global_step, shown="")
            self._bar.start()

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Show the newest metrics."""
        if not state.is_world_process_zero or not logs or next(iter(self._shown)) not in logs:
            return
        known = {name: logs[key] for key, name in self._shown.items() if logs.get(key) is not None}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in known.items() if not math.isnan(value))
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, shown=shown)
        elif state.global_step % max(1, state.max_steps // 20) == 0 or state.global_step == state.max_steps:
            self._console.print(f"step {state.global_step}/{state.max_steps}: {shown}, {self._left(state)} left")

    def on_evaluate(self, args, state, control, metrics: dict[str, float] | None = None, **kwargs) -> None:
        """Say what came out of each benchmark, in a line that stays."""
        if not state.is_world_process_zero:
            return
        for name in dict.fromkeys(key.removeprefix("eval_").rpartition("/")[0] for key in metrics or {}):
            shown = [
                f"{label} {metrics[key]:.4g}"
                for measure, label in EVALUATED.items()
                if (key := f"eval_{name}/{measure}") in metrics
            ]
            if shown:
                self._console.print(f"step {state.global_step}/{state.max_steps}, {name}: {', '.join(shown)}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to a bar of somebody else's inside the context."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Close the line."""
        self.close()

    def close(self) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, state) -> str:
        done = state.global_step - self._first
        seconds = (time.monotonic() - self._started) / max(1, done) * (state.max_steps - state.global_step)
        return time.strftime("%H:%M:%S", time.gmtime(seconds))


def tolerate(tracker: TrainerCallback) -> None:
    """Let what a tracker raises be told once; from then on it is left out, and the run goes on.

    metrics.jsonl has everything that it would have got.
    """
    down: list[BaseException] = []

    def _tolerant(work: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(work)
        def _called(*args: Any, **kwargs: Any) -> None:
            if down:
                return
            try:
                work(*args, **kwargs)
            except Exception as error:
                down.append(error)
                logger.warning(
                    "The tracker %s failed (%s: %s): the run goes on without it, and metrics.jsonl has everything.",
                    type(tracker).__name__,
                    type(error).__name__,
                    first_line(error),
                )

        return _called

    for event in (name for name in dir(TrainerCallback) if name.startswith("on_")):
        setattr(tracker, event, _tolerant(getattr(tracker, event)))


class StopWhenAsked(TrainerCallback):
    """Save and stop at the next safe point once a rank is asked to leave; all ranks do at the same one.

    Safe points are the end of an optimizer step, of an evaluation and of a save. A resumed run finds what one in one
    piece would: what is due at the end of an epoch that is not over is left out.
    """

    def __init__(self, notice: Notice) -> None:
        self._notice = notice

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Block the signals while the data loader starts its workers, which inherit that: a signal to all is for us."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signals())

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Receive again what came meanwhile."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Leave with a checkpoint of this step."""
        if self._agreed(args):
            control.should_training_stop = control.should_save = True
            if args.save_strategy == SaveStrategy.BEST:  # where an evaluation finds nothing better it drops the save
                args.save_strategy = SaveStrategy.STEPS

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        """The same: an evaluation may take longer than a step."""
        self.on_step_end(args, state, control)

    def on_save(self, args, state, control, **kwargs) -> None:
        """Leave with the checkpoint that was just written."""
        if self._agreed(args):
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Leave out what is due only where an epoch is over; else save again, with that in the trainer's state."""
        if self._notice.agreed:
            over = state.epoch.is_integer() or state.global_step >= state.max_steps
            control.should_log, control.should_evaluate = over and control.should_log, over and control.should_evaluate
            control.should_save = control.should_log or control.should_evaluate

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Agree for the last time, so that either all ranks go on to what follows training or none."""
        self._agreed(args)

    def _agreed(self, args) -> bool:
        """Whether any rank was asked; every rank calls this at the same points."""
        if not self._notice.agreed:
            asked = torch.tensor([self._notice.asked()], dtype=torch.int32, device=args.device)
            if args.world_size > 1:
                torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self._notice.agreed = bool(asked)
        return self._notice.agreed
