"""LaSeR: a model that grades its own answer by the probability of one unused token after the last.

Paper: Yang et al., "LaSeR: Reinforcement Learning with Last-Token Self-Rewarding", ICLR 2026 (arXiv 2510.14943); code:
RUCBM/LaSeR, a fork of verl, which was read; the paper's equations were read at second hand. It is not the length reward
LASER of `rltoken.methods.laser` (arXiv 2505.15612). In the order of the code, z the unused token (`model.appended`),
read right after the end of the response y_i, and r_i = 1 or 0 what the grader says:

    s_i = scale (log pi(z | x, y_i) - reference)                                      self-reward
    w_i = N / (2 N_c) for the N_c correct, N / (2 N_w) for the N_w wrong ones, N = N_c + N_w
    L   = L_policy + alpha 1/N sum_i w_i (s_i - r_i)^2
    A_i = (1 - share) A_i + share (s_i - mean of the group) / (std of the group)      where std > least, else A_i

The closed form of the problem "maximise the agreement with the grader, near the reference policy" says that the
log-ratio of such a token is the reward over its scale; pi_ref(z) is next to 0 and nearly the same after every response,
so that a constant `reference` takes its place and no reference model is run. A self-reward of 1 is a probability of
2e-6 of a token that is never sampled: reasoning is hardly disturbed. Responses that were cut have no such position:
they are in no loss, and their self-reward is 0 in A.

Paper's settings: scale 0.1, alpha 0.1, share 0.1, least 0.1, reference -23 (-25 for OctoThinker), z <|vision_start|> of
Qwen's tokenizer. The loss begins after a first, the mixing after a second warm-up: 0 and 200 steps for a model that
reasons already, 200 and 400 for a base model. With trainer.scale_rewards=group, A_i is the paper's normalised reward;
with none it would be of another scale than what is mixed in, which is refused.

Where paper and code disagree: the paper normalises s as it is (`clamp=false`, the default), the code clamps it to
[0, 1] first. The code puts z into the forward of the update but not into the one that A is made of, so that there s is
the probability of whatever token follows; here both read z. The code's `step > w_r + w_sr` counts steps from 1, so the
mixing acts once that many are done, as here; the paper's box has another count.

Deviations: class weights and means are of the window, not of a micro-batch, so that accumulation changes nothing. The
probability is that at the sampling temperature, and `reference` has to be measured at the same one, as
docs/methods/last_token.md says.
"""

import logging
from typing import Annotated

import torch
from torch import Tensor

from rltoken.ops import group_mean, group_std, masked_mean
from rltoken.ranges import Range
from rltoken.types import Progress

logger = logging.getLogger(__name__)

Number = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
FromZero = Annotated[float, Range(least=0)]
Steps = Annotated[int, Range(least=0, whole=True)]
MOST_SPREAD, MOST_DISTANCE = 0.5, 1.0
"""Nats: the standard deviation of what a constant may stand for, and how far that may be from the mean."""


def self_reward(logps: Tensor | float, *, scale: float, reference: float) -> Tensor | float:
    """Self-rewards from log-probabilities of the appended token, of any shape: near 1 for correct, 0 for wrong."""
    return scale * (logps - reference)


def class_balance(correct: Tensor, rewards: Tensor, truncated: Tensor) -> Tensor:
    """[B] mark: the weight of a response's error, so that correct and wrong ones weigh the same in the mean over rows.

    Args:
        correct: [B] bool.
        rewards: [B] NaN where nothing was graded.
        truncated: [B] bool.

    Returns:
        N / (2 N_c) or N / (2 N_w), times B / N; 0 for what was cut or not graded, which is not among the N.
    """
    counted = ~(truncated | rewards.isnan())
    size = torch.where(correct, (counted & correct).sum(), (counted & ~correct).sum()).clamp(min=1)
    return counted * correct.numel() / (2.0 * size)


def self_reward_loss(
    appended: Tensor,
    class_balance: Tensor,
    correct: Tensor,
    progress: Progress,
    *,
    alpha: FromZero = 0.1,
    scale: Positive = 0.1,
    reference: Number = -23.0,
    after: Steps = 0,
) -> tuple[Tensor, dict[str, float]]:
    """[B] unreduced loss, and metrics: how well the self-reward tells correct from wrong.

    Args:
        appended: [B] with gradient: log-probability of the appended token.
        class_balance: [B] the weights of `class_balance`.
        correct: [B] bool, what the self-reward is to predict.
        progress: how many optimizer steps are done.
        alpha: weight against the policy loss.
        scale, reference: as in `self_reward`.
        after: optimizer steps without this loss.
    """
    assert appended.shape == class_balance.shape == correct.shape
    rewards = self_reward(appended, scale=scale, reference=reference)
    errors = class_balance * (rewards - correct.to(rewards.dtype)).square()
    hits = class_balance * ((rewards > 0.5) == correct)
    metrics = {
        "self_reward/error": errors.mean().item(),
        "self_reward/balanced_accuracy": hits.mean().item(),
    }
    counted = class_balance > 0
    if counted.any():  # where a completion was cut there is no such position
        metrics["self_reward/log_prob"] = masked_mean(appended.detach(), counted).item()
    return alpha * (progress.step >= after) * errors, metrics


def mix_self_reward(
    advantages: Tensor,
    old_appended: Tensor,
    truncated: Tensor,
    group: Tensor,
    progress: Progress,
    *,
    share: Annotated[float, Range(least=0, most=1)] = 0.1,
    least: FromZero = 0.1,
    clamp: bool = False,
    scale: Positive = 0.1,
    reference: Number = -23.0,
    after: Steps = 200,
) -> Tensor:
    """[B, T] advantages, a part of them by the self-reward where it tells the responses of a group apart.

    Before the first step it warns where `reference` is a poor stand-in for what the untrained model says.

    Args:
        advantages: [B, T].
        old_appended: [B] log-probability of the appended token under the policy that sampled.
        truncated: [B] bool: no self-reward can be had, and 0 stands for it.
        group: [B].
        progress: how many optimizer steps are done.
        share: of the self-reward in the advantage.
        least: groups whose self-rewards have no greater standard deviation (unbiased) keep their advantages.
        clamp: bring self-rewards into [0, 1] first.
        scale, reference: as in `self_reward`.
        after: optimizer steps before any mixing.
    """
    if progress.step == 0:
        warn_of_poor_reference(old_appended[~truncated], reference)
    if progress.step < after:
        return advantages
    rewards = self_reward(old_appended, scale=scale, reference=reference).masked_fill(truncated, 0.0)
    rewards = rewards.clamp(0.0, 1.0) if clamp else rewards
    spread = group_std(rewards, group)
    told = (rewards - group_mean(rewards, group)) / spread.clamp(min=torch.finfo(spread.dtype).tiny)
    mixed = (1 - share) * advantages + share * told.unsqueeze(1)
    return torch.where((spread > least).unsqueeze(1), mixed, advantages)


mix_self_reward.among_standardised = True
mix_self_reward.same_as = {"scale": self_reward_loss, "reference": self_reward_loss}


def warn_of_poor_reference(logps: Tensor, reference: float) -> None:
    """Warn where log-probabilities [N] of the appended token before training vary much, or lie far from `reference`."""
    if len(logps) < 2:
        return
    spread, mean = (value.item() for value in torch.std_mean(logps))
    if spread > MOST_SPREAD:
        logger.warning(
            "model.appended: before training the token's log-probability varies by %.2f nats (standard deviation) from "
            "completion to completion, so that no constant stands for it; above %g set another token.",
            spread,
            MOST_SPREAD,
        )
    if abs(mean - reference) > MOST_DISTANCE:
        logger.warning(
            "method.aux.self_reward.reference: it is %g, and before training the log-probability of model.appended is "
            "%.2f in the mean; set it to that.",
            reference,
            mean,
        )
