"""HAPO (heterogeneous adaptive): sampling, advantage, credit and clip range that follow each token's entropy.

Paper: Liu et al., "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature", 2025 (arXiv
2509.16591); code: starriver030515/HAPO. The paper's equations were read at second hand, the code's in its repository.
History-aware HAPO (`hapo_history`) has nothing to do with it.

Four parts, each a stage that also acts alone. H is a token's entropy in nats under the policy that sampled, Q the 0.8
quantile (nearest rank) and sigma the population standard deviation of log H over the trained tokens of a window, g and
eps as configured, r the importance ratio. In the order of the code:

    g     = log H - Q
    h     = g / max g where g > 0, else g / |min g|                          in [-1, 1], 0 at the pivot Q
    T_t   = T (1 + tau (log H_t - Q) / sigma)      Q, sigma of the window before; the first window is sampled at T  ATS
    A     = (r_i - mean) / (std + 1e-6)            both over all tokens of the group, std of the population         TGA
    low   = eps_low (1 - alpha h) where h <= 0     else eps_low                                                     AAC
    high  = eps_high (1 + alpha h) where h > 0     else eps_high
    A    <- A (1 + beta h)                         where h > 0 and r is outside of (1 - low/2, 1 + high/2),         DAR
                                                   or h <= 0 and r is inside

Where paper and code disagree:
- `sign`. As transcribed from the paper, and in the code, the lower branch of h is -g / |min g|, which is positive: then
  tokens of low entropy are widened upwards and amplified, and the branches for h <= 0 act at the pivot alone. That
  contradicts the stated range of [-1, 1] and what these branches are for. Default: 'intended'; 'released' is the other.
- `form` of the temperature. 'paper' is the line above, unbounded. The code has T (1 + tau clamp(h, -1, 1)) with tau =
  0.05 and its h: 'released', or with the intended sign 'scaled'.
- `fallback_at`. The code gives a group its plain GRPO advantages (unbiased std + 1e-6) once one of TGA's reaches 5. Not
  in the paper as transcribed: default none.
- eps_high is 0.28 in the paper, 0.2 in every released script. The code divides g by its root mean square about Q in the
  place of sigma, which cancels in h.

Deviations: Q and the scales are those of the generation window under the policy that sampled, fixed for the window (the
code: of each micro-batch under the current policy). The entropy while sampling is taken at T, as the trainer's is (the
code: at 1). Every token is sampled between a tenth of T and twice T: the paper's line would turn negative far below Q,
and where a window has hardly any spread the next one may lie many of its sigmas away. As in the paper, the ratio is
that of the policies at T, and sampling at T_t is not corrected for.

On-policy (one optimizer step a window) r is 1: no clip range is ever reached, and DAR only damps tokens of low entropy.
The rest of the recipe is TRL's: trainer.loss_type=dapo, trainer.delta=10 (dual clip), no KL, and dynamic sampling.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rltoken.ops import group_amax, group_mean, group_std, group_sum, nearest_rank
from rltoken.ranges import Range, Share, check

Sign = Literal["intended", "released"]
Strength = Annotated[float, Range(least=0)]
Width = Annotated[float, Range(least=0)]
LEAST_ENTROPY = 1e-8
"""What an entropy is raised to before its logarithm, as in the code's training (its sampling: 1e-6)."""
COLDEST, HOTTEST = 0.1, 2.0
"""The shares of the temperature between which every token is sampled."""


@dataclass(frozen=True)
class Landmarks:
    """Of the logarithms of a window's entropies: the quantile, the standard deviation, and what lies above and below.

    `above` is the distance of the largest from `pivot`, `below` that of the smallest; both are 0 or more.
    """

    pivot: float
    sigma: float
    above: float
    below: float


def log_entropy(entropy: Tensor) -> Tensor:
    """The logarithm of entropies in nats, of any shape, in double precision."""
    return entropy.double().clamp(min=LEAST_ENTROPY).log()


def landmarks(entropy: Tensor, mask: Tensor, rho: float) -> Landmarks | None:
    """The landmarks of the trained tokens' entropies; None where there is no such token.

    Args:
        entropy: [B, T] nats.
        mask: [B, T] 1 on trained tokens.
        rho: the quantile, in (0, 1].
    """
    logs = log_entropy(entropy[mask.bool()])
    if not logs.numel():
        return None
    pivot = nearest_rank(logs, rho)
    found = (pivot, logs.std(correction=0), logs.max() - pivot, pivot - logs.min())
    return Landmarks(*(value.item() for value in found))


def level(entropy: Tensor, mask: Tensor, rho: float, sign: Sign) -> Tensor:
    """[B, T] h: where each token's entropy lies among those of the window; 0 on tokens that are not trained.

    Args:
        entropy: [B, T] nats, under the policy that sampled.
        mask: [B, T] 1 on trained tokens.
        rho: the quantile at which h is 0.
        sign: of the tokens below it: 'intended' is negative, 'released' positive.
    """
    assert entropy.shape == mask.shape, (entropy.shape, mask.shape)
    marks = landmarks(entropy, mask, rho)
    if marks is None:
        return torch.zeros_like(entropy)
    offset = (log_entropy(entropy) - marks.pivot).masked_fill(mask == 0, 0.0)
    below = marks.below if sign == "intended" else -marks.below
    side = torch.where(offset > 0, offset.new_tensor(marks.above), offset.new_tensor(below))
    return torch.where(offset == 0, 0.0, offset / side).to(entropy.dtype)


class AdaptiveTemperature:
    """The control that makes sampling hotter where the policy is undecided, and colder where it is not.

    Its state is what the last window's entropies were. It is the same on every rank.
    """

    changes_logits = True

    def __init__(
        self,
        *,
        temperature: Annotated[float, Range(above=0)] = 1.0,
        tau: Strength = 0.1,
        rho: Share = 0.8,
        form: Literal["paper", "scaled", "released"] = "paper",
    ) -> None:
        """Start without a window.

        Args:
            temperature: trainer.temperature, around which it moves.
            tau: how far.
            rho: the quantile of the entropies that is sampled at `temperature` itself.
            form: 'paper' (standard deviations, unbounded), 'scaled' (h, bounded) or 'released' (h with its sign).

        Raises:
            ValueError: a setting that is out of range.
        """
        check(AdaptiveTemperature.__init__, {"temperature": temperature, "tau": tau, "rho": rho, "form": form})
        self.temperature, self.tau, self.rho, self.form = temperature, tau, rho, form
        self.marks: Landmarks | None = None

    def __call__(self) -> dict[str, Any]:
        """The change of logits for the next window; none before the first window, or where all entropies were equal."""
        marks = self.marks
        if marks is None or not marks.sigma:
            return {}
        if self.form == "paper":
            sides = {"above": marks.sigma, "below": marks.sigma, "limit": None}
        else:
            below = -marks.below if self.form == "released" else marks.below
            sides = {"above": marks.above, "below": below, "limit": 1.0}
        settings = {"temperature": self.temperature, "tau": self.tau, "pivot": marks.pivot, **sides}
        return {"logits": functools.partial(tempered, **settings)}

    def observe(self, old_entropy: Tensor, mask: Tensor) -> None:
        """Take in the entropies [B, T] of a window; one without a trained token changes nothing."""
        self.marks = landmarks(old_entropy, mask, self.rho) or self.marks

    def state_dict(self) -> dict[str, float]:
        """The landmarks of the last window, or nothing."""
        return asdict(self.marks) if self.marks else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` gave."""
        self.marks = Landmarks(**state) if state else None


def tempered(
    logits: Tensor, *, temperature: float, tau: float, pivot: float, above: float, below: float, limit: float | None
) -> Tensor:
    """[n, V] logits divided by T_t / T, so that dividing them by T, which every back end does next, samples at T_t.

    Args:
        logits: [n, V] float, of the next token of n sequences.
        temperature: T, at which the entropy is taken.
        tau: how far the temperature moves per unit.
        pivot: the log-entropy that is sampled at T.
        above, below: the unit above and below the pivot; 0 where no token of the last window lay there.
        limit: how many units count at most; None: any.
    """
    probabilities = (logits / temperature).softmax(-1)
    offset = log_entropy(torch.special.entr(probabilities).sum(-1, keepdim=True)) - pivot
    units = offset / torch.where(offset > 0, offset.new_tensor(above), offset.new_tensor(below))
    if limit is not None:
        units = units.clamp(-limit, limit).nan_to_num(0.0)  # at the pivot, beside which no token lay: 0 / 0
    return logits / (1 + tau * units).clamp(COLDEST, HOTTEST).to(logits.dtype)


def token_average(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    fallback_at: Annotated[float | None, Range(above=0, none=True)] = None,
) -> Tensor:
    """[B] advantages: the reward standardised over the tokens of the group, so that a response weighs by its length.

    Args:
        rewards: [B] float; NaN where nothing was graded, whose advantage is NaN and which no statistic counts.
        group: [B] long.
        mask: [B, T] 1 on trained tokens.
        fallback_at: a group in which an advantage is this far from 0 has GRPO's plain ones instead; None: never.
    """
    r = rewards.double()
    tokens = mask.sum(1).double().masked_fill(r.isnan(), 0.0)
    total = group_sum(tokens, group).clamp(min=1)
    mean = group_sum(tokens * r.nan_to_num(0.0), group) / total
    variance = group_sum(tokens * (r - mean).nan_to_num(0.0).square(), group) / total
    advantages = (r - mean) / (variance.sqrt() + 1e-6)
    if fallback_at is not None:
        plain = (r - group_mean(r, group)) / (group_std(r, group) + 1e-6)
        advantages = torch.where(group_amax(advantages.abs(), group) >= fallback_at, plain, advantages)
    return advantages.to(rewards.dtype)


def adaptive_clip(
    old_entropy: Tensor,
    mask: Tensor,
    *,
    low: Width = 0.2,
    high: Width = 0.28,
    alpha: Strength = 1.0,
    rho: Share = 0.8,
    sign: Sign = "intended",
) -> tuple[Tensor, Tensor]:
    """The clip range of each token, [B, T] twice: wider below where entropy is low, wider above where it is high.

    Args:
        old_entropy: [B, T] nats.
        mask: [B, T] 1 on trained tokens.
        low, high: the range at the pivot.
        alpha: what the range gains at h = -1 and 1, as a share of itself.
        rho: the quantile of the entropies at which the range is (low, high).
        sign: of h below it.
    """
    h = level(old_entropy, mask, rho, sign)
    return torch.where(h > 0, low, low * (1 - alpha * h)), torch.where(h > 0, high * (1 + alpha * h), high)


adaptive_clip.around_one = True


class Redistribution:
    """The weights that strengthen undecided tokens whose ratio has moved, and damp decided ones whose has not."""

    def __init__(
        self, *, beta: Annotated[float, Range(least=0, most=1)] = 1.0, rho: Share = 0.8, sign: Sign = "intended"
    ) -> None:
        """Set it up.

        Args:
            beta: what an advantage gains or loses at h = 1 and -1, as a share of itself; above 1 its sign would turn.
            rho: the quantile of the entropies at which nothing is gained or lost.
            sign: of h below it.

        Raises:
            ValueError: a setting that is out of range.
        """
        check(Redistribution.__init__, {"beta": beta, "rho": rho, "sign": sign})
        self.beta, self.rho, self.sign = beta, rho, sign

    def observe(self, old_entropy: Tensor, mask: Tensor) -> Tensor:
        """[B, T] h of a window's tokens."""
        return level(old_entropy, mask, self.rho, self.sign)

    def __call__(self, ratio: Tensor, eps_low: Tensor, eps_high: Tensor, observed: Tensor) -> Tensor:
        """[B, T] weights, 0 to 2.

        Args:
            ratio: [B, T] of the policy to the one that sampled.
            eps_low, eps_high: [B, T] the clip range in force, whose inner half on each side is neutral.
            observed: [B, T] h.
        """
        assert ratio.shape == eps_low.shape == eps_high.shape == observed.shape
        neutral = (ratio > 1 - eps_low / 2) & (ratio < 1 + eps_high / 2)
        acts = torch.where(observed > 0, ~neutral, neutral)
        return torch.where(acts, 1 + self.beta * observed, 1.0)
