"""Leaving when the machine is wanted back: SIGTERM, SIGUSR1, submitit's signal or `trainer.max_hours`.

    with noticed(max_hours) as notice:
        ...                      # nothing to lose here: a signal ends the run at once, by raising Preempted
        with notice.steps(told):
            trainer.train()      # a signal waits for the end of the optimizer step (`callbacks.StopWhenAsked`)
        ...                      # nothing to lose again

Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from rltoken.errors import SamplerLost

EXIT_CODE = os.EX_TEMPFAIL
"""75: the run is not finished, and the same command with resume=auto goes on."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ECHO_SECONDS = 1.0
"""A second SIGTERM so soon is the first one again: `timeout`, for one, sends it to its child and to its group."""
STARTED = time.monotonic()
"""When this process began, in seconds: the entry imports this module first."""


def submitit_signal() -> signal.Signals | None:
    """The signal by which submitit tells a job of its end, in a process that it started; None in any other."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    return signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]


def signals() -> set[signal.Signals]:
    """What tells this process to leave."""
    own = submitit_signal()
    return {*SIGNALS} if own is None else {*SIGNALS, own}


class Preempted(KeyboardInterrupt):
    """The run leaves early and can be gone on with; the message says what is saved.

    What is prepared for Ctrl-C, as the grader's pool and Hydra's launcher are, is prepared for this too.
    """


class Notice:
    """Whether this run is to leave, and why.

    Args:
        max_hours: hours from the start of the process after which it is to; None: never.

    Attributes:
        reason: what asked for it, for the message; empty while nothing did.
        agreed: whether every rank knows, so that they stop after the same step.
        told: what to say in the message of what is saved.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self.reason = ""
        self.agreed = False
        self.told = "before training, nothing new to save"
        self._max_hours = max_hours
        self._stepping = False
        self._process = os.getpid()
        self._sigterm_at = math.inf

    def asked(self) -> bool:
        """Whether this process was asked to leave, by a signal or by the clock."""
        if not self.reason and self._max_hours is not None and time.monotonic() - STARTED >= 3600 * self._max_hours:
            self.reason = f"trainer.max_hours={self._max_hours:g}"
        return bool(self.reason)

    @contextlib.contextmanager
    def steps(self, told: Callable[[], str]) -> Iterator[None]:
        """Inside, a signal waits for a safe point; who is inside looks at `asked`.

        Args:
            told: makes the message's part about what is saved from the end of the context on.

        Raises:
            Preempted: at the end, if the run was asked to leave.
        """
        self._stepping = True
        try:
            yield
            self.told = told()
        finally:
            self._stepping = False
        if self.agreed or self.reason:
            raise self._preempted()

    @contextlib.contextmanager
    def sampler_kept(self, save: Callable[[], None] | None = None) -> Iterator[None]:
        """Inside, a sampler that is lost asks the run to leave, after `save`.

        Raises:
            Preempted: it was lost, where there are no steps whose end would say so.
        """
        try:
            yield
        except SamplerLost as lost:
            if save is not None:
                save()
            self.reason = str(lost).rstrip(".")
            if not self._stepping:
                raise self._preempted() from lost

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler.

        Raises:
            Preempted: where there is nothing to wait for.
        """
        now = time.monotonic()
        if os.getpid() != self._process or (number == signal.SIGTERM and now - self._sigterm_at > ECHO_SECONDS):
            _end_by(number)
        if number == signal.SIGTERM:
            self._sigterm_at = min(self._sigterm_at, now)
        if not self.reason:
            self.reason = signal.Signals(number).name
            if not self._stepping:
                raise self._preempted()

    def _preempted(self) -> Preempted:
        reason = self.reason or "another process of the run"
        return Preempted(f"stopped by {reason} {self.told}; the same command with resume=auto goes on")


@contextlib.contextmanager
def noticed(max_hours: float | None) -> Iterator[Notice]:
    """Receive the signals inside the context, where that is possible: in the main thread.

    Args:
        max_hours: as `Notice` takes them.
    """
    notice = Notice(max_hours)
    if threading.current_thread() is not threading.main_thread():
        yield notice
        return
    handlers = {number: signal.signal(number, notice.receive) for number in signals()}
    try:
        yield notice
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)  # training may have ended while the data loader started


def _end_by(number: int) -> None:
    """End this process as the signal does that nobody handles."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container outlives the signal
