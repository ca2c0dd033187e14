"""Where thinking is cut, what is forced there, and when an answer counts."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltoken.errors import UserError
from rltoken.rollout.forced import (
    Prefix,
    cuts,
    encode_template,
    in_tokens,
    prefixes,
    thinking_part,
    until_end,
    well_formed,
)
from rltoken.tiny.tokenizer import build_tokenizer
from rltoken.tiny.world import World
from rltoken.types import Template

EOS, END, ELLIPSIS, HEADER = 1, 4, 14, 20
ENDS = frozenset([EOS])
TEMPLATE = Template(think_end_id=END, cut=(ELLIPSIS, END, HEADER), ended=(HEADER,))
NO_THINKING = Template(think_end_id=None, cut=(HEADER,), ended=(HEADER,))


def tails(thinking, budgets, template=TEMPLATE):
    """(tokens before the answer, budgets that share them, closed) of each prefix."""
    return [(prefix.ids, shared, prefix.closed) for prefix, shared in prefixes(thinking, budgets, template, ENDS)]


def test_budgets_are_tokens_or_shares():
    assert in_tokens([4, 8, 12], 99) == [4, 8, 12]
    assert in_tokens([0.25, 0.5, 0.75, 1.0], 64) == [16, 32, 48, 64]
    assert in_tokens([0.001, 1.0], 1000) == [1, 1000]


@pytest.mark.parametrize(
    "budgets", [[], [0, 4], [8, 4], [4, 4], [-1], [0.5, 2], [1, 0.5], [0.5, 1.5], [0.0, 1.0], [1.0, 0.5]]
)
def test_what_are_no_budgets_is_refused(budgets):
    with pytest.raises(ValueError, match="are no budgets; give ascending"):
        in_tokens(budgets, 100)


@pytest.mark.parametrize("budgets", [[0.01, 0.5], [0.5, 0.51]])
def test_shares_that_do_not_ascend_in_tokens_are_refused(budgets):
    with pytest.raises(ValueError, match=r"budgets .* of 4 tokens are .*, which does not ascend"):
        in_tokens(budgets, 4)


def test_shares_of_the_longest_thinking_are_rounded():
    """0.29 * 100 is 28.999... in floating point."""
    assert in_tokens([0.29, 1.0], 100) == [29, 100]
    assert in_tokens([0.25, 0.5], 11) == [3, 6]


def test_cuts():
    """Eleven tokens under budgets of 4, 8, 12, 16: the last two share the whole thinking."""
    assert cuts(11, [4, 8, 12, 16]) == {4: 1, 8: 1, 11: 2}
    assert cuts(16, [4, 8, 12, 16]) == {4: 1, 8: 1, 12: 1, 16: 1}
    assert cuts(3, [4, 8, 12, 16]) == {3: 4}
    assert cuts(0, [4, 8]) == {0: 2}


def test_thinking_part():
    assert thinking_part([5, END, 6, END, 7], END) == [5, END]
    assert thinking_part([5, 6, EOS], END) == [5, 6, EOS]
    assert thinking_part([END], END) == [END]
    assert thinking_part([5, END, 6], None) == [5, END, 6]
    assert thinking_part([], END) == []


def test_until_end():
    assert until_end([5, EOS, 0, 0], ENDS) == [5, EOS]
    assert until_end([5, END, EOS], ENDS | {END}) == [5, END]
    assert until_end([5, 6], ENDS) == [5, 6]
    assert until_end([], ENDS) == []


def test_thinking_that_is_cut_gets_ellipsis_end_and_header():
    assert tails([5, 6, 7, 8], [2, 4]) == [
        ([5, 6, ELLIPSIS, END, HEADER], 1, False),
        ([5, 6, 7, 8, ELLIPSIS, END, HEADER], 1, False),
    ]


def test_thinking_that_ended_gets_the_header_only():
    assert tails([5, 6, 7, END], [2, 4, 9]) == [
        ([5, 6, ELLIPSIS, END, HEADER], 1, False),
        ([5, 6, 7, END, HEADER], 2, True),
    ]


def test_a_cut_just_before_the_end_of_thinking_is_a_cut():
    assert tails([5, 6, END], [2, 3]) == [([5, 6, ELLIPSIS, END, HEADER], 1, False), ([5, 6, END, HEADER], 1, True)]


def test_thinking_that_ends_at_once():
    assert tails([END], [1, 9]) == [([END, HEADER], 2, True)]


def test_thinking_that_ends_the_sequence_is_cut_after_it():
    assert tails([5, EOS], [1, 9]) == [
        ([5, ELLIPSIS, END, HEADER], 1, False),
        ([5, EOS, ELLIPSIS, END, HEADER], 1, False),
    ]
    assert tails([EOS], [1, 9]) == [([EOS, ELLIPSIS, END, HEADER], 2, False)]


def test_without_a_marker_the_end_of_the_sequence_ends_thinking_and_is_left_out():
    assert tails([5, 6, EOS], [2, 9], NO_THINKING) == [([5, 6, HEADER], 2, True)]
    assert tails([5, 6, EOS], [1, 9], NO_THINKING) == [([5, HEADER], 1, False), ([5, 6, HEADER], 1, True)]
    assert tails([EOS], [3], NO_THINKING) == [([HEADER], 1, True)]
    assert tails([5, 6], [2], NO_THINKING) == [([5, 6, HEADER], 1, False)]


@pytest.mark.parametrize(
    ("kept", "forced", "answer", "formed"),
    [
        ([5], (ELLIPSIS, END, HEADER), [31, EOS], True),
        ([5, END], (HEADER,), [31, EOS], True),
        ([5], (ELLIPSIS, END, HEADER), [31, END, EOS], False),
        ([5, END], (HEADER,), [31, END, EOS], False),
        ([5, EOS], (ELLIPSIS, END, HEADER), [31, EOS], False),
        ([EOS], (ELLIPSIS, END, HEADER), [31, EOS], False),
        ([], (END,), [31], True),
        ([], (HEADER,), [31], False),
        ([5], (ELLIPSIS, END, HEADER), [], True),
        ([5], (ELLIPSIS, END, HEADER), [31, 31, 31], True),
    ],
)
def test_exactly_one_end_of_thinking_counts(kept, forced, answer, formed):
    assert well_formed(Prefix(kept, forced, closed=END in kept), answer, TEMPLATE, ENDS) is formed


def test_without_a_marker_every_answer_is_well_formed():
    assert well_formed(Prefix([5, EOS], (HEADER,), closed=True), [END, END], NO_THINKING, ENDS)


def test_the_template_of_a_tokenizer():
    tokenizer = build_tokenizer(World())
    end, ok, let, answer, equals = tokenizer.convert_tokens_to_ids(["</think>", "ok", "let", "ans", "="])
    found = encode_template(tokenizer, think_end="</think>", ellipsis="ok let", header="ans", stops=["=", "ok"])
    assert found == Template(end, cut=(ok, let, end, answer), ended=(answer,), stops=(equals, ok))
    assert encode_template(tokenizer, think_end="</think>") == Template(end, cut=(end,))
    assert encode_template(tokenizer, think_end=None, header="ans") == Template(None, cut=(answer,), ended=(answer,))
    assert encode_template(tokenizer, think_end=None) == Template(None, cut=())


@pytest.mark.parametrize("stop", ["ok let", ""])
def test_a_stop_of_several_tokens_is_refused(stop):
    with pytest.raises(UserError, match=r"model\.forced\.stops: .*must be exactly one"):
        encode_template(build_tokenizer(World()), think_end="</think>", stops=[stop])


TRACES = st.lists(st.sampled_from([5, 6, EOS, END]), min_size=1, max_size=12)
ASCENDING = st.sets(st.integers(1, 15), min_size=1, max_size=5).map(sorted)


@given(completion=TRACES, budgets=ASCENDING, thinks=st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_budget_has_one_prefix_of_its_length(completion, budgets, thinks):
    template = TEMPLATE if thinks else NO_THINKING
    completion = until_end(completion, ENDS)
    thinking = thinking_part(completion, template.think_end_id)
    body = thinking[:-1] if not thinks and thinking[-1] == EOS else thinking
    found = prefixes(thinking, budgets, template, ENDS)
    assert sum(shared for _, shared in found) == len(budgets)
    per_budget = [prefix for prefix, shared in found for _ in range(shared)]
    for budget, prefix in zip(budgets, per_budget, strict=True):
        assert prefix.kept == body[:budget] == completion[: len(prefix.kept)]
        assert prefix.forced == (template.ended if prefix.closed else template.cut)
        assert not thinks or prefix.closed == (prefix.kept[-1] == END)
    assert len({len(prefix.kept) for prefix, _ in found}) == len(found)
    assert all(len(a.kept) < len(b.kept) for a, b in itertools.pairwise(prefix for prefix, _ in found))


@given(completion=TRACES, budgets=ASCENDING, answer=st.lists(st.sampled_from([31, EOS, END]), max_size=4))
@settings(max_examples=200, deadline=None)
def test_a_well_formed_branch_has_one_end_of_thinking_in_all(completion, budgets, answer):
    thinking = thinking_part(until_end(completion, ENDS), END)
    for prefix, _ in prefixes(thinking, budgets, TEMPLATE, ENDS):
        whole = [*prefix.ids, *answer]
        expected = whole.count(END) == 1 and EOS not in prefix.ids
        assert well_formed(prefix, answer, TEMPLATE, ENDS) == expected
