"""The prompts that a window draws do not depend on how many ranks draw them."""

from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from rltoken.rollout.sampler import PromptStream

PROBLEMS = Dataset.from_dict({"prompt": [f"p{i}" for i in range(7)]})
ASKED = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=5)


def drawn(stream, asked, rank):
    return [row["prompt"] for row in stream.draw(asked, rank)]


def test_worked_draws():
    """Seven problems, asked for 2 by the first of two ranks and 3 by the second, then for 4 by one rank."""
    streams = [PromptStream(PROBLEMS, seed=0) for _ in range(2)]
    order = drawn(PromptStream(PROBLEMS, seed=0), [7], 0)
    assert sorted(order) == [f"p{i}" for i in range(7)]
    assert drawn(streams[0], [2, 3], 0) == order[:2] and drawn(streams[1], [2, 3], 1) == order[2:5]
    assert [stream.cursor for stream in streams] == [5, 5]
    assert drawn(streams[0], [4, 0], 0)[:2] == order[5:]


@given(ASKED)
def test_ranks_draw_together_what_one_rank_draws(calls):
    alone = PromptStream(PROBLEMS, seed=3)
    ranks = [PromptStream(PROBLEMS, seed=3) for _ in range(4)]
    for asked in calls:
        asked = asked + [0] * (4 - len(asked))
        together = [prompt for rank, stream in enumerate(ranks) for prompt in drawn(stream, asked, rank)]
        assert together == drawn(alone, [sum(asked)], 0)
    assert {stream.cursor for stream in ranks} == {alone.cursor}
