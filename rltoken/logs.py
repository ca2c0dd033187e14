"""RUN/logs/rankN.log: what each rank prints and logs, line by line with the time, besides the terminal."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import logging
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

FOLDER = "logs"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""What moves the cursor and colours text."""


class Tee:
    """A stream that also writes each whole line, as it would stay on a terminal, into a file.

    A file that cannot be written is given up: the run goes on, and a full disk is told by the next save.
    """

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream = stream
        self._file: TextIO | None = file
        self._pending = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Write to both."""
        with self._lock:
            *lines, rest = (self._pending + text).split("\n")
            self._pending = rest.rpartition("\r")[2]  # a bar is redrawn many times before its line ends
            for line in lines:
                self._keep(line)
        return self.stream.write(text)

    def flush(self) -> None:
        """Flush the stream; the file has each line at once."""
        self.stream.flush()

    def _keep(self, line: str) -> None:
        try:
            if self._file is not None:
                self._file.write(f"{_now()} {CONTROL.sub('', line.rstrip().rpartition(chr(13))[2])}\n")
        except (OSError, ValueError):  # a full disk; a file that was closed under a thread that still prints
            self._file = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _now() -> str:
    return datetime.datetime.now().isoformat(sep=" ", timespec="milliseconds")


def path(run: Path, rank: int) -> Path:
    """The log of a rank."""
    return run / FOLDER / f"rank{rank}.log"


@contextlib.contextmanager
def kept(run: Path) -> Iterator[None]:
    """Inside, what this process prints and logs goes into its rank's log too, and so does what ends it.

    That is what Python writes; what C libraries write goes to the terminal alone. Where nobody else has asked for it
    (`python -X faulthandler`), the Python stack at a fatal signal goes into the log.

    Args:
        run: the run directory, which must be there.
    """
    place = path(run, int(os.environ.get("RANK", "0")))
    with contextlib.ExitStack() as held:
        try:
            place.parent.mkdir(exist_ok=True)
            file = held.enter_context(place.open("a", encoding="utf-8", buffering=1))
            file.write(f"{_now()} process {os.getpid()} on {socket.gethostname()}: {' '.join(sys.argv)}\n")
        except OSError:  # told by what has to be written
            yield
            return
        for name in ("stdout", "stderr"):
            held.enter_context(_replaced(name, Tee(getattr(sys, name), file)))
        if not faulthandler.is_enabled():
            faulthandler.enable(file)
            held.callback(faulthandler.disable)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                file.writelines(f"{_now()} {line}\n" for line in traceback.format_exc().splitlines())
            raise


@contextlib.contextmanager
def _replaced(name: str, tee: Tee) -> Iterator[None]:
    """Let `sys.<name>`, and the loggers that write to what it was, write to a tee inside the context."""
    setattr(sys, name, tee)
    _redirect(tee.stream, tee)
    try:
        yield
    finally:
        setattr(sys, name, tee.stream)
        _redirect(tee, tee.stream)


def _redirect(old: Any, new: Any) -> None:
    """Let every logger that writes to one stream write to another."""
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", ()):  # a name that only its children have has none
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)
