"""HAPO (history-aware): be shorter than the shortest correct answer ever given to the same problem.

Paper: Huang, Zhang and Cardie, "HAPO: Training Language Models to Reason Concisely via History-Aware Policy
Optimization", 2025 (arXiv 2505.11225); code: HCY123902/HAPO. The formula was read in the code and agrees with what is
recalled of the paper. Another HAPO (Heterogeneous Adaptive, arXiv 2509.16591) has nothing to do with it.

    h       shortest correct length for the prompt in all windows before this one
    f_i   = cos(min(pi/2 n_i / h, pi))                              1 at length 0, 0 at h, -1 from 2 h on
    r_i  <- c_i + weight max(f_i, floor)    correct
            c_i + weight min(f_i, 0)        wrong
            c_i                             where there is no h yet
    h    <- min(h, the shortest correct length of this window)

c_i is the reward, n_i the tokens of the whole completion. weight = 1, floor = -0.7, so that a correct answer is worth
at least 0.3. The table of h is state: it goes into checkpoints, and is the same on every rank, since a shape stage sees
the window of all ranks.

Deviations: the code counts re-tokenised text without special tokens, here completion tokens count. Its variants (a mean
as history, a linear reward, a repetition penalty of weight 0) are left out. As published, a wrong answer longer than h
loses; gated, its length does not matter. A prompt is known by its text, so what prompt stages add is part of it.
"""

import math
from typing import Annotated

import torch
from torch import Tensor

from rltoken.ops import gate_by_success
from rltoken.ranges import Range, check

Weight = Annotated[float, Range(least=0)]
Floor = Annotated[float, Range(least=-1, most=0)]


class HapoHistory:
    """The length reward of HAPO; its state is the shortest correct length of every prompt seen."""

    across_epochs = True

    def __init__(self, *, weight: Weight = 1.0, floor: Floor = -0.7, gated: bool = True):
        """Start with an empty history.

        Args:
            weight: of the length reward.
            floor: the least length reward of a correct answer.
            gated: shape correct answers only, and never to below a wrong one; False: all, as published.

        Raises:
            ValueError: a setting that is out of range.
        """
        check(HapoHistory.__init__, {"weight": weight, "floor": floor, "gated": gated})
        self.weight, self.floor, self.gated = weight, floor, gated
        self.shortest: dict[str, int] = {}

    def __call__(
        self, rewards: Tensor, correct: Tensor, group: Tensor, prompt_id: list[str], lengths: Tensor
    ) -> Tensor:
        """[B] rewards with the length reward against the history, which then takes in this window.

        Args:
            rewards: [B]; `correct`: [B] bool; `group`: [B].
            prompt_id: B hashes of prompts.
            lengths: [B] tokens of the whole completion.
        """
        history = rewards.new_tensor([self.shortest.get(prompt, math.nan) for prompt in prompt_id])
        curve = torch.cos((math.pi / 2 * lengths / history).clamp(max=math.pi)).nan_to_num(0.0)
        bounded = torch.where(correct, curve.clamp(min=self.floor), curve.clamp(max=0.0))
        shaped = rewards + self.weight * bounded
        for prompt, length, right in zip(prompt_id, lengths.tolist(), correct.tolist(), strict=True):
            if right:
                self.shortest[prompt] = min(length, self.shortest.get(prompt, length))
        return gate_by_success(shaped, rewards, correct, group) if self.gated else shaped

    def state_dict(self) -> dict[str, int]:
        """The shortest correct length of every prompt, by its hash."""
        return dict(self.shortest)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what `state_dict` gave."""
        self.shortest = dict(state)
