"""A user's own reward function: what it raises and returns, alone and through a trainer's call."""

import asyncio
import functools

import pytest

from rltoken.errors import UserError
from rltoken.rewards.guard import guarded
from rltoken.rewards.math import accuracy

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


def leaves(completions, **_):
    if "two" in completions:
        raise SystemExit(3)
    return [1.0] * len(completions)


async def leaves_async(completions, **_):
    return leaves(completions)


@pytest.mark.parametrize("func", [leaves, leaves_async])
def test_a_function_that_exits_is_told_like_one_that_raises(func, capsys):
    with pytest.raises(UserError, match=r"reward\.funcs\.exits: raised SystemExit: 3 for the sample id=b"):
        called(guarded(func, name="exits"), COLUMNS)
    assert called(guarded(func, name="exits", on_error="crash"), COLUMNS) == [1.0, None, 1.0]
    assert "SystemExit: 3" in capsys.readouterr().err


def test_ctrl_c_passes():
    def interrupted(**_):
        raise KeyboardInterrupt

    for on_error in ("stop", "crash"):
        with pytest.raises(KeyboardInterrupt):
            guarded(interrupted, name="own", on_error=on_error)(**COLUMNS)


class Near:
    """A reward with a setting and no name of its own: an object."""

    def __init__(self, target, *, steepness=1.0):
        self.target, self.steepness = target, steepness

    def __call__(self, completions, **_):
        return [-self.steepness * abs(len(text) - self.target) for text in completions]


class NearAsync(Near):
    async def __call__(self, completions, **_):
        return Near.__call__(self, completions)


@pytest.mark.parametrize("made", [Near(4), NearAsync(4)])
def test_an_object_of_a_class_is_a_function(made):
    func = guarded(made, name="near")
    assert func.__name__ == "near" and called(func, COLUMNS) == [-1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("func", "message"),
    [
        (lambda completions: [], r"own: its signature \(completions\) .* add the parameter \*\*columns at its end"),
        (functools.partial(lambda completions, most: [], most=1), r"own: .*add the parameter \*\*columns"),
        (functools.partial(Near, target=4), r"own: a class needs no _partial_"),
        (Near, r"own: a class needs no _partial_"),
        ([1.0], r"own: \[1\.0\] is no function; give it a _target_ and, .*_partial_: true"),
    ],
)
def test_what_cannot_be_called_with_every_column_is_refused_before_it_is(func, message):
    with pytest.raises(UserError, match=rf"reward\.funcs\.{message}"):
        guarded(func, name="own")


@pytest.mark.parametrize("on_error", ["stop", "crash"])
def test_a_parameter_that_no_column_fills_is_no_samples_fault(on_error, capsys):
    def graded(completions, answers, **_):
        return [0.0] * len(completions)

    message = r"nothing fills its parameter 'answers' \(did you mean 'answer'\?\); there are: completions, "
    with pytest.raises(UserError, match=message):
        guarded(graded, name="own", on_error=on_error)(**COLUMNS)
    assert guarded(functools.partial(graded, answers=1), name="own")(**COLUMNS) == [0.0] * 3
    assert not capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bda": "x"}, r"reward\.funcs\.x\.bda: it has no such parameter \(did you mean 'bad'\?\); remove it"),
        ({"answr": "x"}, r"reward\.funcs\.x\.answr: .*did you mean 'answer'"),
    ],
)
def test_a_misspelt_setting_is_not_swallowed_by_columns(settings, message):
    with pytest.raises(UserError, match=message):
        guarded(functools.partial(lengths, **settings), name="x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": "abc"}, r"funcs\.accuracy\.tolerance: 'abc' is not possible; .*from 0, or to null"),
        ({"tolerance": -1}, "tolerance: -1 is not possible"),
        ({"bare_percent": "maybe"}, "bare_percent: 'maybe' is neither true nor false"),
        ({"on_failure": "yes"}, "on_failure: 'yes' is not possible"),
    ],
)
def test_settings_that_make_no_sense_are_refused_when_rewards_are_made(settings, message):
    with pytest.raises(UserError, match=message):
        guarded(functools.partial(accuracy, **settings), name="accuracy")
    with pytest.raises(ValueError, match=message.removeprefix(r"funcs\.accuracy\.")):
        accuracy(["5"], ["5"], **settings)


@pytest.mark.parametrize("values", [{"one": 1.0, "two": 0.0, "three": 1.0}, {1.0, 2.0, 3.0}, "123"])
def test_what_has_no_order_is_no_list_of_rewards(values):
    with pytest.raises(UserError, match="return a list of 3 rewards"):
        guarded(lambda completions, **_: values, name="x")(**COLUMNS)


def test_a_message_without_content_has_no_answer():
    assert accuracy([[{"role": "assistant", "tool_calls": []}]], ["5"]) == [0.0]
