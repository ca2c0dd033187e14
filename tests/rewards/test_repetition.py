"""Loops at the end of completions: CAMPO's numbers, both readings against a plain search, linear time."""

import statistics

import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rltoken.rewards.repetition import loop, loop_share, shared_prefixes

LOOPS = [  # tokens, the paper's share, the released code's
    ([1, 2, 3, 4, 5, 6], 0.0, 0.0),
    ([1, 2, 3, 4, 9, 9], 1 / 3, 1 / 3),
    ([1, 2] + [7, 8] * 4, 0.8, 0.8),
    ([1, 2, 3, 4, 5] + [6] * 5, 0.5, 0.4),
    ([1, 2, 3, 4] + [7, 8] * 3, 0.6, 0.6),
    ([1, 2, 3] * 3, 1.0, 1.0),
    ([5, 5, 5, 5, 1, 2], 0.0, 0.0),
    ([7, 8, 7, 8, 7], 0.8, 0.8),
    ([4], 0.0, 0.0),
    ([], 0.0, 0.0),
]
PENALTY = [[1, 2, 3, 4], [1, 2] + [7, 8] * 4, [1, 2, 3], [3, 2, 1]]
"""Completions of a group of which the second ends in a loop."""


def plain_share(tokens, reading, min_repeats):
    """The same by comparing block after block, for every period."""
    n, covers = len(tokens), []
    for period in range(1, n // min_repeats + 1):
        blocks = 1
        while tokens[n - (blocks + 1) * period : n - blocks * period] == tokens[n - period :]:
            blocks += 1
            if (blocks + 1) * period > n:
                break
        if blocks >= min_repeats:
            covers.append(blocks * period)
    return (max(covers) if reading == "paper" else covers[-1]) / n if covers else 0.0


@pytest.mark.parametrize(("tokens", "paper", "code"), LOOPS)
def test_shares(tokens, paper, code):
    assert loop_share(tokens) == pytest.approx(paper)
    assert loop_share(tokens, reading="code") == pytest.approx(code)


@given(
    tokens=st.lists(st.integers(0, 1), max_size=30) | st.text("abc", max_size=20).map(list),
    reading=st.sampled_from(["paper", "code"]),
    min_repeats=st.integers(2, 4),
)
@settings(max_examples=500, deadline=None)
def test_shares_are_those_of_a_plain_search(tokens, reading, min_repeats):
    assert loop_share(tokens, reading=reading, min_repeats=min_repeats) == plain_share(tokens, reading, min_repeats)


@given(head=st.lists(st.integers(0, 2), max_size=8), block=st.lists(st.integers(0, 2), min_size=1), m=st.integers(2, 5))
@settings(max_examples=200, deadline=None)
def test_a_loop_is_never_overlooked(head, block, m):
    tokens = head + block * m
    assert loop_share(tokens) >= len(block) * m / len(tokens) - 1e-12


@given(tokens=st.text("ab", max_size=25))
@settings(max_examples=200, deadline=None)
def test_shared_prefixes_are_those_of_a_plain_search(tokens):
    plain = [
        next((k for k in range(len(tokens) - i) if tokens[k] != tokens[i + k]), len(tokens) - i)
        for i in range(len(tokens))
    ]
    assert shared_prefixes(tokens) == plain


class Counted:
    """A token that counts how often tokens are compared."""

    comparisons = 0

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        Counted.comparisons += 1
        return self.value == other.value


def fibonacci(n):
    """The word abaababaabaab... of n letters: full of repetitions of every length."""
    word, longer = "a", "ab"
    while len(longer) < n:
        word, longer = longer, longer + word
    return longer[:n]


@pytest.mark.parametrize("pattern", ["equal", "halves", "fibonacci", "nearly"])
def test_a_million_tokens_take_two_million_comparisons(pattern):
    """Counted, not timed. 'nearly': a^(n/2) b a^(n/2 - 1) costs a plain search some n^2 / 8 of them."""
    n = 1_000_000
    letters = {
        "equal": "a" * n,
        "halves": fibonacci(n // 2) * 2,
        "fibonacci": fibonacci(n),
        "nearly": "a" * (n // 2) + "b" + "a" * (n // 2 - 1),
    }[pattern]
    alphabet = {letter: Counted(letter) for letter in "ab"}
    Counted.comparisons = 0
    share = loop_share([alphabet[letter] for letter in letters])
    assert Counted.comparisons <= 2 * n
    assert share == 1.0 if pattern in ("equal", "halves") else share < 1.0


def test_the_papers_penalty_is_the_share_and_the_codes_a_constant_for_what_was_cut():
    texts = ["", [{"role": "assistant", "content": "x"}], "", ""]
    assert loop(texts, PENALTY, prompts=["q"] * 4, answer=["1"] * 4) == pytest.approx([0, -0.8, 0, 0])
    assert loop(texts, PENALTY, longest=11) == [0.0] * 4
    assert loop(texts, PENALTY, reading="code") == [0, -0.1, 0, 0]
    assert loop(texts, PENALTY, reading="code", longest=10, penalty=0.2) == [0, -0.2, 0, 0]
    assert loop(texts, PENALTY, min_repeats=5) == [0.0] * 4


@pytest.mark.parametrize(
    ("reading", "advantages"),
    [
        ("paper", [0.802954, -1.261785, -0.344123, 0.802954]),
        ("code", [0.864067, -0.946359, -0.781775, 0.864067]),
    ],
)
def test_advantages_of_campo(reading, advantages):
    penalties = loop([""] * 4, PENALTY, reading=reading)
    rewards = [correct + penalty for correct, penalty in zip([1, 0, 0, 1], penalties, strict=True)]
    mean, spread = statistics.mean(rewards), statistics.stdev(rewards)
    assert [(reward - mean) / (spread + 1e-6) for reward in rewards] == pytest.approx(advantages, abs=2e-6)


def test_impossible_settings_are_refused():
    for setting, told in (({"min_repeats": 1}, "min_repeats=1"), ({"reading": "book"}, "reading='book'")):
        with pytest.raises(ValueError) as refused:
            loop([""], [[1, 1]], **setting)
        assert str(refused.value).startswith(told)


def test_from_yaml_beside_trls_penalty_for_repeated_ngrams():
    section = OmegaConf.create(
        """
        loop: {_target_: rltoken.rewards.repetition.loop, _partial_: true, reading: code, longest: 4}
        ngrams: {_target_: trl.rewards.get_repetition_penalty_reward, ngram_size: 2, max_penalty: -1.0}
        """
    )
    funcs = instantiate(section)
    columns = {"completions": ["", ""], "completion_ids": [[1, 2, 3, 4], [5, 5, 5, 5, 5]], "prompts": ["q", "q"]}
    assert {name: func(**columns) for name, func in funcs.items()} == {"loop": [0.0, -0.1], "ngrams": [0.0, -0.75]}
