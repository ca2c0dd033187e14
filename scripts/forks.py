"""Training runs in forks of a process that has imported torch and TRL once: seconds less for each of them.

On CPUs only, and with one thread: the parent must have no threads that its forks would wait for, so whatever computes
runs in a fork too. A fork ends without a way back into the parent's frames.
"""

import gc
import itertools
import json
import math
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.elastic.utils.distributed import get_free_port

from rltoken import train
from rltoken.evals import generate  # noqa: F401  (a run imports it late; here it is imported once)

gc.freeze()  # a collection in a fork, and accelerate asks for some, need not look through what imports have made

TIMEOUT = 600
"""Seconds after which a run counts as stuck."""


class Failed(Exception):
    """A run that ended as it should not have; says where its output is."""


def forked(work: Callable[[], Any], folder: Path, environment: Mapping[str, str]) -> int:
    """The id of a new process that calls `work` in `folder`, with its output in log.txt there."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(environment)
        work()
        status = 0
    except SystemExit as left:
        status = left.code
    except BaseException:
        traceback.print_exc()
    finally:  # never back into the frames of the parent
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(work: Callable[[], Any], folder: Path, ranks: int, seconds: float = math.inf, grace: float = 0.0) -> list[int]:
    """Call `work` in so many processes of one group and wait; all are killed when one fails or the time is over.

    Args:
        work: what each of them does.
        folder: their working directory.
        ranks: how many there are.
        seconds: the time.
        grace: seconds that the others have to end by themselves once one has failed.

    Returns:
        The exit statuses, negative where a signal ended the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    environments = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    pids = [forked(work, folder, {} if ranks == 1 else environment) for environment in environments]
    deadline = time.monotonic() + min(seconds, TIMEOUT)
    statuses: dict[int, int] = {}
    while len(statuses) < ranks:
        left = [pid for pid in pids if pid not in statuses]
        if any(statuses.values()):
            deadline, grace = min(deadline, time.monotonic() + grace), math.inf
        over = time.monotonic() > deadline
        for pid in left if over else ():
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            ended, status = os.waitpid(pid, 0 if over else os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [statuses[pid] for pid in pids]


def training(arguments: list[str], fatal: tuple[str, int, int] | None = None) -> Callable[[], None]:
    """What a process is to do: train as the command line says; `fatal` is (function, number of the call, rank)."""

    def work() -> None:
        if fatal is not None and int(os.environ.get("RANK", "0")) == fatal[2]:
            die_in(*fatal[:2])
        sys.argv = ["rltoken.train", *arguments]
        train.main()

    return work


def die_in(function: str, call: int) -> None:
    """Let this process get SIGKILL as it enters the function for the `call`-th time."""
    owner, name = pkgutil.resolve_name(function.rpartition(".")[0]), function.rpartition(".")[2]
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def train_through(arguments: list[str], folder: Path, ranks: int) -> float:
    """Train until the end; the seconds it took.

    Raises:
        Failed: it did not end, or not well.
    """
    started = time.monotonic()
    if any(statuses := run(training(arguments), folder, ranks)):
        raise Failed(f"ended with {statuses}: {told(folder)}")
    return time.monotonic() - started


def told(folder: Path) -> str:
    """The last line of a run's output, and where the rest is."""
    lines = (folder / "log.txt").read_text(errors="replace").split("\n")
    return f"{next(filter(None, reversed(lines)), 'no output')} ({folder}/log.txt)"


def in_processes(works: dict, folder: Path, jobs: int) -> Iterator[tuple[Any, Any]]:
    """Call each of the functions in a process of its own, so many at a time: (key, result) in the order they end.

    Raises:
        Failed: a function raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running = list(enumerate(works.items())), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            number, (key, work) = waiting.pop(0)
            result = folder / f"result-{number}.json"
            running[forked(lambda w=work, r=result: r.write_text(json.dumps(w())), folder, {})] = key, result
        pid, status = os.wait()
        key, result = running.pop(pid)
        if status:
            raise Failed(told(folder))
        yield key, json.loads(result.read_text())
