"""A schedule of the completion length: linear from `start` to `end` tokens over a share of the run, then constant.

The idea of growing or shrinking the sampling length over training is that of ThinkPrune, DeepScaleR and CAMPO; this is
the plain schedule, without their criteria.
"""

from rltoken.ranges import Count, Share
from rltoken.types import Progress


def length_schedule(progress: Progress, *, start: Count, end: Count, over: Share = 1.0) -> dict[str, int]:
    """How many completion tokens to sample at most.

    Args:
        start, end: completion tokens at the beginning and from the share `over` of the run on.
        over: share of the run, in (0, 1].
    """
    done = min(1.0, progress.fraction / over)
    return {"max_completion_length": round(start + (end - start) * done)}
