"""Train the answer that the model gives when its thinking is cut short.

Source: the decoupled summary of AnytimeReasoner (Qi et al., "Optimizing Anytime Reasoning via Budget Relative Policy
Optimization", 2025, arXiv 2505.13438), reduced to one answer per trace: thinking z is cut at a random share of its
length, the end of thinking is forced, and the answer y is sampled and graded.

    added row   [prompt | z_{<=b} | </think> | y]     only y is trained
    A_y         r_y - mean of r_y over the group      (no division by the spread)

It adds one row of kind 'summary' per thinking row, and is the smallest stage that uses everything an added row has.
"""

from dataclasses import replace
from typing import Annotated

from torch import Tensor

from rltoken.ops import group_mean
from rltoken.ranges import Count, Range
from rltoken.rng import seeded
from rltoken.rollout.forced import SUMMARY, Prefix, sample_answers
from rltoken.signals import thinking_length
from rltoken.types import Rollout, Sampler


def forced_answer(
    rollout: Rollout,
    sampler: Sampler,
    *,
    shortest: Annotated[float, Range(least=0, most=1)] = 0.25,
    longest: Annotated[float, Range(least=0, most=1)] = 0.75,
    max_new_tokens: Count = 16,
) -> Rollout:
    """Add one forced answer per thinking row.

    Args:
        shortest, longest: the share of the thinking that is kept, drawn uniformly.
        max_new_tokens: tokens of the answer.

    Raises:
        ValueError: the model's template forces nothing where thinking is cut.
    """
    branches = []
    for i, row in enumerate(rollout.rows[: len(rollout.inputs)]):
        rng = seeded(rollout.seed, rollout.progress.step, row.prompt_ids, i % rollout.group_size)
        length = thinking_length(row.completion_ids, sampler.template.think_end_id)
        kept = row.completion_ids[: int(rng.uniform(shortest, longest) * length)]
        branches.append((i, Prefix(kept, sampler.template.cut, closed=False)))
    rows, raw, _ = sample_answers(rollout, sampler, branches, max_new_tokens=max_new_tokens)
    added = [replace(row, reward=score) for row, score in zip(rows, sampler.total(raw).tolist(), strict=True)]
    return replace(rollout, rows=[*rollout.rows, *added])


def group_centred(rewards: Tensor, group: Tensor, *, kinds: tuple[str, ...] = (SUMMARY,)) -> Tensor:
    """[B] reward minus the mean of the row's group, without division by the spread (Dr. GRPO's form)."""
    return rewards - group_mean(rewards, group)
