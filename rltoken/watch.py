"""Ranks that wait for one another: one that waits in vain says for whom, and ends.

A thread of each rank looks at what its main thread does, and writes that into RUN/logs/rankN.json for the others. Where
the main thread has stood in the same collective operation for `trainer.ddp_timeout` seconds, or the operation fails
because a peer is gone, the rank prints one line and ends with exit code 75: with its peers lost it cannot save, and
`resume=auto` goes on from the newest checkpoint. Launchers end the other ranks.

This needs no help of the back end: gloo has no such bound on CPUs (transformers passes none on), and NCCL's own
watchdog names neither step nor phase. Time is counted in beats of the thread, so that neither a clock that jumps nor a
job that is suspended and continued counts as waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from rltoken import logs
from rltoken.preemption import EXIT_CODE

BEATS = 20
"""Looks within the time allowed; each is at most LONGEST_BEAT seconds after the last."""
LONGEST_BEAT = 10.0
SILENT_BEATS = 3
"""A rank whose file stays as it is for so many beats is stopped, dead or cut off."""
COLLECTIVES = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional_collectives.py",
    "torch/distributed/utils.py",
    "torch/nn/parallel/distributed.py",
)
"""Where the Python side of a collective operation waits; in the last two DDP calls C++ that has none of its own."""
GRADIENTS = ("torch/autograd/graph.py", "_engine_run_backward")
"""Where backward does, in which DDP and FSDP reduce gradients."""
LOST = re.compile(r"connection (?:was )?(?:closed|reset|refused)|timed? ?out|broken pipe|remote process exited", re.I)
"""What back ends say of a peer that is gone."""
PHASES = {
    "_save_checkpoint": "saving", "save_model": "saving", "evaluate": "evaluation", "evaluated": "evaluation",
    "backward": "backward", "compute_loss": "forward", "_calculate_rewards": "grading",
    "_generate_single_turn": "sampling", "_extend_with_transformers": "sampling", "make_window": "scoring the window",
    "assemble": "loading", "refuse_differences": "the start",
}  # fmt: skip
"""Function on the stack -> what a rank is at; the first of them that is there counts."""

AFTER_STEP = ("saving", "evaluation")
"""Phases of the step before the one that is under way: the trainer has counted it already."""


@dataclass(frozen=True)
class Doing:
    """What a rank is at: optimizer step (0 before training), phase, and the operation in which it waits for others."""

    step: int
    phase: str
    operation: str | None = None

    def __str__(self) -> str:
        where = f"step {self.step}, {self.phase}" if self.step else self.phase
        return f"{where}, waiting in {self.operation}" if self.operation else where


def doing(stack: Sequence[tuple[str, str]], step: int) -> Doing:
    """What a rank is at by the stack of its main thread.

    Args:
        stack: (file, function) of each frame, the innermost first.
        step: the optimizer step that is under way; 0 before training.
    """
    names = {function for _, function in stack}
    phase = next((phase for function, phase in PHASES.items() if function in names), "between its phases")
    if phase in AFTER_STEP and step:
        step -= 1
    file, function = stack[0]
    operation = None
    if file.endswith(COLLECTIVES):
        operation = function
    elif file.endswith(GRADIENTS[0]) and function == GRADIENTS[1]:
        operation = "reduction of gradients"
    return Doing(step, phase, operation)


def frames(innermost: FrameType | None) -> Iterator[FrameType]:
    """The frames of a stack, the innermost first."""
    while innermost is not None:
        yield innermost
        innermost = innermost.f_back


class Watch:
    """Looks at this rank's main thread from a thread of its own, and ends the process where it waits in vain.

    Args:
        run: the open run directory.
        rank, ranks: this rank and how many there are.
        seconds: how long a collective operation may take.

    Attributes:
        step: gives the optimizer step that is under way; 0 before training.
    """

    def __init__(self, run: Path, rank: int, ranks: int, seconds: float) -> None:
        self.step: Callable[[], int] = lambda: 0
        self._folder, self._rank, self._ranks, self._seconds = run / logs.FOLDER, rank, ranks, seconds
        self._beat = min(LONGEST_BEAT, seconds / BEATS)
        self._over, self._ending = threading.Event(), threading.Lock()
        self._main = threading.main_thread().ident
        self._peers: dict[int, tuple[str, int]] = {}
        self._thread = threading.Thread(target=self._look, daemon=True, name="rltoken-watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def told(self, at: Doing, why: str) -> str:
        """The line of a rank that leaves: what it was at, why, and where the others are."""
        others = "; ".join(self._peer(rank) for rank in range(self._ranks) if rank != self._rank)
        return (
            f"rank {self._rank} leaves at {at}: {why}; {others}; the same command with resume=auto goes on from the "
            "newest checkpoint"
        )

    def leave(self, at: Doing, why: str) -> None:
        """Say so, once, and end the process: with peers lost nothing that ends a process in order would come back."""
        with self._ending:
            print(self.told(at, why), file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(EXIT_CODE)

    @contextlib.contextmanager
    def peers(self) -> Iterator[None]:
        """Inside, an operation that fails because a peer is gone ends the process as one that stalls does."""
        try:
            yield
        except Exception as error:
            stack = [(frame.filename, frame.name) for frame in reversed(traceback.extract_tb(error.__traceback__))]
            found = doing(stack, self.step())
            lost = LOST.search(str(error))
            if found.operation is None or lost is None:
                raise
            self._over.wait(self._beat * (SILENT_BEATS + 2))  # who is dead is silent by then
            self.leave(found, f"a peer is lost ({lost[0].lower()})")

    def _look(self) -> None:
        """Note what the main thread does, beat by beat."""
        beats, stalled, before = 0, 0, None
        while not self._over.wait(self._beat):
            stack = list(frames(sys._current_frames().get(self._main)))
            if not stack:
                continue
            mark = [(id(frame), frame.f_lasti) for frame in stack]
            found = doing([(frame.f_code.co_filename, frame.f_code.co_name) for frame in stack], self.step())
            del stack  # frames keep alive what their functions hold
            beats += 1
            stalled = stalled + 1 if found.operation and (mark, found) == before else 0
            before = (mark, found)
            self._write({"beat": beats, **asdict(found)})
            self._read()
            if stalled * self._beat >= self._seconds:
                self.leave(found, f"no answer within trainer.ddp_timeout={self._seconds:g} s")

    def _write(self, told: dict) -> None:
        with contextlib.suppress(OSError):  # a full disk is told by the next save
            place = self._folder / f"rank{self._rank}.json"
            partial = place.with_suffix(".partial")
            partial.write_text(json.dumps(told), encoding="utf-8")
            partial.replace(place)

    def _read(self) -> None:
        """Note for how many beats each peer's file has been what it is."""
        for rank in range(self._ranks):
            if rank != self._rank:
                try:
                    text = (self._folder / f"rank{rank}.json").read_text(encoding="utf-8")
                except OSError:
                    text = ""
                last, unchanged = self._peers.get(rank, ("", 0))
                self._peers[rank] = (text, unchanged + 1 if text == last else 0)

    def _peer(self, rank: int) -> str:
        text, unchanged = self._peers.get(rank, ("", 0))
        if not text:
            return f"rank {rank} has not begun"
        found = json.loads(text)
        at = Doing(found["step"], found["phase"], found["operation"])
        if unchanged >= SILENT_BEATS:
            return f"rank {rank} gives no sign of life since {unchanged * self._beat:.0f} s, when it was at {at}"
        return f"rank {rank} is at {at}"


@contextlib.contextmanager
def watched(run: Path, seconds: float) -> Iterator[Watch]:
    """Watch this rank inside the context; one that is alone waits for nobody and is not watched.

    Args:
        run: the open run directory.
        seconds: how long a collective operation may take (`trainer.ddp_timeout`).
    """
    watch = Watch(run, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), seconds)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield watch
        return
    with watch, watch.peers():
        yield watch
