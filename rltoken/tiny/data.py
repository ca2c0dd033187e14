"""Problems of the embedded world as data sets."""

import random
from collections.abc import Callable

from datasets import Dataset

from rltoken.errors import UserError
from rltoken.tiny.world import Problem, Split, World, problem, split_of


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
