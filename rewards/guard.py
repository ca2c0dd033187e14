"""A reward function of the user's, called so that a sample it cannot take is named and costs no more than itself."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import reprlib
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Literal

from rltoken.errors import UserError, first_line, nearest
from rltoken.ranges import check
from rltoken.rewards.text import content

Reward = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]
OnError = Literal["stop", "crash"]
RAISED = (Exception, SystemExit)
"""What counts as raised: sys.exit() in a reward would end the run without a word. Ctrl-C and cancellation pass."""


def guarded(func: Reward, *, name: str, on_error: OnError = "stop") -> Reward:
    """`func` under the name `name`, with what it raises and what it returns checked; async if `func` is.

    When a call raises, its traceback is printed once per function and its samples are tried one by one. With 'stop' the
    first that raises ends the run; with 'crash' those that raise have no reward (None), and their share of such a call
    is logged as the metric NAME/crashed.

    Args:
        func: in TRL's signature.
        name: what errors and metrics call it.

    Raises:
        UserError: no function, or one that cannot take the columns it is not interested in; (when called) a parameter
            that no column fills, a sample that raises under 'stop', another number of rewards than completions, or a
            reward that is no finite number and not None. Names the function, and the sample where there is one.
    """
    signature = _signature(func, name)
    printed: list[bool] = []

    def print_once(error: BaseException) -> None:
        if not printed:
            traceback.print_exception(error, file=sys.stderr)
            printed.append(True)

    @functools.wraps(func)
    def call(**columns: Any) -> list[float | None]:
        """One reward per completion."""
        _refuse_missing(signature, name, columns)
        try:
            values = func(**columns)
        except RAISED as error:
            print_once(error)
            values = _settled(name, on_error, error, [_tried(func, single) for single in _singles(columns)], columns)
        return _checked(name, values, columns)

    @functools.wraps(func)
    async def call_async(**columns: Any) -> list[float | None]:
        """One reward per completion."""
        _refuse_missing(signature, name, columns)
        try:
            values = await func(**columns)
        except RAISED as error:
            print_once(error)
            found = [await _tried_async(func, single) for single in _singles(columns)]
            values = _settled(name, on_error, error, found, columns)
        return _checked(name, values, columns)

    made = call_async if inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(func.__call__) else call
    made.__name__ = name
    return made


def _signature(func: Any, name: str) -> inspect.Signature:
    """The signature of a reward function, or of an object's `__call__`.

    Raises:
        UserError: a class in the place of its object, no function, or a function without `**columns`: TRL hands over
            every column of the data set and some arguments of its own, and no function names all of them.
    """
    if inspect.isclass(func) or (isinstance(func, functools.partial) and inspect.isclass(func.func)):
        raise UserError(f"reward.funcs.{name}: a class needs no _partial_, only its arguments; remove it.")
    if not callable(func):
        raise UserError(
            f"reward.funcs.{name}: {reprlib.repr(func)} is no function; give it a _target_ and, unless that is a "
            "class, _partial_: true."
        )
    signature = inspect.signature(func)
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        raise UserError(
            f"reward.funcs.{name}: its signature {signature} has no place for the columns that it does not name; add "
            "the parameter **columns at its end."
        )
    _refuse_settings(func, name, signature)
    return signature


def _refuse_settings(func: Any, name: str, signature: inspect.Signature) -> None:
    """Refuse a setting that the function has no parameter for, which **columns would swallow, or that may not be so."""
    settings = func.keywords if isinstance(func, functools.partial) else {}
    if unknown := next((key for key in settings if key not in signature.parameters), None):
        known = [key for key, each in signature.parameters.items() if each.kind is not each.VAR_KEYWORD]
        raise UserError(f"reward.funcs.{name}.{unknown}: it has no such parameter{nearest(unknown, known)}; remove it.")
    try:
        check(func, settings)
    except ValueError as error:
        raise UserError(f"reward.funcs.{name}.{first_line(error)}.") from error


def _refuse_missing(signature: inspect.Signature, name: str, columns: dict[str, Any]) -> None:
    """Refuse a call that leaves a parameter without a value, which no sample is to blame for."""
    for parameter in signature.parameters.values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and parameter.name not in columns:
            raise UserError(
                f"reward.funcs.{name}: nothing fills its parameter "
                f"'{parameter.name}'{nearest(parameter.name, columns)}; there are: {', '.join(columns)}. Name one of "
                f"them, or give it a value: reward.funcs.{name}.{parameter.name}=..."
            )


def _tried(func: Reward, single: dict[str, Any]) -> Any:
    """The reward of one sample, or the exception that it raises."""
    try:
        return func(**single)[0]
    except RAISED as error:
        return error


async def _tried_async(func: Reward, single: dict[str, Any]) -> Any:
    try:
        return (await func(**single))[0]
    except RAISED as error:
        return error


def _singles(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The same call for each sample alone; what reward functions log is dropped, since their first call has logged."""
    n = len(columns["completions"])
    shared = {key: value for key, value in columns.items() if not (isinstance(value, list) and len(value) == n)}
    silent = {key: lambda *_: None for key in ("log_extra", "log_metric") if key in columns}
    return [
        {key: [value[i]] for key, value in columns.items() if key not in shared} | shared | silent for i in range(n)
    ]


def _settled(
    name: str, on_error: OnError, error: BaseException, found: list[Any], columns: dict[str, Any]
) -> list[float | None]:
    """The rewards of a call that raised, from those of its samples alone (or what each raised).

    Raises:
        UserError: under 'stop', or where the function raises for all of them together but for none alone.
    """
    bad = [i for i, value in enumerate(found) if isinstance(value, RAISED)]
    if not bad:
        raise UserError(
            f"reward.funcs.{name}: raised {type(error).__name__}: {first_line(error)} for {len(found)} completions, "
            "but for none of them alone; mend the function."
        ) from error
    if on_error == "stop":
        first = found[bad[0]]
        raise UserError(
            f"reward.funcs.{name}: raised {type(first).__name__}: {first_line(first)} for {_sample(columns, bad[0])}; "
            "mend the function, or set reward.on_error=crash to go on without such samples."
        ) from first
    if "log_metric" in columns:
        columns["log_metric"](f"{name}/crashed", len(bad) / len(found))
    return [None if i in bad else value for i, value in enumerate(found)]


def _checked(name: str, values: Any, columns: dict[str, Any]) -> list[float | None]:
    n = len(columns["completions"])
    if not isinstance(values, Iterable) or isinstance(values, str | Mapping | Set):
        raise UserError(f"reward.funcs.{name}: returned {reprlib.repr(values)}; return a list of {n} rewards.")
    values = list(values)
    if len(values) != n:
        raise UserError(
            f"reward.funcs.{name}: returned {len(values)} rewards for {n} completions; return one for each, None where "
            "there is none."
        )
    return [_number(name, value, columns, i) for i, value in enumerate(values)]


def _number(name: str, value: Any, columns: dict[str, Any], i: int) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise UserError(
            f"reward.funcs.{name}: returned {reprlib.repr(value)} for {_sample(columns, i)}; return a finite number, "
            "or None where there is none."
        )
    return None if math.isnan(number) else number


def _sample(columns: dict[str, Any], i: int) -> str:
    """How an error names a sample: by its id or its place, and by how its completion begins."""
    ids = columns.get("id")
    place = f"id={ids[i]}" if ids is not None else f"completion {i}"
    text = "".join(itertools.islice(content(columns["completions"][i]), 80))
    return f"the sample {place} ({reprlib.repr(text)})"
