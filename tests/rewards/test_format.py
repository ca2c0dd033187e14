"""Structure of completions: what has it, what lacks it, and use with TRL's columns and from YAML."""

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rltoken.rewards.format import boxed, free_of, structured, tag_counts

GOOD = [
    "<think>one</think>two",
    "one</think>two",
    "\n <think> one\nline </think>\n\n two \n",
    "a < b, <i>no tag of ours</i></think>$x$",
]
BAD = [
    "",
    "two",
    "<think>one",
    "<think>one two",
    "</think>two",
    "<think></think>two",
    "<think> \n </think>two",
    "one</think>",
    "one</think> \n",
    "<think>one</think>two</think>three",
    "<think>one</think><think>two",
    "<think>one<think>more</think>two",
    "before <think>one</think>two",
    "<think><think>one</think>two",
]


def as_messages(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("text", GOOD)
def test_a_think_block_and_an_answer(text):
    assert structured([text, as_messages(text)], prompts=["q"] * 2, completion_ids=[[1]] * 2, log_extra=print) == [1, 1]


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_think_block_and_answer(text):
    assert structured([text, as_messages(text)]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one</reason> <answer>two</answer>", 1.0),
        ("<reason>one</reason><answer>two</answer>\n", 1.0),
        ("<reason>one</reason>two", 0.0),
        ("<reason>one</reason><answer>two", 0.0),
        ("<reason>one</reason><answer> </answer>", 0.0),
        ("<reason>one</reason>so <answer>two</answer>", 0.0),
        ("<reason>one</reason><answer>two</answer>!", 0.0),
        ("<reason>one</reason><answer>two</answer><answer>three</answer>", 0.0),
        ("<reason>one <answer>no</answer></reason><answer>two</answer>", 0.0),
    ],
)
def test_other_tags_and_tags_around_the_answer(text, expected):
    tags = {"think_start": "<reason>", "think_end": "</reason>", "answer_start": "<answer>", "answer_end": "</answer>"}
    assert structured([text], **tags) == [expected]


def test_an_answer_needs_room_between_equal_tags():
    assert structured(["a</think>**", "a</think>**5**"], answer_start="**", answer_end="**") == [0.0, 1.0]


def test_tag_counts_are_shares_of_exact_numbers():
    texts = ["<think>a</think>b", "a</think>b", "a</think></think><x>", ""]
    tags = {"<think>": 1, "</think>": 1, "<x>": 0}
    assert tag_counts(texts, tags=tags) == pytest.approx([1, 2 / 3, 0, 1 / 3])
    assert tag_counts([as_messages("<a><a>")], tags={"<a>": 2}) == [1.0]


def test_foreign_tags():
    texts = ["a</think>b", "<Long_COT>a", as_messages("a<|tool|>")]
    assert free_of(texts, tags=["<Long_COT>", "<|tool|>"]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("func", [free_of, tag_counts])
@pytest.mark.parametrize("tags", [[], [""], "<think>"])
def test_impossible_tags_are_refused(func, tags):
    with pytest.raises(ValueError) as refused:
        func(["text"], tags=tags)
    assert "at least one tag" in str(refused.value)


def test_from_yaml():
    section = OmegaConf.create(
        """
        structured:
          _target_: rltoken.rewards.format.structured
          _partial_: true
          answer_start: "<a>"
          answer_end: "</a>"
        tag_counts: {_target_: rltoken.rewards.format.tag_counts, _partial_: true, tags: {"</think>": 1, "<a>": 1}}
        free_of: {_target_: rltoken.rewards.format.free_of, _partial_: true, tags: ["<b>", "<c>"]}
        """
    )
    funcs = instantiate(section)
    found = {name: func(["one</think><a>two</a>", "one</think><b>"], prompts=["q"] * 2) for name, func in funcs.items()}
    assert found == {"structured": [1.0, 0.0], "tag_counts": [1.0, 0.5], "free_of": [1.0, 0.0]}


def test_boxed_is_what_it_was():
    assert boxed([r"a</think>\boxed{1}", r"\boxed{1}</think>"], think_end="</think>") == [1.0, 0.0]
