"""Structure of a completion, apart from whether its answer is right.

    boxed        a box with an answer after the thinking
    structured   thinking, one end of thinking, answer, in this order
    tag_counts   the share of some tags that occur exactly as often as they should
    free_of      none of some foreign tags

Each works alone in a stock `GRPOTrainer`, and from YAML by `_target_` with `_partial_: true`. Unlike `structured`,
TRL's own `trl.rewards.think_format_reward` demands the opening tag, and nothing of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rltoken.rewards.text import THINK_END, Completion, content, final_part, last_box


def boxed(completions: Sequence[Completion], *, think_end: str | None = None, **_: object) -> list[float]:
    r"""1.0 for each completion with a balanced, non-empty `\boxed{...}` after its thinking, otherwise 0.0.

    Args:
        completions: B completions, plain or conversational.
        think_end: the marker that must precede the answer (`rltoken.rewards.text.final_part`).
    """
    parts = [final_part(content(completion), think_end) for completion in completions]
    return [float(part is not None and last_box(part) is not None) for part in parts]


def structured(
    completions: Sequence[Completion],
    *,
    think_start: str = "<think>",
    think_end: str = THINK_END,
    answer_start: str = "",
    answer_end: str = "",
    **_: object,
) -> list[float]:
    """1.0 for each completion that is [think_start] thinking think_end [answer_start] answer [answer_end], else 0.0.

    Thinking and answer each hold more than white space and none of the tags; white space around the parts is free. The
    opening tag may be missing, since many templates end the prompt with it. An answer tag that is given is obligatory.

    Args:
        completions: B completions, plain or conversational.
        think_start, think_end: the tags around the thinking.
        answer_start, answer_end: the tags around the answer; empty: it needs none.
    """
    tags = [tag for tag in (think_start, think_end, answer_start, answer_end) if tag]

    def filled(part: str) -> bool:
        return bool(part.strip()) and not any(tag in part for tag in tags)

    def fits(text: str) -> bool:
        thinking, _, answer = (part.strip() for part in text.partition(think_end))
        if not (answer.startswith(answer_start) and answer.endswith(answer_end)):
            return False
        inside = answer.removeprefix(answer_start).removesuffix(answer_end)
        return filled(thinking.removeprefix(think_start)) and filled(inside)

    return [float(fits(content(completion))) for completion in completions]


def tag_counts(completions: Sequence[Completion], *, tags: Mapping[str, int], **_: object) -> list[float]:
    """The share of `tags` that occur exactly as often as they should, in [0, 1], wherever they stand.

    Args:
        completions: B completions, plain or conversational.
        tags: tag -> number of times, as in {"</think>": 1}; 0 for one that must not occur.

    Raises:
        ValueError: there is no tag, or an empty one.
    """
    _check_tags(tags)
    texts = [content(completion) for completion in completions]
    return [sum(text.count(tag) == times for tag, times in tags.items()) / len(tags) for text in texts]


def free_of(completions: Sequence[Completion], *, tags: Sequence[str], **_: object) -> list[float]:
    """1.0 for each completion with none of `tags`, such as those of another format, otherwise 0.0.

    Args:
        completions: B completions, plain or conversational.
        tags: what must not occur.

    Raises:
        ValueError: there is no tag, or an empty one, or a single string in the place of a list.
    """
    _check_tags(tags)
    return [float(not any(tag in content(completion) for tag in tags)) for completion in completions]


def _check_tags(tags: Mapping[str, int] | Sequence[str]) -> None:
    if isinstance(tags, str) or not tags or not all(tags):
        raise ValueError(f"tags={tags!r} is not possible; give at least one tag, and no empty one")
