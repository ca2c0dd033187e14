"""Problems of the embedded world as data sets."""

import random
from collections.abc import Callable
from dataclasses import replace

from datasets import Dataset

from rltoken.errors import UserError
from rltoken.tiny.world import TAGS, Problem, Split, Trace, World, problem, split_of, tagged_trace, trace


def problems(n: int, *, world: World | None = None, seed: int = 0, split: Split = "train") -> Dataset:
    """Draw distinct problems of one split.

    Which split a problem belongs to depends on its text alone, so that train and eval share no problem whatever their
    sizes and seeds; the warm start sees problems of the train split only.

    Args:
        n: How many.
        world: The knobs; the default world where None.
        seed: Of the drawing.
        split: `train` or `eval`.

    Returns:
        Columns `prompt` (one user message), `answer`, `id` (unique within a world) and `level` (operations).

    Raises:
        UserError: `n` is not positive, the split is unknown, or the world has too few problems.
    """
    if split not in ("train", "eval"):
        raise UserError(f"data: there is no split {split!r}. Set data.train.split=train and data.eval.split=eval.")
    if n < 1:
        raise UserError(f"data.{split}.n: {n} problems are too few. Set it to 1 or more.")
    world = world or World()
    rng = random.Random(f"{seed}/{split}")
    # An eval problem takes ten draws on average; a world that gives so few new ones is all but exhausted.
    found = _distinct(n, 100 * n + 10_000, lambda: problem(rng, world), split)
    if len(found) < n:
        raise UserError(
            f"data.{split}.n: this world has too few {split} problems for {n}, {len(found)} were found."
            f" Set data.{split}.n={len(found)} or raise world.max_operations."
        )
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "answer": drawn.answer,
                "id": f"tiny-{split}-{prompt.replace(' ', '')}",
                "level": drawn.level,
            }
            for prompt, drawn in found.items()
        ]
    )


def traces(n: int, *, world: World | None = None, seed: int = 0) -> Dataset:
    """Draw problems of the train split with whole completions, for a supervised stage.

    In a tagged world their formats take turns, and a wrong trace is as frequent as its steps' noise makes it: that is
    what longer thinking is worth its tokens for. In any other world they go through their problem at least twice and
    come to the right answer, as worked solutions are selected that a model is to learn from.

    Args:
        n: How many; problems may recur.
        world: The knobs; the default world where None.
        seed: Of the drawing.

    Returns:
        Columns `prompt` (one user message), `completion` (text after the opening of thinking, without `<eos>`) and, in
        a tagged world, `format`.

    Raises:
        UserError: `n` is not positive.
    """
    if n < 1:
        raise UserError(f"data.traces.n: {n} traces are too few. Set it to 1 or more.")
    world = world or World()
    rng, forms = random.Random(f"{seed}/traces"), tuple(TAGS)
    rows = []
    while len(rows) < n:
        drawn = problem(rng, world)
        if split_of(drawn.prompt) != "train":
            continue
        form = forms[len(rows) % len(forms)]
        found = tagged_trace(rng, drawn, world, form) if world.tagged else _worked(rng, drawn, world)
        row = {
            "prompt": [{"role": "user", "content": drawn.prompt}],
            "completion": " ".join(found.completion[:-1]),
        }
        rows.append(row | ({"format": form} if world.tagged else {}))
    return Dataset.from_list(rows)


def _worked(rng: random.Random, problem: Problem, world: World) -> Trace:
    """A trace that checks itself and is right; the last try where none of a hundred is."""
    careful = replace(world, single=0.0, cut=0.0)
    for _ in range(100):
        found = trace(rng, problem, careful)
        if found.completion[-2] == problem.answer:
            break
    return found


def _distinct(n: int, draws: int, draw: Callable[[], Problem], split: Split) -> dict[str, Problem]:
    """Up to n distinct problems of a split by their text, from at most so many draws."""
    found = {}
    for _ in range(draws):
        if len(found) == n:
            break
        drawn = draw()
        if split_of(drawn.prompt) == split:
            found[drawn.prompt] = drawn
    return found
