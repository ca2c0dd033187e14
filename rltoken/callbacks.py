"""What a run tells while it goes: metrics.jsonl, and a progress line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

SHOWN = {"reward": "reward", "rewards/accuracy/mean": "accuracy", "thinking_tokens": "thinking tokens"}
"""Metric -> what the progress line calls it."""


class MetricsFile(TrainerCallback):
    """Append one JSON object per log to a file; what is written survives a kill."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Write the newest metrics with their step."""
        if state.is_world_process_zero and logs:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "time": time.time(), **logs}) + "\n")


class ProgressLine(TrainerCallback):
    """Step, reward, accuracy, thinking tokens and time left: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._started = 0.0
        self._first = 0

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
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, state) -> str:
        done = state.global_step - self._first
        seconds = (time.monotonic() - self._started) / max(1, done) * (state.max_steps - state.global_step)
        return time.strftime("%H:%M:%S", time.gmtime(seconds))
