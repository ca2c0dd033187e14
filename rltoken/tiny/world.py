"""The embedded world: chains of operations modulo a small number, and traces that reason about them.

A problem is a start value and a few operations, each with a letter, `S 5 A +3 B *2 C -4`. A trace goes through them one
by one, `S 5 A +3 1 B *2 2 C -4 5 so 5`, may open with a plan, hesitate, and go through the whole chain again
(`wait check`), and ends in `</think> 5 <eos>`. A step's result is wrong now and then and the error propagates, so that
a re-check carries information, accuracy below one comes from the data, and longer thinking is better thinking.

An operation with its operand is one token: the fact to learn is then local (previous result, operation -> result). With
separate tokens models of this size do not learn it.

Everything here is a pure function of its arguments and of the `random.Random` it is handed; no torch is needed.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rltoken.errors import UserError

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
THINK, THINK_END = "<think>", "</think>"
START, SO, PLAN, HESITATION, QUICK, LAST = "S", "so", "plan", "hmm", "quick", "#"
RECHECK = ("wait", "check")
FILLERS = ("ok", "let", "see", "then")
LETTERS = tuple("ABCDEFGHI")
TAGS = {"direct": "<DIRECT>", "short": "<COT>", "code": "<CODE>", "long": "<LONG_COT>"}
"""Format of a trace -> the word that opens it, in a tagged world."""
STYLES = ("F1", "F2", "F3")
# What may stand between `</think>` and the answer. `=` also closes every prompt.
FORMATS: tuple[tuple[str, ...], ...] = ((), ("ans",), ("=",))
# What `#` adds. A shift has no fixed point, so that skipping `#` always gives a wrong answer.
LAST_SHIFT = 3

_EVAL_SHARE = 10  # one problem text in ten belongs to the eval split

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class World:
    """The knobs of the world. All `float` knobs are probabilities.

    Args:
        modulus: All values are residues of this number, 4 to 10.
        min_operations: The easiest level: the fewest operations of a problem.
        max_operations: The hardest level; levels are drawn uniformly. At most 8.
        noise: A step's result is wrong (uniform over the other residues), and the error propagates.
        styles: Where not empty, every step opens with one of this many style tokens (at most 3), drawn uniformly, and
            the entry is the noise of the steps of that style, in place of `noise`.
        max_passes: The most passes through the chain of one trace; all but the first are re-checks.
        single: A trace has a single pass.
        stop: A trace with re-checks stops after a pass as soon as two passes agree.
        plan: A trace opens with a plan, which lists the letters.
        hesitation: A step opens with `hmm`.
        verbosity: A step opens with a filler word: the mean over traces. A trace's own value is drawn once, uniformly
            from 0 to twice this one, so that some traces are terse and others talkative. At most 0.5.
        cut: A trace is cut at a random place by a forced `</think>`, which carries no loss, and followed by the *true*
            answer. It teaches to answer from unfinished thinking without teaching to stop early.
        last: A problem ends in one more operation, `#`, which adds 3 (not counted in the level).
        shortcut: A step of the first pass opens with `quick`; from there on the trace skips `#`, in its re-checks too.
            It is the same wrong answer wherever it occurs, so that a shortcut agrees with itself. Needs `last`.
        formats: How many answer formats occur, of `5`, `ans 5` and `= 5`, drawn uniformly; all are graded alike.
        tagged: There are words for the four formats of traces (`TAGS`), and `tiny.traces` is written in them.
        longest: No completion, `<eos>` included, has more tokens: a re-check that would not fit is left out. At most
            400, for the model's 512 positions.

    Raises:
        UserError: A knob is out of its range.
    """

    modulus: int = 7
    min_operations: int = 2
    max_operations: int = 5
    noise: float = 0.035
    styles: tuple[float, ...] = ()
    max_passes: int = 4
    single: float = 0.2
    stop: float = 0.75
    plan: float = 0.3
    hesitation: float = 0.06
    verbosity: float = 0.1
    cut: float = 0.15
    last: float = 0.0
    shortcut: float = 0.0
    formats: int = 1
    tagged: bool = False
    longest: int = 112

    def __post_init__(self):
        # A list from a configuration file would make the world unhashable and unequal to its twin.
        object.__setattr__(self, "styles", tuple(self.styles))
        _check_ranges(self)
        if self.shortcut > 0 and self.last == 0:
            raise UserError("world.shortcut: there is no '#' to skip. Set world.last, the share of problems with one.")
        needed = _longest_first_pass(self)
        if self.longest < needed:
            raise UserError(
                f"world.longest: one pass may take {needed} tokens, got {self.longest}. Set it to {needed}."
            )


@dataclass(frozen=True)
class Problem:
    """One problem: its text, the gold answer in normal form, and the number of its operations without `#`."""

    prompt: str
    answer: str
    level: int


@dataclass(frozen=True)
class Trace:
    """A supervised row: prompt and completion as words, which of them carry loss, and where the completion begins."""

    tokens: tuple[str, ...]
    loss_mask: tuple[int, ...]
    prompt_length: int

    @property
    def completion(self) -> tuple[str, ...]:
        return self.tokens[self.prompt_length :]


def digits(world: World) -> tuple[str, ...]:
    """The values of a world as words."""
    return tuple(str(value) for value in range(world.modulus))


def operations(world: World) -> tuple[str, ...]:
    """The operations of a world but `#`: those that leave every value as it is are left out."""
    shifts = tuple(f"{sign}{k}" for sign in "+-" for k in range(1, world.modulus))
    return shifts + tuple(f"*{k}" for k in range(2, world.modulus))


def vocabulary(world: World) -> tuple[str, ...]:
    """All words of a world; a word's index is its token id. It depends on `modulus` and `tagged` only."""
    words = (THINK, THINK_END, START, SO, PLAN, HESITATION, QUICK, LAST, *RECHECK, *FILLERS, *STYLES)
    openings = tuple(word for opening in FORMATS for word in opening)
    tags = TAGS.values() if world.tagged else ()
    return (PAD, EOS, UNK, *words, *openings, *LETTERS, *digits(world), *operations(world), *tags)


def apply(operation: str, value: int, modulus: int) -> int:
    """The result of one operation, `+3`, `-3`, `*3` or `#`, on a value."""
    if operation == LAST:
        return (value + LAST_SHIFT) % modulus
    operand = int(operation[1:])
    match operation[0]:
        case "+":
            return (value + operand) % modulus
        case "-":
            return (value - operand) % modulus
        case "*":
            return (value * operand) % modulus
    raise ValueError(f"unknown operation {operation!r}")


def parse(prompt: str) -> tuple[int, tuple[str, ...]]:
    """The start value and the operations of a problem's text."""
    words = prompt.split()
    return int(words[1]), tuple(words[3::2])


def solve(prompt: str, world: World) -> str:
    """The true answer of a problem's text, by executing it."""
    value, chain = parse(prompt)
    for operation in chain:
        value = apply(operation, value, world.modulus)
    return str(value)


def split_of(prompt: str) -> Split:
    """The split that a problem belongs to, by its text alone: no seed and no size can make the splits overlap."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % _EVAL_SHARE == 0 else "train"


def problem(rng: random.Random, world: World) -> Problem:
    """Draw a problem of a uniformly drawn level."""
    level = rng.randint(world.min_operations, world.max_operations)
    chain = rng.choices(operations(world), k=level)
    if rng.random() < world.last:
        chain.append(LAST)
    steps = (word for step in zip(LETTERS, chain, strict=False) for word in step)
    prompt = " ".join((START, str(rng.randrange(world.modulus)), *steps))
    return Problem(prompt, solve(prompt, world), level)


def trace(rng: random.Random, problem: Problem, world: World) -> Trace:
    """Draw a supervised trace of a problem.

    Args:
        rng: The source of all randomness.
        problem: What to reason about.
        world: The knobs.

    Returns:
        The words of prompt and completion, from `S` to `<eos>`. The loss mask is 0 on the prompt and on a forced
        `</think>`, 1 elsewhere.
    """
    thinking, answer = _think(rng, problem, world)
    cut = rng.random() < world.cut
    if cut:
        thinking, answer = thinking[: rng.randrange(len(thinking))], problem.answer
    prompt = (*problem.prompt.split(), "=", THINK)
    summary = (*rng.choice(FORMATS[: world.formats]), answer, EOS)
    mask = (0,) * len(prompt) + (1,) * len(thinking) + (0 if cut else 1,) + (1,) * len(summary)
    return Trace((*prompt, *thinking, THINK_END, *summary), mask, len(prompt))


def tagged_trace(rng: random.Random, problem: Problem, world: World, form: str) -> Trace:
    """Draw a trace in one of the formats of `TAGS`, opened by its word; all of the completion carries loss.

    direct: `<DIRECT> </think> 5`, the true answer without thinking. short: one pass. code: one pass as a program,
    `<CODE> 5 +3 1 *2 2`, without letters. long: a pass and re-checks until two agree. But for direct, steps are wrong
    now and then.

    Args:
        rng: The source of all randomness.
        problem: What to reason about.
        world: The knobs.
        form: A key of `TAGS`.
    """
    start, chain = parse(problem.prompt)
    if form == "direct":
        thinking, answer = [], problem.answer
    elif form == "long":
        thinking, answer = _think(rng, problem, replace(world, single=0.0, stop=1.0))
    else:
        words, value, _ = _pass(rng, start, chain, world, filler=0.0, quick=False, first=True)
        dropped = {START, SO, *LETTERS, *STYLES, HESITATION} if form == "code" else set()
        thinking, answer = [word for word in words if word not in dropped], str(value)
        if form == "code":
            thinking = thinking[:-1]  # what follows `so`
    prompt = (*problem.prompt.split(), "=", THINK)
    completion = (TAGS[form], *thinking, THINK_END, *rng.choice(FORMATS[: world.formats]), answer, EOS)
    return Trace((*prompt, *completion), (0,) * len(prompt) + (1,) * len(completion), len(prompt))


def _think(rng: random.Random, problem: Problem, world: World) -> tuple[list[str], str]:
    """The thinking of one trace and the answer it comes to."""
    start, chain = parse(problem.prompt)
    words = [PLAN, *LETTERS[: len(chain)]] if rng.random() < world.plan else []
    wanted = 1 if rng.random() < world.single else world.max_passes
    filler = rng.uniform(0, 2 * world.verbosity)
    room = world.longest - _summary_length(world)
    found: list[int] = []
    quick = False
    while len(found) < wanted:
        steps, value, quick = _pass(rng, start, chain, world, filler=filler, quick=quick, first=not found)
        steps = [*RECHECK, *steps] if found else steps
        if found and len(words) + len(steps) > room:
            break
        words += steps
        found.append(value)
        if found.count(value) > 1 and rng.random() < world.stop:
            break
    # The value that most passes came to; among equals the latest.
    answer = max(reversed(found), key=found.count)
    return words, str(answer)


def _pass(
    rng: random.Random, value: int, chain: Sequence[str], world: World, *, filler: float, quick: bool, first: bool
) -> tuple[list[str], int, bool]:
    """One pass through the chain: its words, the value it comes to, and whether `#` is skipped from now on."""
    words = [START, str(value)]
    for letter, operation in zip(LETTERS, chain, strict=False):
        if operation == LAST and quick:
            continue
        noise = world.noise
        if world.styles:
            style = rng.randrange(len(world.styles))
            noise = world.styles[style]
            words.append(STYLES[style])
        if first and operation != LAST and not quick and rng.random() < world.shortcut:
            quick = True
            words.append(QUICK)
        if rng.random() < filler:
            words.append(rng.choice(FILLERS))
        if rng.random() < world.hesitation:
            words.append(HESITATION)
        value = apply(operation, value, world.modulus)
        if rng.random() < noise:
            value = (value + rng.randrange(1, world.modulus)) % world.modulus
        words += [letter, operation, str(value)]
    return [*words, SO, str(value)], value, quick


def _summary_length(world: World) -> int:
    """The most tokens from `</think>` to `<eos>`, and the word that opens a tagged trace."""
    return max(len(opening) for opening in FORMATS[: world.formats]) + 3 + world.tagged


def _longest_first_pass(world: World) -> int:
    """The most tokens of a completion with a single pass."""
    steps = world.max_operations + (world.last > 0)
    step = 3 + bool(world.styles) + (world.verbosity > 0) + (world.hesitation > 0)
    plan = 1 + steps if world.plan > 0 else 0
    return plan + 2 + steps * step + (world.shortcut > 0) + 2 + _summary_length(world)


def _check_ranges(world: World) -> None:
    hardest = len(LETTERS) - 1  # one letter is left for `#`
    counts = {
        "modulus": (4, 10),
        "min_operations": (1, hardest),
        "max_operations": (1, hardest),
        "max_passes": (1, 16),
        "formats": (1, len(FORMATS)),
        "longest": (1, 400),
    }
    for knob, (low, high) in counts.items():
        value = getattr(world, knob)
        if not isinstance(value, int) or not low <= value <= high:
            raise UserError(f"world.{knob}: {value!r} is no whole number from {low} to {high}. Set it to one.")
    if world.min_operations > world.max_operations:
        raise UserError(
            f"world.min_operations: {world.min_operations} is more than world.max_operations, {world.max_operations}."
            " Lower the one or raise the other."
        )
    shares = dict.fromkeys(("noise", "single", "stop", "plan", "hesitation", "cut", "last", "shortcut"), 1.0)
    for knob, high in {**shares, "verbosity": 0.5}.items():
        if not _is_share(getattr(world, knob), high):
            raise UserError(f"world.{knob}: {getattr(world, knob)!r} is no number from 0 to {high}. Set it to one.")
    if len(world.styles) > len(STYLES) or not all(_is_share(noise, 1.0) for noise in world.styles):
        raise UserError(f"world.styles: give at most {len(STYLES)} probabilities, one per style; got {world.styles}.")

    if not isinstance(world.tagged, bool):
        raise UserError(f"world.tagged: {world.tagged!r} is neither true nor false. Set it to one of them.")


def _is_share(value: object, high: float) -> bool:
    return isinstance(value, int | float) and 0 <= value <= high
