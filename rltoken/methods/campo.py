"""CAMPO: completions that may grow in stages, a clip range per stage, and a penalty for ending in a loop.

Paper: Li et al., "MiroMind-M1: An Open-Source Advancement in Mathematical Reasoning via Context-Aware Multi-Stage
Policy Optimization", 2025 (arXiv 2507.14683); code: MiroMindAsia/MiroMind-M1. In the order of the code below:

    L(s), phi_low(s), phi_high(s)       longest completion and clip range of stage s                           control
    s <- s + 1                          once the lengths are saturated, or at a step
    f(o) in [0, 1]                      share of the completion inside the loop it ends in, rltoken.rewards.repetition
    r_i <- r_i - f(o_i)                                                                        (eq. 6)         shape
    A_i  = (r_i - mean_j r_j) / std_j r_j                                                                      TRL's
    J    = E[ 1 / sum_i |o_i| sum_i sum_t min(rho_it A_i, clip(rho_it, 1 - phi_low(s), 1 + phi_high(s)) A_i) ]
           subject to 0 < #correct < G

The objective is TRL's: trainer.loss_type=dapo (the mean over the window's tokens), no KL, trainer.delta=10 for the dual
clip of the authors' framework. The constraint is +rows=dynamic_sampling, which looks at the raw reward, that is, before
the penalty, as theirs does. Without the penalty and with one stage this is DAPO, bit for bit.

Paper and released code disagree about the penalty (`reading`). The code computes f, by the longest period instead of
the one that covers most, and uses its sign alone: a completion that was cut and ends in a loop loses the constant 0.1,
every other one nothing. Its options for repetition are never read. The default is the paper's.

Settings: 16384 tokens, then 32768 after 1200 steps (7B, paper and script), and 49152 (32B, paper); the scripts have 0.2
and 0.28 in every stage, the paper speaks of distributions of clip bounds and names none.

Deviations: when lengths count as saturated is ours, since the paper shows curves and no rule: the mean length of the
last `windows` windows is at most 1 + `rise` times that of as many before them, within the stage. A step is an optimizer
step. Dynamic sampling refills the window in place, where the authors collect up to ten generation batches and keep a
random part of the groups. TRL divides by std + 1e-4, they by std + 1e-6. Of their reward only correctness is here
(reward=math); the steps 301 to 360 that their trainer skips are not skipped.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rltoken.methods.think_prune import Stages
from rltoken.ranges import Count, Idle, Range, check
from rltoken.rewards.repetition import loop_share
from rltoken.rollout.forced import tokens_of
from rltoken.types import LastWindow, Progress

Width = Range(least=0)


def is_list(value: Any) -> bool:
    """Whether a setting is a list, which a text is not."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def are_clips(clips: Sequence[Sequence[float]], stages: Sequence[Sequence[float]]) -> None:
    """Let one pair [low, high] for all stages pass, or one for each of them."""
    told = "set it to [[0.2,0.28]], or to one such pair for each stage"
    if not is_list(clips) or not all(is_list(pair) and len(pair) == 2 for pair in clips):
        raise ValueError(f"{clips!r} is not possible; {told}")
    if len(clips) not in (1, len(stages)):
        raise ValueError(f"{len(clips)} clip ranges are not possible for {len(stages)} stages; {told}")
    for width in (width for pair in clips for width in pair):
        Width(width)


Clips = Annotated[Sequence[Sequence[float]], are_clips]
Windows = Annotated[int | None, Range(least=1, whole=True, none=True)]
Rise = Annotated[float, Range(least=0), Idle("windows", None)]
PAPER = ((0, 0.5), (1200, 1.0))
LONGEST = 32768


class StagedLength:
    """The control that lets completions grow stage by stage.

    Its state is the stage and the mean lengths of its last windows. It is the same on every rank.
    """

    def __init__(
        self,
        *,
        stages: Stages = PAPER,
        clips: Clips = ((0.2, 0.28),),
        longest: Count = LONGEST,
        windows: Windows = 20,
        rise: Rise = 0.02,
    ) -> None:
        """Start in the first stage.

        Args:
            stages: pairs of an optimizer step, at which the stage begins if it has not yet, and the longest completion
                from then on: tokens, or a fraction of `longest`.
            clips: the clip range below and above 1, one for all stages or one for each.
            longest: the longest completion of all, tokens.
            windows: over how many generation windows the lengths are averaged; None: stages begin at their steps alone.
            rise: by what share the mean length must have risen not to be saturated.

        Raises:
            ValueError: a setting that is out of range.
        """
        settings = {"longest": longest, "stages": stages, "clips": clips, "windows": windows, "rise": rise}
        check(StagedLength.__init__, settings)
        self.steps = [step for step, _ in stages]
        self.limits = [tokens_of(limit, longest) for _, limit in stages]
        self.clips = list(clips) * (len(stages) if len(clips) == 1 else 1)
        self.windows, self.rise = windows, rise
        self.stage = 0
        self.lengths: list[float] = []

    def __call__(self, progress: Progress, last_window: LastWindow | None) -> dict[str, Any]:
        """The longest completion and the clip range of the next window; takes in the mean length of the last one."""
        if last_window is not None and self.windows is not None:
            self.lengths = [*self.lengths, last_window.mean_length][-2 * self.windows :]
        due = sum(step <= progress.step for step in self.steps) - 1
        reached = max(due, self.stage + saturated(self.lengths, self.windows, self.rise))
        reached = min(reached, len(self.limits) - 1)
        if reached > self.stage:
            self.stage, self.lengths = reached, []
        low, high = self.clips[self.stage]
        return {"max_completion_length": self.limits[self.stage], "epsilon": low, "epsilon_high": high}

    def state_dict(self) -> dict[str, Any]:
        """The stage and the lengths it has seen."""
        return {"stage": self.stage, "lengths": list(self.lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; of fewer stages than there were then, the last one."""
        self.stage, self.lengths = min(state["stage"], len(self.limits) - 1), list(state["lengths"])


def saturated(lengths: Sequence[float], windows: int | None, rise: float) -> bool:
    """Whether the last `windows` of the mean lengths are, on average, within `rise` of as many before them."""
    if windows is None or len(lengths) < 2 * windows:
        return False
    return sum(lengths[-windows:]) <= (1 + rise) * sum(lengths[-2 * windows : -windows])


def without_loops(
    rewards: Tensor,
    completion_ids: list[list[int]],
    truncated: Tensor,
    *,
    reading: Literal["paper", "code"] = "paper",
    penalty: Annotated[float, Range(least=0), Idle("reading", "paper")] = 0.1,
    min_repeats: Annotated[int, Range(least=2, whole=True)] = 2,
) -> tuple[Tensor, dict[str, float]]:
    """[B] rewards less what the loop costs that a completion ends in, and how much of the window is loops.

    Right and wrong answers pay alike, since the loop of a wrong one is what is to go away; with rewards of 0 and 1 no
    wrong answer is lifted above a correct one.

    Args:
        rewards: [B] float; NaN where nothing was graded, which stays.
        completion_ids: B lists of token ids.
        truncated: [B] bool.
        reading: 'paper' takes the share of the completion inside the loop; 'code' takes `penalty` for any loop of a
            completion that was cut.
        penalty: what a loop costs by the code.
        min_repeats: how often a block must stand at the end to be a loop.
    """
    assert rewards.shape == truncated.shape == (len(completion_ids),)
    shares = [loop_share(ids, reading=reading, min_repeats=min_repeats) for ids in completion_ids]
    share = torch.tensor(shares, dtype=rewards.dtype, device=rewards.device)
    looping = share > 0
    cost = share if reading == "paper" else penalty * (looping & truncated)
    metrics = {"campo/looping": looping.float().mean().item(), "campo/loop_share": share.mean().item()}
    return rewards - cost, metrics
