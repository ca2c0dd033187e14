"""The clip range as a stage."""

from rltoken.methods.clip_range import clip_range


def test_clip_range():
    assert clip_range(low=0.1, high=0.3) == (0.1, 0.3)
