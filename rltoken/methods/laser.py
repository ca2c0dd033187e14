"""LASER: a bonus for correct answers within a target length; LASER-D and -DE: a target that follows the difficulty.

Paper: Liu et al., "Learn to Reason Efficiently with Adaptive Length-based Reward Shaping", 2025 (arXiv 2505.15612);
code: hkust-nlp/Laser, in which everything below was read.

    base          c_i if correct, c_i + wrong if not (the code's base scores are 1 and -1/2)
    LASER         r_i = base + bonus 1[n_i <= target]                            correct; base otherwise
    difficulty    share of correct answers in the group: easy from 2/3, medium from 1/3, else hard
    target(d)     smallest threshold of a grid that covers enough of the answers at difficulty d:
                  int(coverage k_d) >= 1, k_d = int(2G/3), int(G/3), 1 for easy, medium, hard
    LASER-D       r_i = base + bonus 1[n_i <= target(d)]                         correct; base otherwise
    LASER-DE      as LASER-D, and base + bonus 1[n_i > target(d)] for a wrong answer that does not repeat itself

c_i is the reward, n_i the tokens of the whole completion; coverage counts wrong answers too, as in the code. With G = 8
the shares are 0.2, 0.5 and 1. LASER-DE lets wrong answers explore at length: that is what `gated` leaves out, so that
LASER-DE gated is LASER-D.

Deviations:
- The authors measure the coverage on 500 problems set apart, every 20 steps; here it is that of the training windows
  since the last choice. The first window chooses from its own answers, so that there is a target from the start.
- In the authors' measurement a share of exactly 1/3 or 2/3 counts as the harder class, in their reward as the easier
  one; here as the easier in both.
- Where no threshold covers enough, the target is the highest; the authors take the window's longest completion.
- k_d is at least 1: with G = 2 the authors' int(G/3) is 0, which no coverage reaches.
- Repetition is looked for in words, not tokens, and without the authors' rules for short texts: the same four words
  three times anywhere.
"""

import copy
from collections import Counter
from typing import Annotated, Any

import torch
from torch import Tensor

from rltoken.ops import gate_by_success, group_mean
from rltoken.ranges import Count, Range, check

Bonus = Annotated[float, Range(least=0)]
Penalty = Annotated[float, Range(most=0)]
LEVELS = 3


def laser(
    rewards: Tensor,
    correct: Tensor,
    lengths: Tensor,
    *,
    target: Count = 8192,
    bonus: Bonus = 0.5,
    wrong: Penalty = -0.5,
) -> Tensor:
    """[B] rewards with a bonus for correct answers of at most `target` tokens.

    Args:
        rewards: [B]; `correct`: [B] bool.
        lengths: [B] tokens of the whole completion.
        target: tokens.
        bonus: what staying within them adds.
        wrong: what is added to the reward of every wrong answer.
    """
    return base_score(rewards, correct, wrong) + bonus * (correct & (lengths <= target))


def base_score(rewards: Tensor, correct: Tensor, wrong: float) -> Tensor:
    """[B] rewards, with `wrong` added to those of wrong answers."""
    return torch.where(correct, rewards, rewards + wrong)


class LaserD:
    """LASER-D (gated) and LASER-DE (not gated); its state is the targets and the coverage since they were chosen."""

    def __init__(
        self,
        *,
        lowest: Count = 4096,
        highest: Count = 16384,
        interval: Count = 1024,
        every: Count = 20,
        bonus: Bonus = 0.5,
        wrong: Penalty = -0.5,
        gated: bool = True,
    ):
        """Nothing is known yet.

        Args:
            lowest, highest, interval: the grid of thresholds, tokens.
            every: windows from one choice of targets to the next.
            bonus: what a correct answer within the target, or a wrong one beyond it, gains.
            wrong: what is added to the reward of every wrong answer.
            gated: length counts for correct answers only (LASER-D); False: LASER-DE.

        Raises:
            ValueError: a setting that is out of range, or a grid without a threshold.
        """
        grid = {"lowest": lowest, "highest": highest, "interval": interval}
        check(LaserD.__init__, {**grid, "every": every, "bonus": bonus, "wrong": wrong, "gated": gated})
        if lowest > highest:
            raise ValueError(f"highest: {highest} is below lowest={lowest}; raise it")
        self.thresholds = list(range(lowest, highest + 1, interval))
        self.every, self.bonus, self.wrong, self.gated = every, bonus, wrong, gated
        self.windows, self.targets = 0, [highest] * LEVELS
        self._forget()

    def __call__(self, rewards: Tensor, correct: Tensor, group: Tensor, lengths: Tensor, texts: list[str]) -> Tensor:
        """[B] rewards with the bonus of each answer.

        Args:
            rewards: [B]; `correct`: [B] bool; `group`: [B].
            lengths: [B] tokens of the whole completion.
            texts: B completions.
        """
        level = difficulty(rewards, correct, group)
        self._observe(level[~rewards.isnan()], lengths[~rewards.isnan()])
        if self.windows % self.every == 0:
            self._choose(len(group) // group.unique().numel())
        self.windows += 1
        within = lengths <= lengths.new_tensor(self.targets)[level]
        base = base_score(rewards, correct, self.wrong)
        if self.gated:
            return gate_by_success(base + self.bonus * within, base, correct, group)
        repeats = torch.tensor([repetitive(text) for text in texts], device=rewards.device)
        return base + self.bonus * torch.where(correct, within, ~within & ~repeats)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on alike."""
        state = {"windows": self.windows, "targets": self.targets, "seen": self.seen, "covered": self.covered}
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: it was counted on another grid of thresholds.
        """
        if len(state["covered"][0]) != len(self.thresholds):
            raise ValueError("the checkpoint has another grid of thresholds; resume with its lowest, highest, interval")
        state = copy.deepcopy(state)
        self.windows, self.targets = state["windows"], state["targets"]
        self.seen, self.covered = state["seen"], state["covered"]

    def _forget(self) -> None:
        self.seen, self.covered = [0] * LEVELS, [[0] * len(self.thresholds) for _ in range(LEVELS)]

    def _observe(self, level: Tensor, lengths: Tensor) -> None:
        """Count the answers of each level, and those that each threshold covers."""
        for i in range(LEVELS):
            own = lengths[level == i]
            within = (own.unsqueeze(1) <= own.new_tensor(self.thresholds)).sum(0).tolist()
            self.seen[i] += len(own)
            self.covered[i] = [before + new for before, new in zip(self.covered[i], within, strict=True)]

    def _choose(self, group_size: int) -> None:
        """Take for each level the smallest threshold that covers enough of what was counted, and count anew."""
        for i, expected in enumerate((1, group_size // 3, 2 * group_size // 3)):
            enough = [
                threshold
                for threshold, covered in zip(self.thresholds, self.covered[i], strict=True)
                if covered and covered * max(1, expected) >= self.seen[i]
            ]
            self.targets[i] = enough[0] if enough else self.thresholds[-1]
        self._forget()


def difficulty(rewards: Tensor, correct: Tensor, group: Tensor) -> Tensor:
    """[B] long: 2 where at least 2/3 of the graded answers of the group are correct, 1 from 1/3, else 0."""
    accuracy = group_mean(correct.double().masked_fill(rewards.isnan(), torch.nan), group)
    return (accuracy >= 1 / 3).long() + (accuracy >= 2 / 3).long()


def repetitive(text: str, size: int = 4, times: int = 3) -> bool:
    """Whether some `size` words in a row occur `times` times."""
    words = text.split()
    runs = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
    return max(runs.values(), default=0) >= times
