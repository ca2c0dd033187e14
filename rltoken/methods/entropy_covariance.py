"""Clip-Cov and KL-Cov: hold back the few tokens whose update lowers the entropy most.

Paper: Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", 2025 (arXiv
2505.22617); code: PRIME-RL/Entropy-Mechanism-of-RL, a fork of verl, which was read with the paper's results. A softmax
policy loses entropy by the covariance of log-probability and advantage. In the order of the code:

    cov_t    = (A_t - mean A) (log pi_old(y_t) - mean log pi_old)     means over the window's N trained tokens
    Clip-Cov   w_t = 0 for max(1, r N) tokens, drawn from those with lower < cov_t < upper, else 1
    KL-Cov     L_t = -A_t rho_t + beta |log rho_t| for the max(1, k N) tokens of the highest cov_t, else -A_t rho_t

KL-Cov has no clip at all: `unclipped` gives the bounds for that. Paper's settings: r 2e-4, lower 1, upper 5; beta 1, k
2e-3 for a model of 7B and 2e-4 for 32B (the code's setting is in percent, and verl's default the latter). The clip
range of Clip-Cov is wide there, ratios from 0 to 2: trainer.epsilon=1.

|log rho| has no gradient at rho = 1, so KL-Cov does nothing unless a rollout is used for several steps: 8 in the paper,
trainer.num_iterations=2 in the exp.

Deviations: the covariance, and what is drawn by it, is of the window and of the policy that sampled, where the code
takes each micro-batch under the live policy, so that accumulation changes nothing. So Clip-Cov may draw a token that
the clip range will hold back anyway; the code leaves those out. Before the first step of a rollout rho is 1 up to
rounding, and the sign of that rounding would be a gradient as large as any other: log-ratios up to `rounding` count as
0 (1e-5 suits float32; raise it in half precision).
"""

from typing import Annotated

import torch
from torch import Tensor

from rltoken.ops import masked_mean
from rltoken.ranges import Range

FromZero = Annotated[float, Range(least=0)]
ShareOrNone = Annotated[float, Range(least=0, most=1)]


def above_lower(value: float, lower: float) -> None:
    """Let an upper bound pass that leaves something between the two."""
    if value <= lower:
        raise ValueError(f"nothing lies between lower={lower} and {value}; set it above lower")


def clip_cov(
    advantages: Tensor,
    old_logps: Tensor,
    mask: Tensor,
    rng: torch.Generator,
    *,
    share: ShareOrNone = 2e-4,
    lower: Annotated[float, Range()] = 1.0,
    upper: Annotated[float, Range(), above_lower] = 5.0,
) -> Tensor:
    """[B, T] weights: 0 on tokens drawn from those whose covariance lies between `lower` and `upper`, else 1.

    Args:
        advantages: [B, T].
        old_logps: [B, T].
        mask: [B, T] 1 on trained tokens.
        rng: draws the tokens.
        share: how many, as a share of the trained tokens, in [0, 1]; at least one unless it is 0.
        lower, upper: in units of advantage times nats, neither included.
    """
    values = covariance(advantages, old_logps, mask)
    candidates = ((values > lower) & (values < upper) & (mask > 0)).flatten().nonzero().squeeze(1)
    drawn = torch.randperm(candidates.numel(), generator=rng, device=rng.device)[: number(share, mask)]
    weights = torch.ones_like(values).flatten()
    weights[candidates[drawn.to(candidates.device)]] = 0.0
    return weights.view_as(values)


def high_covariance(advantages: Tensor, old_logps: Tensor, mask: Tensor, *, share: ShareOrNone = 2e-3) -> Tensor:
    """[B, T] mark: 1 on the tokens of the highest covariance, of equal ones on the first, else 0.

    Args:
        advantages: [B, T].
        old_logps: [B, T].
        mask: [B, T] 1 on trained tokens.
        share: how many, as a share of the trained tokens, in [0, 1]; at least one unless it is 0.
    """
    values = covariance(advantages, old_logps, mask).masked_fill(mask == 0, -torch.inf).flatten()
    marks = torch.zeros_like(values)
    marks[values.sort(descending=True, stable=True).indices[: number(share, mask)]] = 1.0
    return marks.view_as(advantages)


def kl_cov(
    logps: Tensor, old_logps: Tensor, high_covariance: Tensor, *, beta: FromZero = 1.0, rounding: FromZero = 1e-5
) -> Tensor:
    """[B, T] unreduced loss: `beta` times the absolute log-ratio on marked tokens, 0 elsewhere.

    Args:
        logps: [B, T] with gradient.
        old_logps: [B, T].
        high_covariance: [B, T] 0 or 1.
        beta: weight against the policy loss.
        rounding: log-ratios up to this count as 0.
    """
    assert logps.shape == old_logps.shape == high_covariance.shape
    distance = (logps - old_logps).abs()
    return beta * distance * high_covariance * (distance > rounding)


kl_cov.off_policy_only = True


def unclipped() -> tuple[float, float]:
    """A clip range that no ratio can leave."""
    return 1.0, torch.inf


def covariance(advantages: Tensor, logps: Tensor, mask: Tensor) -> Tensor:
    """[B, T] each token's part of the covariance of advantage and log-probability over the tokens of `mask`."""
    assert advantages.shape == logps.shape == mask.shape
    return (advantages - masked_mean(advantages, mask)) * (logps - masked_mean(logps, mask))


def number(share: float, mask: Tensor) -> int:
    """How many tokens a share of the trained ones is: at least one, unless there is none or `share` is 0."""
    tokens = int((mask > 0).sum())
    return min(tokens, max(1, int(share * tokens))) if share > 0 else 0
