"""The grader pool where nothing hangs: order, values, errors as results, the cache, the serial mode, its settings.

The graded function is mostly `eval`, so that an item says what is to happen in a worker.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from pathlib import Path

import pytest

from rltoken.errors import UserError
from rltoken.rewards import grader
from rltoken.rewards.grader import Pool, Result, shared

ROOT = Path(__file__).resolve().parents[2]
PID = "__import__('os').getpid()"


@pytest.fixture(scope="module")
def pool():
    pool = Pool(workers=2, seconds=30)
    yield pool
    pool.close()


@pytest.fixture
def make():
    """A pool of the test's own, closed after it."""
    pools = []

    def make(**settings):
        pools.append(Pool(**({"seconds": 30} | settings)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def values(results):
    assert [result.failure for result in results] == [None] * len(results)
    return [result.value for result in results]


def counting(path, value):
    """An item that leaves a mark in a file each time it is done."""
    return f"[open({str(path)!r}, 'a').write('x'), {value}][-1]"


@pytest.mark.parametrize("count", [0, 1, 7, 500])
def test_results_have_the_order_of_the_items(pool, count):
    assert pool.map(eval, [f"{n} ** 2" for n in range(count)]) == [Result(n**2) for n in range(count)]


def test_both_workers_work(pool):
    pids = set(values(pool.map(eval, [f"[__import__('time').sleep(0.2), {PID}][-1]"] * 8)))
    assert len(pids) == 2 and os.getpid() not in pids


def test_an_exception_is_a_crash_of_its_item_only_and_costs_no_worker(make):
    pool = make(workers=1)
    before, error, nameless, endless, exit_like, after = pool.map(
        eval,
        [PID, "1 / 0", "next(iter(()))", "(lambda f: f(f))(lambda f: f(f))", "[].throw_", PID],
    )
    assert (error.failure, error.detail) == ("crashed", "ZeroDivisionError: division by zero")
    assert (nameless.failure, nameless.detail) == ("crashed", "StopIteration")
    assert endless.failure == "crashed" and endless.detail.startswith("RecursionError: ")
    assert exit_like.detail == "AttributeError: 'list' object has no attribute 'throw_'"
    assert before.value == after.value


def test_a_detail_is_one_short_line(pool):
    (result,) = pool.map(exec, ["raise ValueError('first ' + 'x' * 1000 + '\\nsecond')"])
    assert result.detail.startswith("ValueError: first xxx") and len(result.detail) <= 200 and "\n" not in result.detail


def test_an_error_without_a_readable_message_is_named_by_its_class(pool):
    source = "class Odd(BaseException):\n    def __str__(self):\n        return 1 / 0\nraise Odd"
    assert pool.map(exec, [source]) == [Result(failure="crashed", detail="Odd")]


@pytest.mark.parametrize(
    ("item", "detail"),
    [
        ("lambda: 0", "PicklingError: "),
        ("type('R', (), {'__reduce__': lambda self: (int, ('x',))})()", "the value cannot be read: ValueError: "),
    ],
)
def test_a_value_that_cannot_come_back_is_a_crash(pool, item, detail):
    first, second = pool.map(eval, [item, "2"])
    assert first.failure == "crashed" and first.detail.startswith(detail)
    assert second == Result(2)


def test_an_item_that_cannot_be_sent_is_a_crash(pool):
    first, second, third = pool.map(str, [1, threading.Lock(), 3])
    assert second.failure == "crashed" and second.detail.startswith("the item cannot be sent: TypeError: ")
    assert (first, third) == (Result("1"), Result("3"))


def test_large_items_and_values_pass_both_pipes_at_once(pool):
    items = [bytes([n]) * 3_000_000 for n in range(8)]
    assert values(pool.map(bytes, items)) == items


def test_a_worker_warms_up_before_the_clock_of_its_first_item_starts(tmp_path, monkeypatch):
    source = (
        "import time\nready = []\ndef warm_up(): time.sleep(1.5); ready.append(1)\ndef count(_): return len(ready)\n"
    )
    (tmp_path / "slow_to_start.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import slow_to_start

    pool = Pool(workers=1, seconds=1.0)
    assert pool.map(slow_to_start.count, [1, 2]) == [Result(1), Result(1)]
    pool.close()


def test_what_the_function_prints_goes_to_standard_error():
    source = """
from rltoken.rewards.grader import Pool
pool = Pool(workers=1)
print([r.value for r in pool.map(eval, ["print('aside')", "__import__('os').write(1, b'raw')", "1 + 1"])])
"""
    done = subprocess.run([sys.executable, "-c", source], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "[None, 3, 2]\n"
    assert "aside" in done.stderr and "raw" in done.stderr


def environment(**extra):
    return os.environ | {"PYTHONPATH": str(ROOT)} | extra


def test_the_function_cannot_read_the_requests(pool):
    assert values(pool.map(eval, ["__import__('sys').stdin.read()", "open(0, closefd=False).read()"])) == ["", ""]


def test_equal_items_are_done_once(pool, tmp_path):
    item = counting(tmp_path / "marks", 5)
    assert values(pool.map(eval, [item, "6", item, item], cache=True)) == [5, 6, 5, 5]
    assert values(pool.map(eval, [item], cache=True)) == [5]
    assert (tmp_path / "marks").read_text() == "x"
    assert values(pool.map(eval, [item, item])) == [5, 5]
    assert (tmp_path / "marks").read_text() == "xxx"


def test_a_result_is_known_for_its_function_only(pool):
    assert values(pool.map(eval, ["'1'"], cache=True)) == ["1"]
    assert values(pool.map(len, ["'1'"], cache=True)) == [3]


def test_repeats_do_not_reach_the_workers():
    pool = Pool(workers=1)
    items = ["1 + 1", "2 + 2"]
    assert values(pool.map(eval, items, cache=True)) == [2, 4]
    pool.close()
    assert values(pool.map(eval, items * 100, cache=True)) == [2, 4] * 100


def test_a_failure_is_kept_for_a_while(pool, tmp_path, monkeypatch):
    item = counting(tmp_path / "marks", "1 / 0")
    failed = Result(failure="crashed", detail="ZeroDivisionError: division by zero")
    assert pool.map(eval, [item, item], cache=True) + pool.map(eval, [item], cache=True) == [failed] * 3
    assert (tmp_path / "marks").read_text() == "x"
    later = time.monotonic() + grader.RETRY_AFTER + 1
    monkeypatch.setattr(grader.time, "monotonic", lambda: later)
    assert pool.map(eval, [item], cache=True) == [failed]
    assert (tmp_path / "marks").read_text() == "xx"


def test_the_least_recently_used_result_is_forgotten_first(make, tmp_path, monkeypatch):
    monkeypatch.setattr(grader, "CACHE_SIZE", 2)
    pool = make(workers=0)
    first, second, third = (counting(tmp_path / name, 0) for name in "abc")
    for item in (first, second, first, third, first, second):
        pool.map(eval, [item], cache=True)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["x", "xx", "x"]


def test_serial_mode_stays_in_this_process(make):
    results = make(workers=0).map(eval, [PID, "1 / 0", "exit(3)", "2"])
    assert results[0] == Result(os.getpid()) and results[3] == Result(2)
    assert [(result.failure, result.detail) for result in results[1:3]] == [
        ("crashed", "ZeroDivisionError: division by zero"),
        ("crashed", "SystemExit: 3"),
    ]


def test_serial_mode_has_a_time_limit_and_gives_the_alarm_back(make):
    rang = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.6)
        stuck, fine = make(workers=0, seconds=0.2).map(eval, ["[0 for _ in iter(int, 1)]", "1"])
        assert (stuck.failure, stuck.detail) == ("timed_out", "no result within 0.2 s")
        assert fine == Result(1) and not rang
        time.sleep(0.8)
        assert rang == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_serial_mode_works_in_a_thread_without_a_limit(make):
    results = []
    pool = make(workers=0, seconds=0.01)
    thread = threading.Thread(target=lambda: results.extend(pool.map(eval, ["__import__('time').sleep(0.1)", "1"])))
    thread.start()
    thread.join()
    assert results == [Result(None), Result(1)]


def interrupt(_):
    raise KeyboardInterrupt


def test_serial_mode_lets_the_user_interrupt(make):
    with pytest.raises(KeyboardInterrupt):
        make(workers=0).map(interrupt, [1])
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_shared_is_one_pool_per_settings(monkeypatch):
    first = shared(workers=1, seconds=7)
    assert shared(workers=1, seconds=7) is first
    assert shared(workers=1, seconds=8) is not first
    assert values(first.map(eval, ["1 + 1"])) == [2]
    first.close()
    assert values(shared(workers=1, seconds=7).map(eval, ["1 + 1"])) == [2]
    shared(workers=1, seconds=7).close()


@pytest.mark.parametrize(("cpus", "ranks", "workers"), [(2, None, 2), (16, 2, 8), (16, 4, 4), (2, 8, 1), (128, 8, 8)])
def test_the_ranks_of_a_machine_share_its_cpus(monkeypatch, cpus, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert shared(seconds=9).workers == workers


@pytest.mark.parametrize("setting", [{"workers": -1}, {"seconds": 0}, {"memory_mb": 0}, {"recycle_after": 0}])
def test_a_number_out_of_range_is_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        Pool(**({"workers": 1} | setting))


@pytest.mark.parametrize("workers", [True, 1.5, 1.0, "1", -1])
def test_workers_of_another_type_find_no_shared_pool(workers):
    shared(workers=1, seconds=7)
    with pytest.raises(UserError, match="workers: "):
        shared(workers=workers, seconds=7)


def test_a_function_of_the_main_module_is_refused(pool):
    function = types.FunctionType(interrupt.__code__, {"__name__": "__main__"})
    with pytest.raises(ValueError, match="main module"):
        pool.map(function, [1])


def test_a_function_that_workers_cannot_import_is_an_error_and_not_a_verdict(pool, monkeypatch):
    module = types.ModuleType("only_here")
    exec("def judge(item): return item", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(RuntimeError, match="No module named 'only_here'"):
        pool.map(module.judge, [1, 2, 3])
    assert values(pool.map(eval, ["1 + 1"])) == [2]


def test_a_closed_pool_refuses(make):
    pool = make(workers=1)
    assert values(pool.map(eval, ["1"])) == [1]
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.map(eval, ["1"])


def test_workers_find_what_this_process_finds(make, tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text("def judge(item):\n    return item + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import my_judge

    assert values(make(workers=1).map(my_judge.judge, [1, 2])) == [2, 3]


def test_a_worker_is_a_bare_interpreter(make, monkeypatch):
    for name, text in {"RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, text)
    names = ["RANK", "LOCAL_RANK", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONHASHSEED"]
    items = [f"__import__('os').environ.get({name!r})" for name in names]
    modules = "sorted({name.partition('.')[0] for name in __import__('sys').modules})"
    *variables, loaded = values(make(workers=1).map(eval, [*items, modules]))
    assert variables == [None, None, "1", "", "0"]
    assert not {"torch", "numpy", "sympy", "pytest", "rltoken", "rewards", "multiprocessing"} & set(loaded)


def test_rewards_need_no_torch():
    source = "import sys, rltoken.rewards.grader; print([m for m in ('torch', 'sympy', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", source], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_worker_is_replaced_after_its_share_of_items(make):
    pids = values(make(workers=1, recycle_after=3).map(eval, [PID] * 10))
    assert sorted(Counter(pids).values()) == [1, 3, 3, 3]


def test_each_thread_gets_its_own_results(pool):
    found = {}

    def grade(thread):
        found[thread] = [values(pool.map(eval, [f"({thread}, {turn}, {n})" for n in range(5)])) for turn in range(10)]

    threads = [threading.Thread(target=grade, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {t: [[(t, turn, n) for n in range(5)] for turn in range(10)] for t in range(6)}


def test_different_functions_share_the_workers(pool):
    results, threads = {}, []
    for function in (len, str, list):
        threads.append(threading.Thread(target=lambda f=function: results.update({f: pool.map(f, ["ab"] * 50)})))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert results == {f: [Result(f("ab"))] * 50 for f in (len, str, list)}


def test_two_ranks_grade_side_by_side():
    source = f"""
import json
from rltoken.rewards.grader import shared
pool = shared(seconds=30)
print(json.dumps([pool.workers, [r.value for r in pool.map(eval, [{PID!r}] * 20)]]))
"""
    settings = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", source], env=environment(RANK=rank, **settings), stdout=subprocess.PIPE)
        for rank in "01"
    ]
    (workers, pids), (other_workers, other_pids) = (json.loads(rank.communicate(timeout=60)[0]) for rank in ranks)
    assert workers == other_workers == max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    assert not set(pids) & set(other_pids)


def test_a_quota_of_the_container_bounds_the_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for text, count in (("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("odd", 8)):
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text, **__: text)
        assert grader.usable_cpus() == count


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_bound_that_is_none_is_refused(seconds):
    with pytest.raises(UserError, match="seconds: "):
        Pool(workers=1, seconds=seconds)
