"""What a setting of a stage may be, said in its annotation and checked before anything is loaded.

rho: Share = 0.2                                        one of the ranges below
alpha: Annotated[float, Range(least=0)] = 0.4           any other range
mode: Literal["a", "b"] = "a"                           one of a few words
template: Annotated[str, names_the_budget] = "..."      any function of the value that raises ValueError
budgets: Annotated[list[int], up_to] = ...              its further parameters are other settings: up_to(value, longest)
beta: Annotated[float, Idle("tau_mode", "none")] = 1.0  it changes nothing beside tau_mode=none, so there it stays 1.0
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from rltoken.errors import first_line, nearest


@dataclass(frozen=True)
class Range:
    """The finite numbers from `least` or `above` to `most` or `below`; `whole`: integers only; `none`: None as well."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    whole: bool = False
    none: bool = False

    def __call__(self, value: Any) -> None:
        """Let a value pass.

        Raises:
            ValueError: it is no such number; says which ones are.
        """
        if value is None and self.none:
            return
        number = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        if not (
            number and math.isfinite(value) and self.least <= value <= self.most and self.above < value < self.below
        ):
            raise ValueError(f"{value!r} is not possible; set it to {self}")

    def __str__(self) -> str:
        bounds = {"from": self.least, "above": self.above, "up to": self.most, "below": self.below}
        told = [f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound)]
        number = f"a {'whole ' if self.whole else ''}number {' and '.join(told)}".rstrip()
        return f"{number}, or to null" if self.none else number


class Idle:
    """Marks a setting that changes nothing where another one, `beside`, has one of `values`: it keeps its default."""

    def __init__(self, beside: str, *values: Any) -> None:
        self.beside, self.values = beside, values


Share = Annotated[float, Range(above=0, most=1)]
Count = Annotated[int, Range(least=1, whole=True)]


def check(function: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Refuse settings that the annotations of a function exclude; a class calls it for its `__init__`.

    Raises:
        ValueError: the first one that may not be what it is; begins with its name.
    """
    function = function.func if isinstance(function, functools.partial) else function
    hints = _hints(function)
    for name, value in settings.items():
        try:
            _check(value, hints.get(name), settings)
            _refuse_idle(value, hints.get(name), settings, default=inspect.signature(function).parameters[name].default)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {first_line(error)}") from error


def _check(value: Any, hint: Any, settings: Mapping[str, Any]) -> None:
    choices = [str(choice) for choice in typing.get_args(hint)] if typing.get_origin(hint) is typing.Literal else []
    if choices and value not in typing.get_args(hint):
        raise ValueError(f"there is no {value!r}{nearest(str(value), choices)}; choose one of: {', '.join(choices)}")
    if hint is bool and not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false; set it to one of them")
    if hint is str and not isinstance(value, str):
        raise ValueError(f"{value!r} is no text; put it in quotes")
    for allow in filter(callable, getattr(hint, "__metadata__", ())):
        _, *others = inspect.signature(allow).parameters
        allow(value, **{other: settings[other] for other in others if other in settings})


def _refuse_idle(value: Any, hint: Any, settings: Mapping[str, Any], *, default: Any) -> None:
    """Refuse a value that is not the default where another setting makes it idle."""
    for idle in getattr(hint, "__metadata__", ()):
        if isinstance(idle, Idle) and settings[idle.beside] in idle.values and value != default:
            raise ValueError(
                f"{value!r} changes nothing beside {idle.beside}={settings[idle.beside]}; leave it at {default!r}, or "
                f"change {idle.beside}"
            )


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, none where they name what only a type checker imports."""
    try:
        return typing.get_type_hints(function, include_extras=True) if inspect.isroutine(function) else {}
    except NameError:
        return {}
