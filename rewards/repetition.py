"""Completions that end in a loop (CAMPO).

Paper: Li et al., "MiroMind-M1: An Open-Source Advancement in Mathematical Reasoning via Context-Aware Multi-Stage
Policy Optimization", 2025 (arXiv 2507.14683); code: MiroMindAsia/MiroMind-M1. For a completion o of n tokens:

    a loop of period L ends o if its last m(L) >= 2 blocks of L tokens, no fewer, are equal
    f(o) = max over L of m(L) L / n     the share of o inside its loop, the larger the earlier it began
    r    = r - f(o)

The released code differs twice. Of several periods the longest counts, whatever it covers: at the end of 1 2 3 4 5 6 6
6 6 6 it sees 6 6 | 6 6 (0.4 of the tokens), not 6 | 6 | 6 | 6 | 6 (0.5). And of the ratio only its sign is used: a
completion that was cut and ends in a loop loses 0.1, every other one nothing. `loop_share` has both readings of the
ratio, `loop` both penalties; the paper's is the default.

Both see tokens, never characters. A loop is what the completion ends in: repetition in the middle is none, nor is one
that an end-of-sequence token follows. One that is broken off within a block is found as the loop of the shifted block.

The penalty for repeated n-grams of Yeo et al., "Demystifying Long Chain-of-Thought Reasoning in LLMs", 2025 (arXiv
2502.03373), is TRL's: `trl.rewards.get_repetition_penalty_reward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rltoken.rewards.text import Completion

Reading = Literal["paper", "code"]


def loop(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    reading: Reading = "paper",
    longest: int | None = None,
    penalty: float = 0.1,
    min_repeats: int = 2,
    **_: object,
) -> list[float]:
    """What each completion loses for the loop it ends in, a number from -1 to 0 to be added to its reward.

    Args:
        completions: B completions; only their tokens are looked at.
        completion_ids: B lists of token ids, as TRL hands them on.
        reading: 'paper' takes the share of the loop, `loop_share`; 'code' takes `penalty` for any loop.
        longest: only completions of at least so many tokens, which were cut, lose anything; None: all. The released
            code is reading='code' with trainer.max_completion_length here.
        penalty: what a loop costs by the code.
        min_repeats: how often a block must stand at the end to be a loop.

    Raises:
        ValueError: an unknown reading, or `min_repeats` below 2.
    """
    shares = [
        loop_share(ids, reading=reading, min_repeats=min_repeats) if len(ids) >= (longest or 0) else 0.0
        for ids in completion_ids
    ]
    return [0.0 - (share if reading == "paper" else penalty * (share > 0)) for share in shares]


def loop_share(tokens: Sequence[Any], *, reading: Reading = "paper", min_repeats: int = 2) -> float:
    """The share of `tokens` inside the loop that they end in, in [0, 1]; 0 where there is none.

    Takes time linear in their number.

    Args:
        tokens: n of anything that can be compared, in order.
        reading: of several periods, 'paper' takes the one that covers most, 'code' the longest.
        min_repeats: the least number of equal blocks.

    Raises:
        ValueError: an unknown reading, or `min_repeats` below 2.
    """
    if reading not in ("paper", "code"):
        raise ValueError(f"reading={reading!r} is not possible; choose paper or code")
    if min_repeats < 2:
        raise ValueError(f"min_repeats={min_repeats} is not possible; a block must stand at least twice to repeat")
    n = len(tokens)
    shared = shared_prefixes(tokens[::-1])
    covers = []
    for period in range(1, n // min_repeats + 1):
        blocks = 1 + shared[period] // period
        if blocks >= min_repeats:
            covers.append(blocks * period)
    if not covers:
        return 0.0
    return (max(covers) if reading == "paper" else covers[-1]) / n


def shared_prefixes(tokens: Sequence[Any]) -> list[int]:
    """For every position, how many tokens from there on equal those from the start (the Z-function); n at position 0.

    Makes at most 2n comparisons: what lies inside the match that reaches furthest is known from its copy at the start.
    """
    n = len(tokens)
    shared = [n] + [0] * (n - 1) if n else []
    start = end = 0
    for i in range(1, n):
        length = min(shared[i - start], end - i) if i < end else 0
        if i + length >= end:
            while i + length < n and tokens[length] == tokens[i + length]:
                length += 1
            start, end = i, i + length
        shared[i] = length
    return shared
