"""SPINE: label-free RL on the tokens at which the policy was undecided, with their entropy held in a band.

Paper: Wu et al., "SPINE: Token-Selective Test-Time Reinforcement Learning with Entropy-Band Regularization", 2025
(arXiv 2511.17938), version 1. Neither its text nor the authors' code (JianghaoWu/SPINE) could be read: the equations
come from a summary of version 1. Version 2 changed the selection and the band, and is not here.

    reward       the majority vote of `rltoken.methods.ttrl`
    S_i        = the top rho of the tokens of response i by entropy H ("forking tokens"), at least one
    m_t        = 1[t in S_i] n / |S|         normaliser forks; n tokens and |S| forks of the window
                 1[t in S_i]                 normaliser all
    L          = mean_t [ m_t PPO_t  +  coef_KL m_t k3_t  +  coef_band m_t band_t ]
    k3_t       = exp(log pi_0 - log pi) - (log pi_0 - log pi) - 1         against the model before adaptation
    [lo, hi]   = the 10 % and 50 % quantiles of sg[H] over S_i
    band_t     = above max(0, H_t - hi) + below max(0, lo - H_t)

A group that is of one mind, or has no vote, is skipped (`mixed_groups`): it has no advantage, and the other two terms
leave it alone too. rho = 0.2. How the sum is divided is that of `trainer.loss_type`: with dapo, normaliser forks is the
mean over the forks of the window, all is the mean over all of its tokens.

Not in the sources, and ours: both coefficients (1 and 0.01), the weights of the two sides of the band (1), the kind of
KL (k3; a full one would need all logits), the normaliser, and whether forks are chosen per response, group or batch.
`scope` has the first two; for the window it is `+weight=forks`.

The band with thresholds from the current entropies is never satisfied: about half of the forks lie above the median and
a tenth below the lower quantile whatever the policy does, so that it always presses the entropy down on the whole.
`reference_band` takes both thresholds, on the same forks, from the frozen reference model, and can be satisfied.

Deviations: forks come from the policy that sampled and are fixed for the window, so that accumulation changes nothing.
Log-probabilities and entropies are at the sampling temperature.

Controls: `random_tokens` in the place of the forks, and the KL anchor alone (`+exp=ttrl '+aux=masked_kl'`).
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

from rltoken.ops import group_amax, group_amin, masked_mean, over_kept, token_noise, top_share
from rltoken.ranges import Range, Share

Coefficient = Annotated[float, Range(least=0)]
Quantile = Annotated[float, Range(least=0, most=1)]
Normaliser = Literal["forks", "all"]


def is_above(high: float, low: float) -> None:
    """Let an upper quantile pass that does not lie below the lower one."""
    Range(least=low, most=1)(high)


Upper = Annotated[float, is_above]


# Weights


def spine_forks(
    old_entropy: Tensor,
    mask: Tensor,
    group: Tensor,
    *,
    rho: Share = 0.2,
    scope: Literal["response", "group"] = "response",
    normaliser: Normaliser = "forks",
) -> Tensor:
    """Keep the top `rho` of the tokens of each response, or of each group, by the entropy of the policy that sampled.

    Args:
        old_entropy: [B, T] nats.
        mask: [B, T] 1 on trained tokens.
        group: [B].
        rho: share of tokens to keep; of n tokens max(1, round(rho n)), halves to even.
        scope: among which tokens they are the top.
        normaliser: forks: scaled up by tokens / forks of the window, so that the loss is a mean over forks; all: 1.

    Returns:
        [B, T] weights, 0 wherever `mask` is.
    """
    assert old_entropy.shape == mask.shape
    segment = group if scope == "group" else torch.arange(mask.size(0), device=mask.device)
    return normalised(top_share(old_entropy, mask, segment, rho), mask, normaliser)


def random_tokens(mask: Tensor, rng: torch.Generator, *, rho: Share = 0.2, normaliser: Normaliser = "forks") -> Tensor:
    """[B, T] as many tokens of each response as `spine_forks` keeps, drawn once per window: the control of selection.

    Args:
        mask: [B, T] 1 on trained tokens.
        rng: the window's.
        rho, normaliser: as in `spine_forks`.
    """
    rows = torch.arange(mask.size(0), device=mask.device)
    return normalised(top_share(token_noise(mask, rng), mask, rows, rho), mask, normaliser)


def mixed_groups(rewards: Tensor, group: Tensor) -> Tensor:
    """[B] 1 for rows of groups whose rewards [B] differ, 0 where they are all equal: those groups are skipped."""
    return (group_amax(rewards, group) > group_amin(rewards, group)).float()


mixed_groups.only_for = "weight"  # groups of equal rewards have no advantage anyway


def normalised(chosen: Tensor, mask: Tensor, normaliser: Normaliser) -> Tensor:
    """[B, T] float weights of the tokens `chosen` [B, T] out of those of `mask`."""
    weights = chosen.float()
    return over_kept(weights, mask) if normaliser == "forks" else weights


# Auxiliary losses


def masked_kl(
    logps: Tensor, ref_logps: Tensor, mask: Tensor, weight: Tensor, *, coef: Coefficient = 1.0
) -> tuple[Tensor, dict[str, float]]:
    """[B, T] coef times k3 to the reference, times the weight of each token; the gradient flows through `logps` alone.

    Args:
        logps, ref_logps: [B, T].
        mask: [B, T]; `weight`: [B, T] without gradient.
        coef: strength.
    """
    assert logps.shape == ref_logps.shape == mask.shape == weight.shape
    kept = (mask > 0) & (weight > 0)
    difference = torch.where(kept, ref_logps.detach() - logps, torch.zeros_like(logps))
    k3 = difference.exp() - difference - 1
    return coef * weight.detach() * k3, mean_metric("spine/kl", k3, kept)


def entropy_band(
    entropy: Tensor,
    mask: Tensor,
    weight: Tensor,
    *,
    coef: Coefficient = 0.01,
    low: Quantile = 0.1,
    high: Upper = 0.5,
    above: Coefficient = 1.0,
    below: Coefficient = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """[B, T] loss on forks whose entropy leaves the band of its response's own current quantiles.

    Args:
        entropy: [B, T] nats; the gradient flows through it, but not through the quantiles.
        mask: [B, T]; `weight`: [B, T] without gradient; forks are where both are above 0.
        coef: strength.
        low, high: quantiles of the forks of a response that bound the band.
        above, below: weights of the two sides.
    """
    return banded(entropy, entropy, mask, weight, coef=coef, low=low, high=high, above=above, below=below)


def reference_band(
    entropy: Tensor,
    ref_entropy: Tensor,
    mask: Tensor,
    weight: Tensor,
    *,
    coef: Coefficient = 0.01,
    low: Quantile = 0.1,
    high: Upper = 0.5,
    above: Coefficient = 1.0,
    below: Coefficient = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """The same with frozen thresholds: the quantiles of the reference model's entropies [B, T] on the same forks."""
    return banded(entropy, ref_entropy, mask, weight, coef=coef, low=low, high=high, above=above, below=below)


reference_band.instead_of = entropy_band


def banded(
    entropy: Tensor,
    source: Tensor,
    mask: Tensor,
    weight: Tensor,
    *,
    coef: float,
    low: float,
    high: float,
    above: float,
    below: float,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of `entropy_band`, with the quantiles of `source` [B, T] on each response's forks, and metrics."""
    forks = (mask > 0) & (weight > 0)
    thresholds = band_thresholds(source.detach(), forks, low, high)
    loss = band_loss(entropy, forks, thresholds, above=above, below=below)
    return coef * weight.detach() * loss, band_metrics(entropy, forks, thresholds)


def band_thresholds(entropy: Tensor, forks: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Two [B, 1] quantiles of the entropies [B, T] of each row's forks [B, T] bool; 0 in a row without any."""
    values = entropy.to(torch.promote_types(entropy.dtype, torch.float32)).masked_fill(~forks, torch.nan)
    lowest, highest = (torch.nanquantile(values, q, dim=1, keepdim=True).nan_to_num(0.0) for q in (low, high))
    return lowest, highest


def band_loss(
    entropy: Tensor, forks: Tensor, thresholds: tuple[Tensor, Tensor], *, above: float, below: float
) -> Tensor:
    """[B, T] distance of each fork's entropy from the band, 0 on other tokens and without gradient on its edges."""
    lowest, highest = thresholds
    inside = torch.where(forks, entropy, lowest)
    return above * torch.relu(inside - highest) + below * torch.relu(lowest - inside)


def band_metrics(entropy: Tensor, forks: Tensor, thresholds: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The mean entropy of the forks, and the shares of them on either side of the band."""
    lowest, highest = thresholds
    values = entropy.detach()
    return (
        mean_metric("spine/fork_entropy", values, forks)
        | mean_metric("spine/above", (values > highest).float(), forks)
        | mean_metric("spine/below", (values < lowest).float(), forks)
    )


def mean_metric(name: str, values: Tensor, kept: Tensor) -> dict[str, float]:
    """The mean of `values` [B, T] over the tokens `kept` [B, T]; nothing where there is none."""
    return {name: masked_mean(values.detach(), kept).item()} if kept.any() else {}
