"""Problems and traces: what holds for every world."""

import itertools
import random
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltoken.errors import UserError
from rltoken.tiny.reward import answer
from rltoken.tiny.world import (
    EOS,
    HESITATION,
    LAST,
    QUICK,
    SO,
    TAGS,
    THINK_END,
    Problem,
    World,
    apply,
    operations,
    problem,
    solve,
    split_of,
    tagged_trace,
    trace,
    vocabulary,
)

shares = st.floats(0, 1)


@st.composite
def worlds(draw, **fixed) -> World:
    low = draw(st.integers(1, 8))
    knobs = {
        "modulus": draw(st.integers(4, 10)),
        "min_operations": low,
        "max_operations": draw(st.integers(low, 8)),
        "noise": draw(shares),
        "styles": draw(st.lists(shares, max_size=3)),
        "max_passes": draw(st.integers(1, 16)),
        "verbosity": draw(st.floats(0, 0.5)),
        "last": draw(st.floats(0.1, 1)),
        "formats": draw(st.integers(1, 3)),
        "longest": draw(st.integers(80, 400)),
        **{knob: draw(shares) for knob in ("single", "stop", "plan", "hesitation", "cut", "shortcut")},
    }
    return World(**{**knobs, **fixed})


seeds = st.integers(0, 2**32).map(random.Random)


def final(row) -> str | None:
    """The answer that the reward reads from a trace."""
    return answer(" ".join(word for word in row.completion if word != EOS))


def test_a_problem_by_hand():
    assert solve("S 5 A +3 B *2 C -4", World()) == "5"  # 5+3=1, 1*2=2, 2-4=5
    assert solve("S 5 A +3 B #", World()) == "4"
    assert [apply(operation, 6, 7) for operation in ("+1", "-6", "*6", "#")] == [0, 0, 1, 2]


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="unknown operation"):
        apply("/2", 1, 7)


@given(seeds, worlds())
def test_every_problem_is_verified_by_executing_it(rng, world):
    drawn = problem(rng, world)
    words = drawn.prompt.split()
    value = int(words[1])
    for operation in words[3::2]:
        expression = "+3" if operation == LAST else operation
        value = eval(f"({value} {expression[0]} {expression[1:]}) % {world.modulus}")
    assert drawn.answer == str(value)
    assert drawn.level == sum(word in operations(world) for word in words)
    assert world.min_operations <= drawn.level <= world.max_operations


@given(seeds, worlds())
def test_traces_are_well_formed(rng, world):
    drawn = problem(rng, world)
    row = trace(rng, drawn, world)
    assert set(row.tokens) <= set(vocabulary(world))
    assert len(row.loss_mask) == len(row.tokens)
    assert " ".join(row.tokens[: row.prompt_length]) == f"{drawn.prompt} = <think>"
    assert len(row.completion) <= world.longest
    assert row.completion.count(THINK_END) == 1
    assert row.completion[-1] == EOS
    assert final(row) is not None


@given(seeds, worlds())
def test_only_the_prompt_and_a_forced_end_of_thinking_carry_no_loss(rng, world):
    row = trace(rng, problem(rng, world), world)
    end = row.tokens.index(THINK_END)
    assert not any(row.loss_mask[: row.prompt_length])
    free = [mask for index, mask in enumerate(row.loss_mask) if index >= row.prompt_length and index != end]
    assert all(free)


@given(seeds, worlds(cut=1.0))
def test_a_cut_trace_ends_in_the_true_answer(rng, world):
    drawn = problem(rng, world)
    row = trace(rng, drawn, world)
    assert row.loss_mask[row.tokens.index(THINK_END)] == 0
    assert final(row) == drawn.answer


@given(seeds, worlds(noise=0.0, styles=(), shortcut=0.0))
def test_without_noise_every_trace_is_right(rng, world):
    drawn = problem(rng, world)
    assert final(trace(rng, drawn, world)) == drawn.answer


@given(seeds, worlds(noise=0.0, styles=(), shortcut=0.3, cut=0.0, last=0.7))
def test_the_shortcut_is_wrong_and_agrees_with_itself(rng, world):
    drawn = problem(rng, world)
    row = trace(rng, drawn, world)
    skipped = solve(" ".join(drawn.prompt.split()[:-2]), world)
    shortcut = QUICK in row.completion and LAST in drawn.prompt
    assert final(row) == (skipped if shortcut else drawn.answer)
    assert (final(row) != drawn.answer) == shortcut


@given(seeds, worlds(hesitation=0.0))
def test_a_probability_of_zero_means_never(rng, world):
    assert HESITATION not in trace(rng, problem(rng, world), world).tokens


@settings(max_examples=20)
@given(st.integers(0, 2**32), worlds())
def test_the_same_generator_gives_the_same_trace(seed, world):
    def draw():
        rng = random.Random(seed)
        return trace(rng, problem(rng, world), world)

    assert draw() == draw()


def test_noise_is_the_share_of_wrong_steps():
    world = World(noise=0.2, single=1.0, cut=0.0, min_operations=1, max_operations=1)
    rng = random.Random(0)
    rows = [(drawn, trace(rng, drawn, world)) for drawn in (problem(rng, world) for _ in range(4000))]
    wrong = sum(final(row) != drawn.answer for drawn, row in rows) / len(rows)
    assert wrong == pytest.approx(0.2, abs=0.03)


def test_lengths_vary_and_rechecks_help():
    rng = random.Random(0)

    def accuracy_and_lengths(world):
        rows = [(drawn, trace(rng, drawn, world)) for drawn in (problem(rng, world) for _ in range(3000))]
        lengths = sorted(len(row.completion) for _, row in rows)
        return sum(final(row) == drawn.answer for drawn, row in rows) / len(rows), lengths

    once, _ = accuracy_and_lengths(World(cut=0.0, single=1.0))
    often, lengths = accuracy_and_lengths(World(cut=0.0, single=0.0))
    assert often > once + 0.08
    assert lengths[-150] > 2 * lengths[150]


def test_the_split_depends_on_the_text_alone():
    texts = {problem(random.Random(seed), World()).prompt for seed in range(3000)}
    held_out = sum(split_of(text) == "eval" for text in texts) / len(texts)
    assert held_out == pytest.approx(0.1, abs=0.02)


def test_worlds_are_values():
    assert World(styles=[0.1]) == World(styles=(0.1,))
    assert len({World(), World(), replace(World(), noise=0.1)}) == 2


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"modulus": 3}, "world.modulus"),
        ({"modulus": 7.5}, "world.modulus"),
        ({"min_operations": 4, "max_operations": 3}, "world.min_operations"),
        ({"max_operations": 9}, "world.max_operations"),
        ({"noise": 1.5}, "world.noise"),
        ({"noise": "much"}, "world.noise"),
        ({"verbosity": 0.6}, "world.verbosity"),
        ({"styles": [0.1] * 4}, "world.styles"),
        ({"styles": [2.0]}, "world.styles"),
        ({"formats": 4}, "world.formats"),
        ({"shortcut": 0.1}, "world.last"),
        ({"longest": 20}, "world.longest"),
    ],
)
def test_a_knob_out_of_range_is_named_in_one_line(knobs, named):
    with pytest.raises(UserError, match=named) as caught:
        World(**knobs)
    assert "\n" not in str(caught.value)


def test_every_knob_is_documented():
    assert all(f"        {field.name}: " in World.__doc__ for field in fields(World))


@given(seeds, worlds(tagged=True), st.sampled_from(list(TAGS)))
def test_a_tagged_trace_opens_with_its_word_and_fits(rng, world, form):
    drawn = problem(rng, world)
    row = tagged_trace(rng, drawn, world, form)
    assert row.completion[0] == TAGS[form] and row.completion.count(THINK_END) == 1
    assert not set(TAGS.values()) & set(row.completion[1:])
    assert len(row.completion) <= world.longest and set(row.tokens) <= set(vocabulary(world))
    assert final(row) is not None and (form != "direct" or final(row) == drawn.answer)
    assert row.loss_mask == (0,) * row.prompt_length + (1,) * len(row.completion)


@given(seeds, worlds(tagged=True, noise=0.3))
def test_a_long_trace_ends_with_the_first_pass_that_agrees_with_another(rng, world):
    words = tagged_trace(rng, problem(rng, world), world, "long").completion
    *earlier, last = [value for so, value in itertools.pairwise(words) if so == SO]
    assert len(set(earlier)) == len(earlier)
    assert last not in earlier or words[-2] == last


def test_the_formats_of_one_problem_by_hand():
    world = World(tagged=True, noise=0.0, hesitation=0.0, verbosity=0.0, plan=0.0, max_passes=2)
    drawn = Problem("S 5 A +3 B *2", "2", 2)
    found = {form: " ".join(tagged_trace(random.Random(0), drawn, world, form).completion) for form in TAGS}
    steps = "S 5 A +3 1 B *2 2 so 2"
    assert found == {
        "direct": "<DIRECT> </think> 2 <eos>",
        "short": f"<COT> {steps} </think> 2 <eos>",
        "code": "<CODE> 5 +3 1 *2 2 </think> 2 <eos>",
        "long": f"<LONG_COT> {steps} wait check {steps} </think> 2 <eos>",
    }


def test_tags_are_words_of_a_tagged_world_alone_and_the_last_ones():
    plain, tagged = vocabulary(World()), vocabulary(World(tagged=True))
    assert tagged == (*plain, *TAGS.values())
    with pytest.raises(UserError, match=r"world\.tagged: 1 is neither true nor false"):
        World(tagged=1)
