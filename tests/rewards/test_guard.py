"""A user's own reward function: what it raises and returns, alone and through a trainer's call."""

import asyncio
import functools

import pytest

from rltoken.errors import UserError
from rltoken.rewards.guard import guarded

COLUMNS = {"completions": ["one", "two", "three"], "answer": ["1", "2", "3"], "id": ["a", "b", "c"]}


def lengths(completions, answer, *, bad="two", **_):
    if bad in completions:
        raise KeyError("no such word")
    return [float(len(text)) for text in completions]


async def lengths_async(completions, answer, **_):
    await asyncio.sleep(0)
    return lengths(completions, answer)


class Logged:
    """What TRL hands to reward functions for logging."""

    def __init__(self):
        self.metrics = []

    def columns(self):
        return COLUMNS | {"log_metric": lambda name, value: self.metrics.append((name, value))}


def called(func, columns):
    found = func(**columns)
    return asyncio.run(found) if asyncio.iscoroutine(found) else found


def test_what_a_function_returns_is_passed_on():
    func = guarded(functools.partial(lengths, bad="four"), name="length")
    assert func.__name__ == "length"
    assert func(**COLUMNS) == [3.0, 3.0, 5.0]
    assert guarded(lambda completions, **_: [None, float("nan"), True], name="mixed")(**COLUMNS) == [None, None, 1.0]


@pytest.mark.parametrize("func", [lengths, lengths_async])
def test_an_exception_names_the_sample_and_prints_its_traceback_once(func, capsys):
    made = guarded(func, name="length")
    message = r"reward\.funcs\.length: raised KeyError: 'no such word' for the sample id=b \('two'\); .*on_error=crash"
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            called(made, COLUMNS)
    assert capsys.readouterr().err.count("Traceback") == 1


@pytest.mark.parametrize("func", [lengths, lengths_async])
def test_a_crash_costs_the_sample_only_and_is_counted(func, capsys):
    logged = Logged()
    assert called(guarded(func, name="length", on_error="crash"), logged.columns()) == [3.0, None, 5.0]
    assert logged.metrics == [("length/crashed", 1 / 3)]
    assert "KeyError" in capsys.readouterr().err


def test_what_a_function_logs_is_logged_once():
    def telling(completions, log_metric, **_):
        log_metric("seen", float(len(completions)))
        return lengths(completions, None)

    logged = Logged()
    guarded(telling, name="told", on_error="crash")(**logged.columns())
    assert logged.metrics == [("seen", 3.0), ("told/crashed", 1 / 3)]


def test_a_function_that_takes_samples_only_together_is_told_so():
    def together(completions, **_):
        if len(completions) > 1:
            raise ValueError("too many")
        return [0.0]

    with pytest.raises(UserError, match=r"raised ValueError: too many for 3 completions, but for none of them alone"):
        guarded(together, name="few", on_error="crash")(**COLUMNS)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"reward\.funcs\.own: returned None; return a list of 3 rewards"),
        ([1.0, 2.0], r"reward\.funcs\.own: returned 2 rewards for 3 completions; return one for each"),
        ([1.0, "high", 0.0], r"reward\.funcs\.own: returned 'high' for the sample id=b"),
        ([1.0, 0.0, float("inf")], r"returned inf for the sample id=c .*; return a finite number, or None"),
    ],
)
def test_what_is_no_reward_is_refused(returned, message):
    with pytest.raises(UserError, match=message):
        guarded(lambda **_: returned, name="own")(**COLUMNS)
