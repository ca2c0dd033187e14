"""Structure of a completion, apart from whether its answer is right."""

from __future__ import annotations

from collections.abc import Sequence

from rltoken.rewards.text import Completion, content, final_part, last_box


def boxed(completions: Sequence[Completion], *, think_end: str | None = None, **_: object) -> list[float]:
    r"""1.0 for each completion with a balanced, non-empty `\boxed{...}` after its thinking, otherwise 0.0.

    Args:
        completions: B completions, plain or conversational.
        think_end: the marker that must precede the answer (`rltoken.rewards.text.final_part`).
    """
    parts = [final_part(content(completion), think_end) for completion in completions]
    return [float(part is not None and last_box(part) is not None) for part in parts]
