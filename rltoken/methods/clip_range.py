"""A clip range that may differ from the trainer's, as a bounds stage.

Paper (asymmetric range, "clip-higher"): Yu et al., "DAPO", 2025 (arXiv 2503.14476): eps_low 0.2, eps_high 0.28.

    min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

For TRL's `cispo` loss eps_high is the absolute cap of the ratio, not a distance from 1; a cap below 1 is refused.
"""

from typing import Annotated

from rltoken.ranges import Range


def clip_range(
    *, low: Annotated[float, Range(least=0)] = 0.2, high: Annotated[float, Range(least=0)] = 0.28
) -> tuple[float, float]:
    """The same range for every token."""
    return low, high
