"""Update only the tokens at which the policy was undecided ("forking tokens").

Paper: Wang et al., "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM
Reasoning", 2025 (arXiv 2506.01939).

    tau_rho = the (1 - rho) quantile of the entropies of all trained tokens
    w_t     = 1[H_t >= tau_rho]

The loss divides by all tokens, as TRL's `top_entropy_quantile` does, so rho = 0.2 makes it about five times smaller;
with normaliser = forks, which some sources take, it is a mean over the tokens that are kept (where the loss type is a
mean over tokens, such as dapo).

Deviation: TRL takes the quantile over each micro-batch of the live forward. `forks` takes it over the whole generation
window under the policy that sampled, so that accumulation does not change the algorithm; `forks_microbatch` is TRL's
reading (of one process).

Control: `forks_random`, as large a share of the window, drawn at random.
"""

from typing import Literal

import torch
from torch import Tensor

from rltoken.ops import over_kept, quantile, token_noise
from rltoken.ranges import Share

Normaliser = Literal["all", "forks"]


def forks(old_entropy: Tensor, mask: Tensor, *, rho: Share = 0.2, normaliser: Normaliser = "all") -> Tensor:
    """Keep the top `rho` of the window's tokens by the entropy of the policy that sampled.

    Args:
        old_entropy: [B, T] nats.
        mask: [B, T] 1 on trained tokens.
        rho: share of tokens to keep, in (0, 1].
        normaliser: all: weights of 1; forks: scaled up by tokens / forks of the window.

    Returns:
        [B, T] weights, 0 wherever `mask` is.
    """
    kept = top_entropy(old_entropy, mask, rho)
    return over_kept(kept, mask) if normaliser == "forks" else kept


def forks_microbatch(entropy: Tensor, mask: Tensor, *, rho: Share = 0.2) -> Tensor:
    """Keep the top `rho` of a micro-batch's tokens by the live entropy [B, T]: TRL's reading."""
    return top_entropy(entropy.detach(), mask, rho)


def forks_random(mask: Tensor, rng: torch.Generator, *, rho: Share = 0.2, normaliser: Normaliser = "all") -> Tensor:
    """Keep a random `rho` of the window's tokens, as many as `forks` keeps where no entropies are equal: its control.

    Args:
        mask: [B, T] 1 on trained tokens.
        rng: the window's.
        rho, normaliser: as in `forks`.

    Returns:
        [B, T] weights, 0 wherever `mask` is.
    """
    return forks(token_noise(mask, rng), mask, rho=rho, normaliser=normaliser)


def top_entropy(entropy: Tensor, mask: Tensor, rho: float) -> Tensor:
    """[B, T] 1 on the trained tokens whose entropy reaches the (1 - rho) quantile of all trained tokens."""
    assert entropy.shape == mask.shape, (entropy.shape, mask.shape)
    trained = mask.bool()
    if not trained.any():
        return torch.zeros_like(entropy)
    threshold = quantile(entropy[trained].float(), 1 - rho)
    return ((entropy >= threshold) & trained).to(entropy.dtype)
