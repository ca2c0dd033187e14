"""DLER: the plainest length penalty, truncation, with an advantage that is normalised over the batch.

Paper: Liu et al., "DLER: Doing Length pEnalty Right - Incentivizing More Intelligence per Token via Reinforcement
Learning", 2025 (arXiv 2510.15110); code: NVlabs/DLER, a fork of verl, whose formulas these are. In the order of the
code below, with c_i = 1 for a correct response:

    r_i <- 0.1 * r_i      where the response did not end with an end-of-sequence token               shape
    d_i = r_i - mean of the group
    A_i = (d_i - mean of d) / sqrt(variance of d + 1e-8)    both over all trained tokens of the window, so a response
                                                            weighs by its length; the variance is unbiased
    A_i <- A_i + 0.1 c_i                                                                             credit

The bonus goes by the score before the penalty: a correct response that was cut has it too. Both 0.1 were read in the
code only, and so was the whitening over tokens; the paper's own equations could not be read, its abstract says
"batch-wise reward normalization". With rewards of 0 and 1, a wrong answer is worth 0 with and without the penalty and
a correct one never less, so there is nothing to gate.

The rest of the recipe is TRL's and the frame's: trainer.max_completion_length=4000 (the truncation),
trainer.epsilon=0.2 trainer.epsilon_high=0.28 trainer.delta=10 (dual clip), trainer.beta=5e-4, trainer.loss_type=dapo
(token mean), trainer.learning_rate=1e-6, 256 prompts x 16 responses in mini-batches of 64 prompts, and
+rows=dynamic_sampling.

Deviations: the moments are those of the generation window. Difficulty-aware truncation and the merging of weights, also
in the paper, are left out.
"""

from typing import Annotated

import torch
from torch import Tensor

from rltoken.ops import group_mean
from rltoken.ranges import Range


def unfinished(rewards: Tensor, truncated: Tensor, *, factor: Annotated[float, Range(least=0, most=1)] = 0.1) -> Tensor:
    """[B] rewards, times `factor` where the completion was cut.

    Args:
        rewards: [B] float, NaN where nothing was graded, which stays.
        truncated: [B] bool.
    """
    return torch.where(truncated, factor * rewards, rewards)


def dler(
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    boost: Annotated[float, Range(least=0)] = 0.1,
) -> Tensor:
    """[B] advantages: centred by group, whitened over the window's tokens, raised for correct answers.

    Args:
        rewards: [B] float; NaN where nothing was graded, whose advantage is NaN and which no moment counts.
        correct: [B] bool.
        group: [B].
        mask: [B, T] 1 on trained tokens.
        boost: what the advantage of a correct answer gains after whitening.
    """
    centred = rewards.double() - group_mean(rewards.double(), group)
    tokens = mask.sum(1).double().masked_fill(centred.isnan(), 0.0)
    known, total = centred.nan_to_num(0.0), tokens.sum().clamp(min=1)
    mean = (tokens * known).sum() / total
    variance = (tokens * (known - mean).square()).sum() / (total - 1).clamp(min=1)
    return ((centred - mean) * (variance + 1e-8).rsqrt() + boost * correct).to(rewards.dtype)
