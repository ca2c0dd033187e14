"""Dynamic sampling: groups whose rewards are all equal teach nothing and are replaced by fresh ones.

Paper: Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", 2025 (arXiv 2503.14476), eq. 11:
0 < |{o_i correct}| < G for every group of the window.

Deviation: the window is refilled in place for at most `max_rounds` rounds; groups without spread left then stay
(their advantage is zero), so that the number of rows never changes. Prompts come from a stream of their own.

Logged per window (mean over ranks): `dynamic_sampling/dropped` groups that were replaced, `/rounds` of sampling after
the first, `/flat` the share of groups without spread that are left.
"""

import dataclasses

import torch
from torch import Tensor

from rltoken.ranges import Count
from rltoken.types import Rollout, Sampler


def dynamic_sampling(rollout: Rollout, sampler: Sampler, *, max_rounds: Count = 3) -> Rollout:
    """Replace groups without spread in their raw total reward, before other stages grow rows from them.

    Args:
        rollout: thinking rows only.
        max_rounds: how often to draw and sample for what is missing.

    Raises:
        ValueError: the rollout is not graded yet.
    """
    if not rollout.graded:
        raise ValueError("there is no reward yet, since sampling stops at the end of thinking")
    size, dropped, rounds = rollout.group_size, 0, 0
    flat = flat_groups(sampler.total(rollout.rewards), size)
    while rounds < max_rounds and sampler.most(len(flat)):
        prompts = sampler.draw(len(flat))
        fresh = sampler.roll([prompt for prompt in prompts for _ in range(size)])
        rollout = replace_groups(rollout, fresh, flat)
        dropped, rounds = dropped + len(flat), rounds + 1
        flat = flat_groups(sampler.total(rollout.rewards), size)
    counts = {"dropped": dropped, "rounds": rounds, "flat": len(flat) * size / len(rollout.inputs)}
    metrics = {f"dynamic_sampling/{name}": float(count) for name, count in counts.items()}
    return dataclasses.replace(rollout, metrics=rollout.metrics | metrics)


dynamic_sampling.replaces_rows = True


def flat_groups(rewards: Tensor, size: int) -> list[int]:
    """Numbers of the groups of `size` successive rows whose rewards [B] are all equal (NaN counts as no reward)."""
    groups = rewards.view(-1, size)
    spread = torch.where(groups.isnan(), -torch.inf, groups).amax(1) > torch.where(
        groups.isnan(), torch.inf, groups
    ).amin(1)
    return (~spread).nonzero().flatten().tolist()


def replace_groups(rollout: Rollout, fresh: Rollout, numbers: list[int]) -> Rollout:
    """Put the groups of `fresh`, in order, in the place of the groups `numbers` of `rollout`."""
    size = rollout.group_size
    inputs, texts, rows, extras = map(list, (rollout.inputs, rollout.texts, rollout.rows, rollout.extras))
    rewards = rollout.rewards.clone()
    for source, number in enumerate(numbers):
        new, old = slice(source * size, (source + 1) * size), slice(number * size, (number + 1) * size)
        inputs[old], texts[old], extras[old] = fresh.inputs[new], fresh.texts[new], fresh.extras[new]
        rewards[old] = fresh.rewards[new]
        rows[old] = [dataclasses.replace(row, parent=old.start + i) for i, row in enumerate(fresh.rows[new])]
    return dataclasses.replace(rollout, inputs=inputs, texts=texts, rows=rows, rewards=rewards, extras=extras)
