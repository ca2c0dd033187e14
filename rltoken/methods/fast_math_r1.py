"""Fast-Math-R1: format, a cosine of the length and Kimi's length reward, added up.

Paper: Yoshihara, Yamaguchi and Inoue, "A Practical Two-Stage Recipe for Mathematical LLMs: Maximizing Accuracy with SFT
and Efficiency with Reinforcement Learning", 2025 (arXiv 2507.08267); code: analokmaus/kaggle-aimo2-fast-math-r1, in
which the rewards were read.

    format_i = 1 if the thinking holds a box, that is, one is closed before the end of thinking; else 0
    p_i      = min(1, n_i / longest)
    cosine_i = 0.1 + 0.45 (1 + cos(pi p_i))       correct: from 1 down to 0.1
               -0.1 - 0.45 (1 + cos(pi p_i))      wrong: from -1 up to -0.1
    kimi_i   = the length reward of `rltoken.methods.kimi_length`
    r_i      = format_i + cosine_i + kimi_i

The sum takes the place of the reward: the cosine holds the correctness. It is the reward of the recipe's second stage;
the first, supervised fine-tuning on long traces, is `rltoken.supervised`.

- As published n_i counts characters and longest is 30000 (48000 for other models). By default here it counts the tokens
  of the whole completion, and longest is 10000, at about three characters per token. `unit` changes both.
- As published, min and max of Kimi's reward run over all completions of a device, which mixes two problems; here over
  the group. A gold answer that cannot be parsed counts as correct there; here it leaves the row without a reward.
- As published, a long wrong answer is worth more than a short one. Gated, a wrong answer has its reward and that of the
  format, whatever its length, and a correct one never falls below it.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

from rltoken.methods.kimi_length import length_reward
from rltoken.ops import gate_by_success
from rltoken.ranges import Range

LONGEST = {"tokens": 10_000, "characters": 30_000}
RIGHT, WRONG = (0.1, 1.0), (-0.1, -1.0)
"""The cosine at the longest length, and at length 0."""


def fast_math_r1(
    texts: list[str],
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    lengths: Tensor,
    *,
    unit: Literal["tokens", "characters"] = "tokens",
    longest: Annotated[int | None, Range(least=1, whole=True, none=True)] = None,
    think_end: str = "</think>",
    gated: bool = True,
) -> Tensor:
    """[B] sums of the three rewards.

    Args:
        texts: B completions.
        rewards: [B]; `correct`: [B] bool; `group`: [B].
        lengths: [B] tokens of the whole completion.
        unit: what a length counts.
        longest: the length at which the cosine ends, in that unit; None: 10000 tokens, 30000 characters.
        think_end: what ends thinking.
        gated: length changes the reward of correct answers only, and never to below a wrong one; False: as published.
    """
    counted = lengths if unit == "tokens" else lengths.new_tensor([len(text) for text in texts])
    n = counted.to(rewards.dtype)
    format_reward = rewards.new_tensor([boxed_while_thinking(text, think_end) for text in texts])
    cosine = cosine_reward(n / (longest or LONGEST[unit]), correct)
    graded = ~rewards.isnan()
    shaped = format_reward + cosine + length_reward(n, correct, group, graded)
    shaped = shaped.masked_fill(~graded, torch.nan)
    return gate_by_success(shaped, rewards + format_reward, correct, group) if gated else shaped


def boxed_while_thinking(text: str, think_end: str) -> bool:
    """Whether a box is opened and closed before the last end of thinking."""
    thinking, ended, _ = text.rpartition(think_end)
    opened = thinking.find("oxed{")
    return bool(ended) and opened >= 0 and thinking.find("}", opened) >= 0


def cosine_reward(share: Tensor, correct: Tensor) -> Tensor:
    """[B] half a cosine from length 0 to the longest.

    Args:
        share: [B] the length's share of the longest.
        correct: [B] bool.
    """
    fall = (1 + torch.cos(torch.pi * share.clamp(max=1))) / 2
    right, wrong = (end + (start - end) * fall for end, start in (RIGHT, WRONG))
    return torch.where(correct, right, wrong)
