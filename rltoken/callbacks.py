"""What a run tells while it goes: metrics.jsonl, and a progress line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from rltoken.report import read_metrics

SHOWN = {"reward": "reward", "rewards/accuracy/mean": "accuracy", "thinking_tokens": "thinking tokens"}
"""Metric -> what the progress line calls it."""


class MetricsFile(TrainerCallback):
    """Append one JSON object per log to a file; what is written survives a kill, and a resumed run repeats no step."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Drop what was logged after the checkpoint that training goes on from, and a line that a kill cut short."""
        if state.is_world_process_zero and self._path.exists():
            kept = [line for line in read_metrics(self._path) if line["step"] <= state.global_step]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            partial.replace(self._path)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Write the newest metrics with their step."""
        if state.is_world_process_zero and logs:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "time": time.time(), **_strict(logs)}) + "\n")


def _strict(logs: dict[str, Any]) -> dict[str, Any]:
    """Not a number and infinity, which JSON lacks, as null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in logs.items()
    }


class ProgressLine(TrainerCallback):
    """Step, reward, accuracy, thinking tokens and time left: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
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
                TextColumn("training"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, shown="")
            self._bar.start()

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Show the newest metrics."""
        if not state.is_world_process_zero or not logs or "reward" not in logs:
            return
        shown = ", ".join(f"{name} {logs[key]:.4g}" for key, name in SHOWN.items() if logs.get(key) is not None)
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, shown=shown)
        elif state.global_step % max(1, state.max_steps // 20) == 0 or state.global_step == state.max_steps:
            self._console.print(f"step {state.global_step}/{state.max_steps}: {shown}, {self._left(state)} left")

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
