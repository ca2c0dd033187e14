"""What a setting of a stage may be, said in its annotation and checked before anything is loaded.

rho: Share = 0.2                                        one of the ranges below
alpha: Annotated[float, Range(least=0)] = 0.4           any other range
mode: Literal["a", "b"] = "a"                           one of a few words
template: Annotated[str, names_the_budget] = "..."      any function of the value that raises ValueError
budgets: Annotated[list[int], up_to] = ...              its further parameters are other settings: up_to(value, longest)
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """The finite numbers from `least` or `above` to `most` or `below`; `whole`: integers only."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    whole: bool = False

    def __call__(self, value: Any) -> None:
        """Let a value pass.

        Raises:
            ValueError: it is no such number; says which ones are.
        """
        number = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        if not (
            number and math.isfinite(value) and self.least <= value <= self.most and self.above < value < self.below
        ):
            raise ValueError(f"{value!r} is not possible; set it to {self}")

    def __str__(self) -> str:
        bounds = {"from": self.least, "above": self.above, "up to": self.most, "below": self.below}
        told = [f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound)]
        return f"a {'whole ' if self.whole else ''}number {' and '.join(told)}".rstrip()


Share = Annotated[float, Range(above=0, most=1)]
Count = Annotated[int, Range(least=1, whole=True)]


def check(name: str, value: Any, annotation: Any) -> None:
    """Check a setting of a stage that is a class, for its `__init__`: only functions are checked by their signature.

    Args:
        name: of the setting, for the error.
        value: what it was set to.
        annotation: what it may be: bool, or one of the ranges here.

    Raises:
        ValueError: it may not be that; names the setting.
    """
    if annotation is bool and not isinstance(value, bool):
        raise ValueError(f"{name}: {value!r} is neither true nor false; set it to one of them")
    for allowed in getattr(annotation, "__metadata__", ()):
        try:
            allowed(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
