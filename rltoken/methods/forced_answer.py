"""Train the answer that the model gives when its thinking is cut short.

Source: the decoupled summary of AnytimeReasoner (Qi et al., "Optimizing Anytime Reasoning via Budget Relative Policy
Optimization", 2025, arXiv 2505.13438), reduced to one answer per trace: thinking z is cut at a random share of its
length, the end of thinking is forced, and the answer y is sampled and graded.

    added row   [prompt | z_{<=b} | </think> | y]     only y is trained
    A_y         r_y - mean of r_y over the group      (no division by the spread)

It adds one row of kind 'summary' per thinking row, and is the smallest stage that uses everything an added row has.
"""

import dataclasses
import random

from torch import Tensor

from rltoken.ops import group_mean
from rltoken.signals import thinking_length
from rltoken.types import Rollout, Row, Sampler

SUMMARY = "summary"


def forced_answer(
    rollout: Rollout, sampler: Sampler, *, shortest: float = 0.25, longest: float = 0.75, max_new_tokens: int = 16
) -> Rollout:
    """Add one forced answer per thinking row.

    Args:
        shortest, longest: the share of the thinking that is kept, drawn uniformly.
        max_new_tokens: tokens of the answer.

    Raises:
        ValueError: the model has no end-of-thinking token to force.
    """
    if sampler.think_end_id is None:
        raise ValueError("forcing an answer needs an end-of-thinking token; set model.think_end")
    thinking = rollout.rows[: len(rollout.inputs)]
    shares = [
        # drawn per (seed, step, prompt, sibling), so that the number of ranks changes nothing
        random.Random(f"{rollout.seed} {rollout.progress.step} {row.prompt_ids} {i % rollout.group_size}").uniform(
            shortest, longest
        )
        for i, row in enumerate(thinking)
    ]
    kept = [
        row.completion_ids[: int(share * thinking_length(row.completion_ids, sampler.think_end_id))]
        for row, share in zip(thinking, shares, strict=True)
    ]
    forced = [[*ids, sampler.think_end_id] for ids in kept]
    answers = sampler.generate(
        [row.prompt_ids + ids for row, ids in zip(thinking, forced, strict=True)], max_new_tokens=max_new_tokens
    )
    completions = [ids + answer.ids for ids, answer in zip(forced, answers, strict=True)]
    rewards = sampler.total(sampler.grade(rollout.inputs, completions))
    added = [
        Row(
            prompt_ids=row.prompt_ids,
            completion_ids=completion,
            train_mask=[0] * len(ids) + [1] * len(answer.ids),
            logps=None if answer.logps is None else [0.0] * len(ids) + answer.logps,
            kind=SUMMARY,
            parent=i,
            reward=float(rewards[i]),
        )
        for i, (row, ids, answer, completion) in enumerate(zip(thinking, forced, answers, completions, strict=True))
    ]
    return dataclasses.replace(rollout, rows=[*rollout.rows, *added])


def group_centred(rewards: Tensor, group: Tensor, *, kinds: tuple[str, ...] = (SUMMARY,)) -> Tensor:
    """[B] reward minus the mean of the row's group, without division by the spread (Dr. GRPO's form)."""
    return rewards - group_mean(rewards, group)
