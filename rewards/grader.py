"""A pool of processes that can be killed, for functions that may hang or crash: sympy on what a model wrote.

    pool = shared(seconds=5.0)
    pool.map(judge, items, cache=True)      # [Result(value=True), Result(failure="timed_out"), ...]

Why not `concurrent.futures`: nothing stops an item there, one crash breaks the whole executor, and its processes import
the main module of the trainer. Here each worker is a bare interpreter that imports what the function needs. A thread of
this process owns it, hands it items, kills it at the bound, and puts another one in its place while the other workers
go on; that one starts at half the bound, so that its imports are done by then. The kernel kills a worker when its
thread ends, so that none outlives this process, however that ends.

Linux only: elsewhere set `workers` to 0. Processes that the function itself starts are not bounded and not killed.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rltoken.errors import UserError
from rltoken.rewards import worker
from rltoken.rewards.worker import OUT_OF_MEMORY, REPLY, describe

MAX_WORKERS = 8
"""The most workers that `shared` starts unasked."""
CACHE_SIZE = 65536
"""How many results a pool keeps; the least recently used are forgotten first."""
RETRY_AFTER = 600.0
"""Seconds after which a cached failure is forgotten, in case the machine was to blame."""
START_SECONDS = 60.0
"""The bound in seconds of starting a worker, and of its imports for a function."""
START_ATTEMPTS = 3
"""How many starts of workers may fail between two results of a call before the call fails."""
MOST = 10**6
"""What no bound of a pool may reach: a million seconds, say."""
CHUNK = 8
"""The most items that a worker is handed at once, so that it need not wait for this process between them."""

# A signal to the whole job (Ctrl-C, a pre-emption notice) is for the trainer, which may yet finish its step.
_SHIELDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_DISTRIBUTED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # sympy's way through a set depends on it: without it two workers could judge one pair differently.
    "PYTHONHASHSEED": "0",
}


@dataclass(frozen=True)
class Result:
    """What became of one item.

    Attributes:
        value: what the function returned; None where it did not return.
        failure: None, "timed_out" or "crashed".
        detail: one line about the failure: an exception, a signal, memory.
    """

    value: Any = None
    failure: str | None = None
    detail: str = ""


class Pool:
    """Worker processes with bounds in time and memory. They start on first use and stay until `close`.

    May be used from several threads. A forked process has workers of its own.

    Args:
        workers: the number of processes. 0 calls the function in this process, one item after the other: nothing can
            be killed or bounded in memory then, a crash is a crash of this process, and the time limit is an alarm
            that works in the main thread only, not inside C code, and not after a function that sets its own alarm.
        seconds: the bound of one item, from when a worker begins it; imports for the function do not count.
        memory_mb: the bound of the address space of one worker, in MB. sympy and math-verify take about 80.
        recycle_after: how many items a worker does before it is replaced, which bounds what leaks. It is also replaced
            when it holds more than half of `memory_mb` between two items.

    Raises:
        UserError: for a number that is out of range.
    """

    def __init__(self, *, workers: int, seconds: float = 5.0, memory_mb: int = 2048, recycle_after: int = 2000):
        check(workers=workers, seconds=seconds, memory_mb=memory_mb, recycle_after=recycle_after)
        self.workers, self.seconds, self.memory_mb, self.recycle_after = workers, seconds, memory_mb, recycle_after
        self.closed = False
        self._cache: OrderedDict[tuple[Callable, Any], tuple[Result, float]] = OrderedDict()
        self._reset()
        _pools.add(self)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], *, cache: bool = False) -> list[Result]:
        """Call a function on every item, in the workers.

        Args:
            function: a function of an importable module, called with one item. The same one under the same settings
                must always return the same, if its results are cached. If the module has a function `warm_up`, each
                worker calls that before its first item, outside the item's bound.
            items: N items that can be pickled; hashable ones if they are cached.
            cache: call the function once for equal items, and not at all for those whose result is known. Failures
                are kept too, so that siblings of an item that hangs cost nothing, but for `RETRY_AFTER` seconds only.

        Returns:
            N results in the order of the items. An exception, a crash, and a value that cannot be pickled, are
            "crashed".

        Raises:
            RuntimeError: if the pool is closed, or the workers cannot be started or cannot import the function.
            AttributeError, PicklingError: if the function cannot be pickled, as one inside another cannot.
            KeyboardInterrupt: after Ctrl-C, which closes the pool.
            ValueError: if the function belongs to the main module, which workers do not import.
        """
        if not cache:
            return self._call(function, items)
        results = self._recall(function, items)
        new = [item for item, result in results.items() if result is None]
        found = dict(zip(new, self._call(function, new), strict=True))
        self._remember(function, found)
        results |= found
        return [results[item] for item in items]

    def close(self) -> None:
        """Kill the workers and wait until they are gone. Calls of `map` in other threads raise RuntimeError."""
        self._stop(RuntimeError("the grader pool was closed"))
        for thread in self._threads:
            thread.join()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._jobs: set[_Job] = set()
        self._waiting: deque[_Chunk] = deque()
        self._threads: list[threading.Thread] = []
        self._processes: set[_Process] = set()

    def _recall(self, function: Callable, items: Sequence[Any]) -> dict[Any, Result | None]:
        """The known result, or None, of each distinct item."""
        results, now = {}, time.monotonic()
        with self._changed:
            for item in items:
                result, forgotten = self._cache.get((function, item), (None, math.inf))
                results[item] = result if now < forgotten else None
                if result is not None:
                    self._cache.move_to_end((function, item))
        return results

    def _remember(self, function: Callable, results: dict[Any, Result]) -> None:
        """Keep the results of distinct items, and forget the least recently used ones."""
        failure_forgotten = time.monotonic() + RETRY_AFTER
        with self._changed:
            for item, result in results.items():
                self._cache[function, item] = result, failure_forgotten if result.failure else math.inf
                self._cache.move_to_end((function, item))
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)

    def _call(self, function: Callable, items: Sequence[Any]) -> list[Result]:
        """`map` without the cache."""
        if self.workers == 0:
            return [_call_here(function, item, self.seconds) for item in items]
        if getattr(function, "__module__", None) == "__main__":
            raise ValueError(f"{function} is defined in the main module; workers need it in a module they can import")
        job = _Job(pickle.dumps(function), [None] * len(items))
        tasks = [(index, data) for index, item in enumerate(items) if (data := job.pickled(index, item)) is not None]
        size = max(1, min(CHUNK, len(tasks) // (4 * self.workers)))
        chunks = [_Chunk(job, tasks[start : start + size]) for start in range(0, len(tasks), size)]
        if not chunks:
            return job.results
        try:
            self._submit(job, chunks)
            job.done.wait()
        except KeyboardInterrupt:
            # The process that Ctrl-C ends may take seconds over it, and a stuck worker would live as long.
            self._stop(RuntimeError("the grader pool was interrupted"))
            raise
        finally:
            self._withdraw({job})
        if job.error is not None:
            raise job.error
        return job.results

    def _submit(self, job: _Job, chunks: list[_Chunk]) -> None:
        """Queue a job, with as many threads as there are items to do, up to the number of workers."""
        with self._changed:
            if self.closed:
                raise RuntimeError("the grader pool is closed")
            job.left = sum(len(chunk.tasks) for chunk in chunks)
            self._jobs.add(job)
            self._waiting.extend(chunks)
            while len(self._threads) < min(self.workers, sum(each.left for each in self._jobs)):
                thread = threading.Thread(target=self._own_worker, name="rltoken-grader", daemon=True)
                thread.start()
                self._threads.append(thread)
            self._changed.notify_all()

    def _withdraw(self, jobs: set[_Job], error: BaseException | None = None) -> None:
        """Take what is left of some jobs from the queue, and wake who waits for them."""
        with self._changed:
            self._jobs -= jobs
            self._waiting = deque(chunk for chunk in self._waiting if chunk.job not in jobs)
            for job in jobs:
                job.error = job.error or error
                job.done.set()

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            self.closed = True
            self._withdraw(set(self._jobs), error)
            for process in self._processes:
                process.kill()
            self._changed.notify_all()

    def _own_worker(self) -> None:
        """Own one worker after the other, in a thread that ends with the pool: the kernel kills them with it."""
        # Blocked here, the signals are blocked in a worker from its first instruction on.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
        try:
            self._serve()
        except BaseException as error:
            self._stop(error)
            raise

    def _serve(self) -> None:
        """Take chunks until the pool is closed; a worker that was killed is replaced before there is more to do."""
        process, function = None, self._wanted()
        while function is not None and not self.closed:
            try:
                process = process or self._start()
                good, payload = process.load(function)
            except (EOFError, OSError) as error:
                process = self._end(process)
                self._blame(function, describe(error), failures=1)
                function = self._wanted()
                continue
            if not good:
                self._blame(function, payload.decode(errors="replace"), failures=START_ATTEMPTS)
                function = self._wanted()
            # No chunk is taken before the imports are done: meanwhile other workers may do it.
            elif (chunk := self._take(function)) is None:
                function = self._wanted()
            elif not self._grade(process, chunk):
                process = self._end(process)
        while process is not None:
            process = self._end(process)

    def _start(self) -> _Process:
        process = _Process(self.memory_mb)
        with self._changed:
            self._processes.add(process)
            if self.closed:
                process.kill()
        return process

    def _end(self, process: _Process | None) -> _Process | None:
        """End a worker; its successor, if it has one."""
        if process is None:
            return None
        with self._changed:
            self._processes.discard(process)
        process.end()
        return process.successor

    def _provide(self, process: _Process) -> None:
        """Start the successor of a worker that may have to be killed, so that its imports are done by then."""
        if process.successor is not None:
            return
        # A start that fails now is blamed on nobody: what needs the worker will try again.
        with contextlib.suppress(EOFError, OSError):
            process.successor = self._start()
            process.successor.prepare(process.function)

    def _wanted(self) -> bytes | None:
        """The pickled function of what waits longest, once there is something; None when the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.closed)
            return None if self.closed else self._waiting[0].job.function

    def _take(self, function: bytes) -> _Chunk | None:
        with self._changed:
            if self._waiting and self._waiting[0].job.function == function:
                return self._waiting.popleft()
            return None

    def _blame(self, function: bytes, detail: str, *, failures: int) -> None:
        """Count failed starts against the calls that wait for a function, and fail those that have met too many."""
        error = RuntimeError(f"no worker within {self.memory_mb} MB got ready for the function: {detail}")
        with self._changed:
            jobs = {chunk.job for chunk in self._waiting if chunk.job.function == function}
            for job in jobs:
                job.failed_starts += failures
            self._withdraw({job for job in jobs if job.failed_starts >= START_ATTEMPTS}, error)

    def _grade(self, process: _Process, chunk: _Chunk) -> bool:
        """Do a chunk, up to an item that costs the worker its life; whether the worker may go on."""
        for _, data in chunk.tasks:
            process.post("item", data)
        for position, (index, _) in enumerate(chunk.tasks, 1):
            result, alive = self._result(process)
            alive = alive and process.items < self.recycle_after and process.memory < self.memory_mb * 2**20 / 2
            with self._changed:
                wanted = chunk.job in self._jobs
                # What nobody waits for any more is in the worker's pipe and would still be done.
                alive = alive and wanted
                if wanted and not alive and position < len(chunk.tasks):
                    self._waiting.appendleft(_Chunk(chunk.job, chunk.tasks[position:]))
                    self._changed.notify_all()
                chunk.job.give(index, result)
            if not alive:
                break
        return alive

    def _result(self, process: _Process) -> tuple[Result, bool]:
        """The result of the item that a worker is at, and whether the worker lives."""
        try:
            try:
                good, payload = process.reply(self.seconds / 2)
            except TimeoutError:
                self._provide(process)
                good, payload = process.reply(self.seconds / 2)
        except TimeoutError:
            return Result(failure="timed_out", detail=f"no result within {self.seconds:g} s"), False
        except EOFError as error:
            return Result(failure="crashed", detail=str(error)), False
        process.items += 1
        if not good:
            return Result(failure="crashed", detail=payload.decode(errors="replace")), True
        try:
            return Result(pickle.loads(payload)), True
        except Exception as error:
            return Result(failure="crashed", detail=f"the value cannot be read: {describe(error)}"), True


def check(*, workers: int | None, **bounds: float) -> None:
    """Refuse settings of a pool that are out of range, also where no pool is needed yet.

    Args:
        workers: as in `shared`.
        bounds: `seconds`, `memory_mb`, `recycle_after` of `Pool`, by these names.

    Raises:
        UserError: naming the first setting that is no such number.
    """
    whole = isinstance(workers, int) and not isinstance(workers, bool) and 0 <= workers < MOST
    if workers is not None and not whole:
        raise UserError(f"workers: {workers!r} is no whole number from 0 on. Set 0 to grade in the process itself.")
    for name, number in bounds.items():
        real = isinstance(number, int | float) and not isinstance(number, bool)
        if not real or not 0 < number < MOST:
            raise UserError(f"{name}: {number!r} is no number above 0 and below {MOST}.")


def shared(*, workers: int | None = None, seconds: float = 5.0, memory_mb: int = 2048) -> Pool:
    """The one pool of this process with these settings; it ends with the process.

    Args:
        workers: as in `Pool`. None for the CPUs that this process may use, shared among the ranks of this machine
            (LOCAL_WORLD_SIZE): at least 1 and at most `MAX_WORKERS`. All of them, since a trainer waits while it
            grades. On other systems than Linux None is 0.
        seconds: the bound of one item.
        memory_mb: the bound of the address space of one worker, in MB.

    Returns:
        The pool, open.

    Raises:
        UserError: for a setting that is out of range.
    """
    # 1.0 and True would find the pool of 1.
    check(workers=workers, seconds=seconds, memory_mb=memory_mb)
    if workers is None and sys.platform != "linux":
        workers = 0
    elif workers is None:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = max(1, min(MAX_WORKERS, usable_cpus() // ranks))
    key = workers, seconds, memory_mb
    with _forking:
        if key not in _shared or _shared[key].closed:
            _shared[key] = Pool(workers=workers, seconds=seconds, memory_mb=memory_mb)
        return _shared[key]


def usable_cpus() -> int:
    """The CPUs that this process may run on, within the quota of its container."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return count if quota == "max" else min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


@dataclass(eq=False)
class _Job:
    """One call of `map`."""

    function: bytes
    results: list[Result | None]
    left: int = 0
    failed_starts: int = 0
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def pickled(self, index: int, item: Any) -> bytes | None:
        """The item as bytes; where that fails, its result is that it crashed."""
        try:
            return pickle.dumps(item)
        except Exception as error:
            self.results[index] = Result(failure="crashed", detail=f"the item cannot be sent: {describe(error)}")
            return None

    def give(self, index: int, result: Result) -> None:
        """Set the result of one item. Where there is one, other workers are able to start."""
        self.results[index] = result
        self.left -= 1
        self.failed_starts = 0
        if self.left == 0:
            self.done.set()


@dataclass(frozen=True)
class _Chunk:
    """Items of a job that one worker does in a row: their places in the job, and the items as bytes."""

    job: _Job
    tasks: list[tuple[int, bytes]]


class _Process:
    """A worker, and the messages to and from it: whatever it does, no exchange blocks for longer than its bound."""

    def __init__(self, memory_mb: int):
        # Without -P the folder of the worker's file, which has a math.py, would come before the standard library.
        command = [sys.executable, "-P", worker.__file__, str(os.getpid()), str(memory_mb)]
        environment = {name: value for name, value in os.environ.items() if name not in _DISTRIBUTED} | _ENVIRONMENT
        pipe = subprocess.PIPE
        # A fork meanwhile would keep the worker's ends of the pipes open, and its death would go unnoticed.
        with _forking:
            self._popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, env=environment)
        self._in, self._out = self._popen.stdin.fileno(), self._popen.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._memory_mb = memory_mb
        self._to_write, self._read = bytearray(pickle.dumps(sys.path)), bytearray()
        self.function: bytes | None = None
        self.successor: _Process | None = None
        self._prepared: bytes | None = None
        self.items = self.memory = 0

    def load(self, function: bytes) -> tuple[bool, bytes]:
        """Have the worker import a pickled function; as `reply`."""
        if function == self.function:
            return True, b""
        if self._prepared not in (None, function):
            self.reply(START_SECONDS)
        if self._prepared != function:
            self.post("function", function)
        self._prepared = None
        good, payload = self.reply(START_SECONDS)
        self.function = function if good else None
        return good, payload

    def prepare(self, function: bytes) -> None:
        """Have the worker begin to import a function, without waiting for it."""
        self.post("function", function)
        self._prepared = function
        self._exchange(0.0)

    def post(self, kind: str, data: bytes) -> None:
        """Queue a request, which the next `reply` sends."""
        self._to_write += pickle.dumps((kind, data))

    def reply(self, seconds: float) -> tuple[bool, bytes]:
        """The next reply: whether there is a value, and the pickled value or the text of the error.

        Raises:
            TimeoutError: if it is not there in time.
            EOFError: if the worker ended before.
        """
        deadline = time.monotonic() + seconds
        while (reply := self._complete()) is None:
            if not self._exchange(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"no result within {seconds:g} s")
        return reply

    def kill(self) -> None:
        """Kill the worker, from any thread."""
        self._popen.kill()

    def end(self) -> None:
        """Kill the worker and wait until it is gone."""
        self.kill()
        self._popen.wait()
        self.close()

    def close(self) -> None:
        """Close this process's ends of the pipes."""
        self._popen.stdin.close()
        self._popen.stdout.close()

    def _complete(self) -> tuple[bool, bytes] | None:
        """Take the next reply from what was read, if all of it is there."""
        if len(self._read) < REPLY.size:
            return None
        good, self.memory, length = REPLY.unpack_from(self._read)
        end = REPLY.size + length
        if len(self._read) < end:
            return None
        payload = bytes(self._read[REPLY.size : end])
        del self._read[:end]
        return good, payload

    def _exchange(self, seconds: float) -> bool:
        """Write and read once what is possible without blocking; False if that was nothing for so many seconds."""
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        if self._to_write:
            poll.register(self._in, select.POLLOUT)
        ready = {descriptor for descriptor, _ in poll.poll(math.ceil(seconds * 1000))}
        if self._in in ready:
            try:
                del self._to_write[: os.write(self._in, self._to_write)]
            except BrokenPipeError:  # what it answered before it ended can still be read
                self._to_write.clear()
        if self._out in ready:
            data = os.read(self._out, 65536)
            if not data:
                raise EOFError(self._fate())
            self._read += data
        return bool(ready)

    def _fate(self) -> str:
        """How a worker ended that closed its pipe."""
        try:
            status = self._popen.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "the worker closed its pipe"
        if status == OUT_OF_MEMORY:
            return f"out of memory: a worker may use {self._memory_mb} MB"
        if status >= 0:
            return f"the worker exited with status {status}"
        hint = "; is the machine out of memory?" if status == -signal.SIGKILL else ""
        return f"the worker was ended by signal {-status} ({signal.strsignal(-status)}){hint}"


def _call_here(function: Callable, item: Any, seconds: float) -> Result:
    """The result of one item, in this process."""
    try:
        with _alarm(seconds):
            return Result(function(item))
    except _OutOfTime:
        return Result(failure="timed_out", detail=f"no result within {seconds:g} s")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Result(failure="crashed", detail=describe(error))


class _OutOfTime(BaseException):
    """No `Exception`, so that the function does not swallow it."""


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `_OutOfTime` after so many seconds, where signals can be received: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise _OutOfTime

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_shared: dict[tuple[int, float, int], Pool] = {}
_forking = threading.Lock()


def _after_fork() -> None:
    """In a forked process, leave the workers to the parent: their pipes, and the threads and locks that are gone."""
    _shared.clear()
    for pool in list(_pools):
        for process in pool._processes:
            process.close()
        pool._reset()
    _forking.release()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_after_fork)
