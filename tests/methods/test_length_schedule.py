"""The schedule of lengths, worked by hand."""

from rltoken.methods.length_schedule import length_schedule
from rltoken.types import Progress


def test_length_schedule_is_linear_then_constant():
    lengths = [
        length_schedule(Progress(step, 10), start=100, end=50, over=0.5)["max_completion_length"]
        for step in (0, 1, 5, 9)
    ]
    assert lengths == [100, 90, 50, 50]
