"""GTPO and GRPO-S: reward shaping by entropy, per token and per response.

Paper: Tan et al., "GTPO and GRPO-S: Token and Sequence-Level Reward Shaping with Policy Entropy", ICML 2026 (arXiv
2508.04349). No official code was found, and the equations were read at second hand only. Another "GTPO" (Simoni et al.,
arXiv 2508.03772, on conflicting tokens of trajectories) has nothing to do with it, hence the name.

In the order of the code, for response i of a group, of reward r_i in {0, 1}; d_t correct and h_t wrong ones of the
group have a token t, of entropy H_{i,t}; H_i is the mean over the response, n and m count correct and wrong ones:

    GTPO     r'_{i,t} =  base + bonus d_t H_{i,t} / sum_k H_{k,t}              correct, k over the d_t
             r'_{i,t} = -base - bonus h_t (1/H_{i,t}) / sum_k (1/H_{k,t})      wrong, k over the h_t
             A_{i,t}  = (r'_{i,t} - mean) / std                                over the tokens of the group
    GRPO-S   r'_i     =  base + bonus n H_i / sum_k H_k  or  -base - bonus m (1/H_i) / sum_k (1/H_k)
             A_i      = (r'_i - mean) / std                                    over the responses of the group
             w_i      = mean_t rho_{i,t}                                       importance weight, clipped per response

A correct response is paid for tokens at which the policy was undecided, a wrong one punished where it was sure. Paper's
settings: base 1, bonus 0.1, clip range 0.2 and 0.28.

Where sources disagree: the notes say that correct and wrong tokens are normalised apart (`pools=by_outcome`), which
punishes half of the correct tokens and leaves nothing of a single wrong response. The default is one pool. The rewards
that a position hands out sum to (base + bonus) d_t, so they are not conserved, as the paper says they are.

TRL's loss of the type grpo is a mean over each response's tokens, so w_i is made of two stages: the ratio has the value
w_i and the token's own gradient (`sequence_ratio`), and a weight rho_{i,t} / w_i (`own_share`) turns that gradient into
the one of w_i. Losses that sum over tokens are refused.

Deviations: base is multiplied by 2 r_i - 1, the same for r_i in {0, 1}, so that shaped rewards count. A group whose
rewards are all equal has advantage 0, as in GRPO; the paper leaves such groups out when it samples. The deviation is
unbiased, plus 2e-4: TRL's 1e-4 for rewards from -1 to 1. Entropies are those of the policy that sampled.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

from rltoken.ops import group_amax, group_amin, group_sum, masked_mean
from rltoken.ranges import Range

FromZero = Annotated[float, Range(least=0)]
EPSILON = 1e-8
"""What keeps an entropy of 0 from dividing."""


def gtpo(
    rewards: Tensor,
    correct: Tensor,
    old_entropy: Tensor,
    mask: Tensor,
    group: Tensor,
    *,
    base: FromZero = 1.0,
    bonus: FromZero = 0.1,
    pools: Literal["one", "by_outcome"] = "one",
) -> Tensor:
    """[B, T] advantages.

    Args:
        rewards: [B] NaN where nothing was graded; such a row has advantage 0 and counts nowhere.
        correct: [B] bool.
        old_entropy: [B, T] nats.
        mask: [B, T] 1 on trained tokens.
        group: [B].
        base, bonus: weights of the outcome and of the entropy.
        pools: what is normalised together: all tokens of a group, or those of its correct and wrong responses apart.
    """
    alive = (mask > 0) & ~rewards.isnan().unsqueeze(1)
    shaped = by_entropy(rewards, correct, old_entropy, alive, group, base=base, bonus=bonus)
    right = correct.unsqueeze(1)
    parts = [alive] if pools == "one" else [alive & right, alive & ~right]
    advantages = sum(normalised(shaped, part, group) for part in parts)
    return torch.where(flat(rewards, group).unsqueeze(1), 0.0, advantages).to(old_entropy.dtype)


def grpo_s(
    rewards: Tensor,
    correct: Tensor,
    old_entropy: Tensor,
    mask: Tensor,
    group: Tensor,
    *,
    base: FromZero = 1.0,
    bonus: FromZero = 0.1,
) -> Tensor:
    """[B] advantages; arguments as in `gtpo`. A row without a trained token has advantage 0 and counts nowhere."""
    alive = ((mask > 0).any(1) & ~rewards.isnan()).unsqueeze(1)
    mean = masked_mean(old_entropy, mask, dim=1, keepdim=True)
    shaped = by_entropy(rewards, correct, mean, alive, group, base=base, bonus=bonus)
    advantages = normalised(shaped, alive, group).squeeze(1)
    return torch.where(flat(rewards, group), 0.0, advantages).to(old_entropy.dtype)


def sequence_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """[B, T] replaced old log-probs: with them a ratio is the mean ratio of its response, with the token's gradient.

    Args:
        logps, old_logps: [B, T].
        mask: [B, T] 1 on trained tokens.
    """
    mean = masked_mean((logps - old_logps).exp(), mask, dim=1, keepdim=True)
    return logps - mean.clamp(min=torch.finfo(mean.dtype).tiny).log()


def own_share(ratio: Tensor, mask: Tensor) -> Tensor:
    """[B, T] weights: a token's ratio [B, T] over the mean ratio of its response, so that they average to 1."""
    ratio = ratio.detach()
    return ratio / masked_mean(ratio, mask, dim=1, keepdim=True).clamp(min=torch.finfo(ratio.dtype).tiny)


sequence_ratio.only_with, own_share.only_with = own_share, sequence_ratio
sequence_ratio.off_policy_only = own_share.off_policy_only = True
sequence_ratio.per_response = True


def by_entropy(
    rewards: Tensor, correct: Tensor, entropy: Tensor, alive: Tensor, group: Tensor, *, base: float, bonus: float
) -> Tensor:
    """[B, N] shaped rewards of N positions in double precision; anything outside `alive`.

    Args:
        rewards, correct, group: [B].
        entropy: [B, N] nats.
        alive: [B, N] bool: what counts.
        base, bonus: weights of the outcome and of the entropy.
    """
    assert entropy.shape == alive.shape
    entropy, right = entropy.double() + EPSILON, correct.unsqueeze(1)
    undecided = portion(entropy, alive & right, group)
    sure = portion(1 / entropy, alive & ~right, group)
    return base * (2 * rewards.double().unsqueeze(1) - 1) + bonus * torch.where(right, undecided, -sure)


def portion(values: Tensor, among: Tensor, group: Tensor) -> Tensor:
    """[B, N] a value as a multiple of the mean of its group at its position, over what is `among` [B, N]."""
    count = group_sum(among.to(values.dtype), group)
    return values * count / group_sum(values, group, among).clamp(min=EPSILON)


def normalised(values: Tensor, among: Tensor, group: Tensor) -> Tensor:
    """[B, N] values centred and scaled over what of their group is `among` [B, N]; 0 outside."""
    kept = values.masked_fill(~among, 0.0)
    count = group_sum(among.sum(1).to(values.dtype), group)
    centred = (kept - (group_sum(kept.sum(1), group) / count.clamp(min=1)).unsqueeze(1)).masked_fill(~among, 0.0)
    variance = group_sum(centred.square().sum(1), group) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + 2e-4).unsqueeze(1)


def flat(rewards: Tensor, group: Tensor) -> Tensor:
    """[B] whether the rewards of the row's group are all equal, or there are none."""
    return group_amax(rewards, group) <= group_amin(rewards, group)
