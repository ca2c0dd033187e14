"""The grader pool under faults: hangs in C code, crashes, memory, bad starts, forks, and every end of the parent.

The graded function is mostly `eval`, so that an item says what is to happen in a worker.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rltoken.rewards import grader
from rltoken.rewards.grader import Pool, Result

ROOT = Path(__file__).resolve().parents[2]
PID = "__import__('os').getpid()"
STUCK = "7 ** 10**9 > 0"
"""One call into C that takes hours and looks at no signal."""
KEEPS_ALL = "__import__('sys').modules.update(kept=__import__('functools').reduce(lambda a, b: [a], iter(int, 1)))"
TIMED_OUT = Result(failure="timed_out", detail="no result within 1.5 s")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and relies on PR_SET_PDEATHSIG")


@pytest.fixture
def make():
    """A pool of the test's own, closed after it."""
    pools = []

    def make(**settings):
        pools.append(Pool(**({"workers": 2, "seconds": 1.5} | settings)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def start(tmp_path):
    """Start a Python program elsewhere than in the repository; it finds the package by PYTHONPATH only.

    Workers that outlive it are killed: they hold its output open, and a test would hang where it is to fail.
    """
    programs = []

    def start(source):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        programs.append(subprocess.Popen([sys.executable, "-c", source], env=environment, cwd=tmp_path, **pipes))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()
        kill_workers_of(program.pid)
        program.communicate()


def values(results):
    assert [result.failure for result in results] == [None] * len(results)
    return [result.value for result in results]


def parent_of(pid):
    """The id of the parent of a process, or None if it has ended, be it reaped or not."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(parent)


def children(parent):
    return {int(entry) for entry in os.listdir("/proc") if entry.isdigit() and parent_of(entry) == parent}


def kill_workers_of(pid):
    """Kill the workers that a process has started, wherever they are now."""
    command = f"{grader.worker.__file__}\0{pid}\0".encode()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            if command in Path(f"/proc/{entry}/cmdline").read_bytes():
                os.kill(int(entry), signal.SIGKILL)


def alive(pids):
    return {pid for pid in pids if parent_of(pid) is not None}


def wait_until(condition, seconds):
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def marked(path, then):
    """An item that makes a file when a worker begins it."""
    return f"[open({str(path)!r}, 'w').close(), {then}][-1]"


def test_an_item_stuck_in_c_code_is_killed_at_the_bound_and_the_others_go_on(make):
    pool = make()
    before = set(values(pool.map(eval, [f"[__import__('time').sleep(0.2), {PID}][-1]"] * 8)))
    started = time.monotonic()
    results = pool.map(eval, [*map(str, range(20)), STUCK, *map(str, range(20, 100))])
    assert results.pop(20) == TIMED_OUT
    assert results == [Result(n) for n in range(100)]
    assert 1.5 <= time.monotonic() - started < 4
    after = set(values(pool.map(eval, [f"[__import__('time').sleep(0.2), {PID}][-1]"] * 8)))
    assert len(before) == len(after) == 2 and len(before & after) == 1
    assert not alive(before - after)


def test_a_stuck_worker_s_successor_is_ready_at_the_bound(make):
    others = children(os.getpid())  # of pools of other tests
    pool = make(workers=1, seconds=4.0)
    (first,) = values(pool.map(eval, [PID]))
    results = []
    thread = threading.Thread(target=lambda: results.extend(pool.map(eval, [STUCK, PID])))
    thread.start()
    assert wait_until(lambda: len(children(os.getpid()) - others) == 2 or not thread.is_alive(), 20)
    seen = children(os.getpid()) - others
    thread.join()
    assert first in seen
    assert results[0].failure == "timed_out" and {results[1].value} == seen - {first}
    assert wait_until(lambda: not alive({first}), 5)


def test_a_slow_item_s_successor_waits_and_does_other_functions_too(make):
    others = children(os.getpid())
    pool = make(workers=1, seconds=2.0)
    slow = "__import__('time').sleep(1.5)"
    assert values(pool.map(eval, [slow, slow])) == [None, None]
    workers = children(os.getpid()) - others
    assert len(workers) == 2
    assert [result.failure for result in pool.map(eval, [STUCK])] == ["timed_out"]
    assert values(pool.map(abs, [-3])) == [3]
    assert values(pool.map(eval, [PID]))[0] in workers
    pool.close()
    assert not alive(workers)


def test_each_stuck_item_of_a_chunk_is_found(make):
    results = make().map(eval, ["1", STUCK, "2", STUCK, "3", "4"])
    assert results == [Result(1), TIMED_OUT, Result(2), TIMED_OUT, Result(3), Result(4)]


def test_the_bound_is_one_item_s_and_not_that_of_a_call(make):
    assert values(make(workers=1).map(eval, ["__import__('time').sleep(0.4)"] * 6)) == [None] * 6


def test_a_stuck_item_is_paid_for_once(make):
    pool, started = make(), time.monotonic()
    assert pool.map(eval, [STUCK] * 20, cache=True) + pool.map(eval, [STUCK], cache=True) == [TIMED_OUT] * 21
    assert time.monotonic() - started < 2.9


def test_another_call_does_not_wait_for_a_stuck_item(make, tmp_path):
    pool, results = make(seconds=2.5), []
    thread = threading.Thread(target=lambda: results.extend(pool.map(eval, [marked(tmp_path / "mark", STUCK)])))
    thread.start()
    assert wait_until((tmp_path / "mark").exists, 10)
    started = time.monotonic()
    assert values(pool.map(eval, ["1"] * 50)) == [1] * 50
    assert time.monotonic() - started < 2
    thread.join()
    assert [result.failure for result in results] == ["timed_out"]


@pytest.mark.parametrize(
    ("item", "detail"),
    [
        ("__import__('os').abort()", "the worker was ended by signal 6 (Aborted)"),
        ("__import__('ctypes').string_at(0)", "the worker was ended by signal 11 (Segmentation fault)"),
        (
            f"__import__('os').kill({PID}, 9)",
            "the worker was ended by signal 9 (Killed); is the machine out of memory?",
        ),
        ("__import__('sys').exit(3)", "the worker exited with status 3"),
        ("__import__('os')._exit(0)", "the worker exited with status 0"),
        ("__import__('os').closerange(3, 64) or __import__('time').sleep(60)", "the worker closed its pipe"),
    ],
)
def test_a_crash_is_its_item_s_and_the_worker_is_replaced(make, item, detail):
    pool = make(workers=1, seconds=30)
    first, crashed, second = pool.map(eval, [PID, item, PID])
    assert crashed == Result(failure="crashed", detail=detail)
    assert first.value != second.value
    assert wait_until(lambda: not alive({first.value}), 2)


def test_many_crashes_leave_the_other_verdicts(make):
    results = make().map(eval, ["__import__('os').abort()" if n % 10 == 3 else str(n) for n in range(60)])
    assert [result.failure for result in results] == ["crashed" if n % 10 == 3 else None for n in range(60)]
    assert all(result.value == n for n, result in enumerate(results) if n % 10 != 3)


@pytest.mark.parametrize("item", ["bytearray(10**9)", "1 << 10**10", "[[n] for n in range(10**8)]", KEEPS_ALL])
def test_memory_is_bounded(make, item):
    out_of_memory = Result(failure="crashed", detail="out of memory: a worker may use 200 MB")
    assert make(seconds=30, memory_mb=200).map(eval, ["1", item, "2"]) == [Result(1), out_of_memory, Result(2)]


def test_math_verify_fits_in_a_fraction_of_the_default_memory(make):
    from math_verify import parse

    (result,) = make(workers=1, seconds=30, memory_mb=256).map(parse, [r"$\frac{1}{2}$"])
    assert result.failure is None and str(result.value[0]) == "1/2"


def test_a_leaking_worker_is_replaced_before_it_runs_out(make):
    leak = (
        f"[__import__('sys').modules.update({{str(__import__('random').random()): bytearray(3 * 10**7)}}), {PID}][-1]"
    )
    pids = values(make(workers=1, seconds=30, memory_mb=256).map(eval, [leak] * 12))
    assert 2 <= len(set(pids)) <= 6


def test_imports_for_the_function_do_not_count(make, tmp_path, monkeypatch):
    (tmp_path / "slow_judge.py").write_text(
        "import sys, time\nif 'pytest' not in sys.modules:\n    time.sleep(1)\ndef judge(item):\n    return item\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import slow_judge

    started = time.monotonic()
    assert values(make(seconds=0.5).map(slow_judge.judge, [1, 2, 3])) == [1, 2, 3]
    assert time.monotonic() - started > 1


@pytest.mark.parametrize(
    ("program", "detail"), [("exec sleep 60", "no result within 0.3 s"), ("exit 7", "exited with status 7")]
)
def test_workers_that_never_come_up_are_an_error_and_no_hang(make, tmp_path, monkeypatch, program, detail):
    executable = tmp_path / "python"
    executable.write_text(f"#!/bin/sh\n{program}\n")
    executable.chmod(0o755)
    pool = make()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(executable))
        patched.setattr(grader, "START_SECONDS", 0.3)
        with pytest.raises(RuntimeError, match=detail):
            pool.map(eval, ["1"] * 20)
    assert values(pool.map(eval, ["1"] * 20)) == [1] * 20


def test_too_little_memory_for_the_imports_is_an_error_that_says_so(make):
    from math_verify import parse

    with pytest.raises(RuntimeError, match=r"no worker within 20 MB got ready .*: out of memory"):
        make(memory_mb=20).map(parse, ["1"])


def test_an_error_of_the_pool_itself_reaches_the_caller(make, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Pool, "_take", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        make().map(eval, ["1"] * 20)


def test_signals_for_the_trainer_leave_a_worker_alone(make):
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
    pool = make(workers=1)
    first, *_, last = values(pool.map(eval, [PID, *(f"__import__('os').kill({PID}, {n:d})" for n in signals), PID]))
    assert first == last


def test_a_call_that_was_interrupted_leaves_the_pool_usable(make):
    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    pool = make(workers=1)
    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.4)
        with pytest.raises(Interrupted):
            pool.map(eval, ["__import__('time').sleep(1)"] * 50)
    finally:
        signal.signal(signal.SIGALRM, handler)
    started = time.monotonic()
    assert values(pool.map(eval, ["1 + 1"])) == [2]
    assert time.monotonic() - started < 3


def test_closing_kills_a_stuck_worker_and_tells_who_waits(make, tmp_path):
    pool, errors, others = make(seconds=60), [], children(os.getpid())

    def grade():
        try:
            pool.map(eval, [marked(tmp_path / "mark", STUCK), *["1"] * 20])
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=grade)
    thread.start()
    assert wait_until((tmp_path / "mark").exists, 10)
    before, started = children(os.getpid()) - others, time.monotonic()
    pool.close()
    thread.join()
    assert time.monotonic() - started < 2
    assert errors == ["the grader pool was closed"]
    assert before and not before & children(os.getpid())


def test_a_pool_outlives_the_thread_that_used_it_first(make):
    pool, pids = make(workers=1), []
    thread = threading.Thread(target=lambda: pids.extend(values(pool.map(eval, [PID]))))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert values(pool.map(eval, [PID])) == pids


def test_a_forked_process_has_workers_of_its_own(make):
    pool = make(seconds=30)
    mine = set(values(pool.map(eval, [f"[__import__('time').sleep(0.1), {PID}][-1]"] * 8)))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            theirs = {result.value for result in pool.map(eval, [PID] * 20)}
            os.write(writing, b"own" if theirs and not theirs & mine else b"shared")
        finally:
            os._exit(0)
    os.close(writing)
    here = set(values(pool.map(eval, [PID] * 50)))
    with os.fdopen(reading) as answer:
        assert answer.read() == "own"
    os.waitpid(child, 0)
    assert here <= mine


def test_forks_while_workers_start_do_not_hide_their_deaths(make, monkeypatch):
    class SlowPopen(subprocess.Popen):
        def _get_handles(self, *arguments):
            handles = super()._get_handles(*arguments)
            time.sleep(0.05)
            return handles

    monkeypatch.setattr(subprocess, "Popen", SlowPopen)
    pool, results = make(recycle_after=5), []
    items = ["__import__('os').abort()" if n % 50 == 7 else "1" for n in range(100)]
    thread = threading.Thread(target=lambda: results.extend(pool.map(eval, items)))
    thread.start()
    forked = []
    while thread.is_alive() and len(forked) < 100:
        if (child := os.fork()) == 0:
            time.sleep(3)
            os._exit(0)
        forked.append(child)
        time.sleep(0.01)
    thread.join()
    for child in forked:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert forked
    assert [result.failure for result in results] == ["crashed" if n % 50 == 7 else None for n in range(100)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_works_under_multiprocessing(make, method):
    assert values(make(workers=1).map(eval, ["1"])) == [1]
    grade = "__import__('rltoken.rewards.grader', fromlist=['x']).shared(workers=1).map(eval, ['6 * 7'])"
    with multiprocessing.get_context(method).Pool(1) as processes:
        assert processes.apply_async(eval, (grade,)).get(timeout=60) == [Result(42)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_a_parent_that_a_signal_ends(start, tmp_path, number):
    program = start(f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from rltoken.rewards.grader import Pool
Pool(workers=2, seconds=60).map(eval, [{marked(tmp_path / "one", STUCK)!r}, {marked(tmp_path / "two", STUCK)!r}])
""")
    assert wait_until(lambda: (tmp_path / "one").exists() and (tmp_path / "two").exists(), 20)
    workers = children(program.pid)
    assert len(workers) == 2
    program.send_signal(number)
    program.wait(timeout=5)
    assert wait_until(lambda: not alive(workers), 2)


@pytest.mark.parametrize(
    ("end", "status"), [("pass", 0), ("sys.exit(5)", 5), ("raise ValueError", 1), ("os._exit(6)", 6)]
)
@pytest.mark.parametrize("stuck", [False, True])
def test_no_worker_outlives_a_parent_that_ends_by_itself(start, tmp_path, end, status, stuck):
    program = start(f"""
import os, sys, threading, time
from rltoken.rewards.grader import shared
pool = shared(workers=2, seconds=60)
print(*[result.value for result in pool.map(eval, ["[__import__('time').sleep(0.2), {PID}][-1]"] * 4)], flush=True)
if {stuck}:
    item = {marked(tmp_path / "mark", STUCK)!r}
    threading.Thread(target=pool.map, args=(eval, [item]), daemon=True).start()
    while not os.path.exists({str(tmp_path / "mark")!r}):
        time.sleep(0.01)
{end}
""")
    output, errors = program.communicate(timeout=20)
    workers = set(map(int, output.split()))
    assert len(workers) == 2
    assert program.returncode == status
    assert wait_until(lambda: not alive(workers), 2)
    assert errors == b"" if status != 1 else b"ValueError" in errors


@pytest.mark.parametrize("first", ["shared(workers=1).map(eval, ['1'])", "atexit.register(grade)"])
def test_a_pool_works_in_an_exit_handler(start, first):
    """Before the handler is registered or after it."""
    second = {"a": "shared(workers=1).map(eval, ['1'])", "s": "atexit.register(grade)"}[first[0]]
    program = start(f"""
import atexit
from rltoken.rewards.grader import shared
def grade():
    print(shared(workers=1).map(eval, ["6 * 7"])[0].value)
{first}
{second}
""")
    output, _ = program.communicate(timeout=20)
    assert output == b"42\n"


def test_a_worker_whose_parent_ended_before_it_was_watched_ends_at_once():
    command = [sys.executable, "-P", grader.worker.__file__, str(os.getppid()), "2048"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as started:
        try:
            assert started.wait(timeout=20) == 1
        finally:
            started.kill()


def test_ctrl_c_ends_stuck_workers_at_once_and_the_next_pool_is_a_new_one():
    pool = grader.shared(workers=2, seconds=600)
    threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pool.map(eval, [STUCK, STUCK])
    for thread in pool._threads:
        thread.join(timeout=5)
    assert pool.closed and not pool._processes and time.monotonic() - started < 7
    assert grader.shared(workers=2, seconds=600).map(eval, ["1 + 1"]) == [Result(2)]
