"""Data sets and correctness of the embedded world."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltoken.errors import UserError
from rltoken.tiny import World, accuracy, answer, problems, traces
from rltoken.tiny.world import TAGS, solve, split_of


def texts(rows) -> list[str]:
    return [prompt[0]["content"] for prompt in rows["prompt"]]


def test_columns_ids_and_gold_answers():
    rows = problems(300, seed=3)
    assert rows.column_names == ["prompt", "answer", "id", "level"]
    assert len(set(rows["id"])) == len(set(texts(rows))) == len(rows) == 300
    assert all(prompt[0]["role"] == "user" for prompt in rows["prompt"])
    assert list(rows["answer"]) == [solve(text, World()) for text in texts(rows)]
    assert set(rows["level"]) == {2, 3, 4, 5}


def test_splits_share_no_problem_whatever_the_seeds():
    world = World(min_operations=1, max_operations=2)
    train = {text for seed in range(3) for text in texts(problems(600, world=world, seed=seed))}
    held_out = {text for seed in range(3) for text in texts(problems(100, world=world, seed=seed, split="eval"))}
    assert not train & held_out


def test_the_seed_decides():
    assert texts(problems(20, seed=1)) == texts(problems(20, seed=1))
    assert texts(problems(20, seed=1)) != texts(problems(20, seed=2))


def test_more_problems_begin_with_the_same_ones():
    assert texts(problems(30))[:10] == texts(problems(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, r"data\.train\.n: 0 problems"),
        ({"n": 1, "split": "test"}, r"data: there is no split 'test'\. Set data\.train\.split=train"),
        ({"n": 900, "world": World(min_operations=1, max_operations=1)}, r"data\.train\.n: .*too few"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        problems(**arguments)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("S 5 so 5 </think> 5", "5"),
        ("so 5 </think> ans 5", "5"),
        ("so 5 </think> = 5", "5"),
        ("</think> 05", "5"),
        ("so 5 </think>5", "5"),
        ("so 5", None),
        ("so 5 </think>", None),
        ("</think> 5 </think> 5", None),
        ("so 5 </think> 5 5", None),
        ("so 5 </think> so 5", None),
        ("so 5 </think> ans = 5", None),
        ("", None),
    ],
)
def test_the_answer_stands_after_the_only_end_of_thinking(text, found):
    assert answer(text) == found


@given(st.text())
def test_no_text_breaks_the_reader(text):
    found = answer(text)
    assert found is None or found == str(int(found))


def test_accuracy_reads_conversations_and_strings():
    replies = ["so 1 </think> 1", "so 1 </think> = 2", "so 1"]
    conversations = [[{"role": "assistant", "content": reply}] for reply in replies]
    gold = ["1", "1", "1"]
    assert accuracy(conversations, gold, level=[1, 1, 1]) == [1.0, 0.0, 0.0]
    assert accuracy(completions=replies, answer=gold) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError):
        accuracy(replies, ["1"])


def test_traces_are_worked_solutions_and_in_a_tagged_world_take_turns():
    rows = traces(40)
    assert rows.column_names == ["prompt", "completion"]
    for prompt, text in zip(texts(rows), rows["completion"], strict=True):
        assert answer(text) == solve(prompt, World()) and split_of(prompt) == "train"
        assert text.count("wait check") >= 1 or len(text.split()) > 80, "passes are checked where there is room"
    tagged = traces(8, world=World(tagged=True))
    assert list(tagged["format"]) == [*TAGS] * 2
    assert all(text.startswith(TAGS[form]) for form, text in zip(tagged["format"], tagged["completion"], strict=True))
    with pytest.raises(UserError, match=r"data\.traces\.n: 0 traces"):
        traces(0)


def test_without_a_gold_answer_there_is_no_reward():
    assert accuracy(["S 1 </think> 1", "S 1 </think> 1"], answer=["1", None]) == [1.0, None]
