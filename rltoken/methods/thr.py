"""THR: weigh tokens by how a step on them moves the likelihood of the group's correct responses; NTHR, where it began.

Papers: Deng et al., "Token Hidden Reward: Steering Exploration-Exploitation in Group Relative Deep Reinforcement
Learning", ICLR 2026 (arXiv 2510.03669); NTHR: Deng et al., "On the Effect of Negative Gradient in Group Relative Deep
Reinforcement Optimization", NeurIPS 2025 (arXiv 2505.18830). Neither has official code. Of NTHR most of the text was
read; of THR only summaries and reviews, from which its equations are. In the order of the code, for token k of
response i of a group of G, P of which are correct, r_i = 1 or 0:

    log Z_{i,k} = w_{y_{i,k}} . h_{i,k} / temperature - log pi_old(y_{i,k})      w_v the rows of the head W [V, H]
    g_{i,k} = e_{y_{i,k}} - softmax(W h_{i,k} / temperature)                     prediction error [V]
    M       = sum_{i in P} c_i sum_k g_{i,k} h_{i,k}^T                           [V, H]; c_i = 1/L_i (THR) or 1 (NTHR)
    s_{j,t} = <g_{j,t}, M h_{j,t}> = sum_{i in P} c_i sum_k <g_{i,k}, g_{j,t}> <h_{i,k}, h_{j,t}>
    tau     = beta min_{i in P} mean_t s_{i,t}
    THR     = (2 r_j - 1) s_{j,t},   w = 1[|THR| > tau] (1 + sign(THR) p)
    NTHR    w = 2 |0.5 - |P|/G| where s > tau and r_j = 0, else 1

s is what a small gradient step of the head alone on log pi(y_{j,t}) adds to the summed mean log-likelihoods (NTHR:
log-likelihoods) of the correct responses, up to the step size and 1 / temperature^2. p > 0 strengthens what makes them
likelier (exploitation), p < 0 weakens it (exploration); the paper's |p| is about 0.1. p = 0 only leaves out tokens of
little influence. It is computed once per window, under the policy that sampled, without gradient. Neither the logits of
all tokens nor a matrix of token pairs is made: one slice of the vocabulary is in memory at a time.

A token without a score keeps the weight 1: in a group without a graded correct and a graded wrong response, and where
`max_tokens` or `exclude_self` leaves it without one. Logged, as means over ranks:

    thr/scored    share of the trained tokens that have a score; nthr/scored
    thr/zeroed    share of the tokens with a score that get the weight 0
    nthr/damped   share of the tokens with a score that get a weight below 1

What could not be read is an option, with our reading as the default: whether tau is a minimum or a mean (`tau_mode`;
NTHR's minimum, with the normalisation of s), whether a correct response counts towards its own tokens (`exclude_self`;
it does, as in the theorem's sum over P), the whole vocabulary or the tokens of the group (`vocabulary`).

Deviations: L_i counts trained tokens, G graded responses. A head's bias is in the softmax, its own gradient not in s.
In half precision log Z has the rounding of the old log-probabilities. The paper samples dynamically, with
trainer.beta=1e-4: +exp=paper/thr has both, the other exps neither.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

from rltoken.ops import group_amin, group_mean, group_sum, masked_mean
from rltoken.ranges import Count, Idle, Range
from rltoken.types import Head

Factor = Annotated[float, Range(), Idle("tau_mode", "none")]
Cap = Annotated[int | None, Range(least=1, whole=True, none=True)]


def thr(
    old_hidden: Tensor,
    old_logps: Tensor,
    ids: Tensor,
    mask: Tensor,
    head: Head,
    correct: Tensor,
    rewards: Tensor,
    group: Tensor,
    *,
    p: Annotated[float, Range(least=-1, most=1)] = 0.1,
    tau_mode: Literal["min", "mean", "none"] = "min",
    beta: Factor = 1.0,
    length_norm: bool = True,
    exclude_self: bool = False,
    vocabulary: Literal["full", "group"] = "full",
    max_tokens: Cap = None,
    elements: Count = 2**24,
) -> tuple[Tensor, dict[str, float]]:
    """[B, T] weights from 0 to 1 + |p|, and metrics: tokens of little influence get 0, others lean to the sign of p.

    Args:
        old_hidden, old_logps, ids, mask, head, correct, rewards, group: as in `influence`.
        p: above 0 exploits, below 0 explores.
        tau_mode: the threshold is `beta` times the smallest mean score of a correct response, or their mean; none keeps
            every token.
        beta: what multiplies the threshold.
        length_norm, exclude_self, vocabulary, max_tokens, elements: as in `influence`.
    """
    scores = influence(
        old_hidden,
        old_logps,
        ids,
        mask,
        head,
        correct,
        rewards,
        group,
        length_norm=length_norm,
        exclude_self=exclude_self,
        vocabulary=vocabulary,
        max_tokens=max_tokens,
        elements=elements,
    )
    hidden_reward = torch.where(correct.unsqueeze(1), scores, -scores)
    tau = threshold(scores, correct, group, tau_mode=tau_mode, beta=beta).unsqueeze(1)
    weights = (hidden_reward.abs() > tau) * (1 + p * hidden_reward.nan_to_num().sign())
    weights = torch.where(scores.isnan(), 1.0, weights)
    return weights, shares(scores, mask, weights == 0, ("thr/scored", "thr/zeroed"))


thr.idle_at = {"p": 0, "tau_mode": "none"}


def nthr(
    old_hidden: Tensor,
    old_logps: Tensor,
    ids: Tensor,
    mask: Tensor,
    head: Head,
    correct: Tensor,
    rewards: Tensor,
    group: Tensor,
    *,
    eta: Literal["2|0.5-q|", "1-q", "q"] = "2|0.5-q|",
    tau_mode: Literal["min", "mean", "none"] = "min",
    beta: Factor = 1.0,
    length_norm: bool = False,
    exclude_self: bool = False,
    vocabulary: Literal["full", "group"] = "full",
    max_tokens: Cap = None,
    elements: Count = 2**24,
) -> tuple[Tensor, dict[str, float]]:
    """[B, T] weights in [0, 1], and metrics: less than 1 on tokens of wrong responses much like the correct ones.

    Args:
        old_hidden, old_logps, ids, mask, head, correct, rewards, group: as in `influence`.
        eta: that weight, by the share q of correct responses in the group.
        tau_mode, beta: as in `thr`.
        length_norm, exclude_self, vocabulary, max_tokens, elements: as in `influence`.
    """
    scores = influence(
        old_hidden,
        old_logps,
        ids,
        mask,
        head,
        correct,
        rewards,
        group,
        length_norm=length_norm,
        exclude_self=exclude_self,
        vocabulary=vocabulary,
        max_tokens=max_tokens,
        elements=elements,
    )
    q = group_mean(correct.to(scores.dtype).masked_fill(rewards.isnan(), torch.nan), group)
    weight = {"2|0.5-q|": 2 * (0.5 - q).abs(), "1-q": 1 - q, "q": q}[eta].unsqueeze(1)
    tau = threshold(scores, correct, group, tau_mode=tau_mode, beta=beta).unsqueeze(1)
    weights = torch.where((scores > tau) & ~correct.unsqueeze(1), weight, 1.0)
    return weights, shares(scores, mask, weights < 1, ("nthr/scored", "nthr/damped"))


def shares(scores: Tensor, mask: Tensor, chosen: Tensor, names: tuple[str, str]) -> dict[str, float]:
    """Metrics: the share of trained tokens with a score, and that of the `chosen` [B, T] bool among these, if any."""
    known = ~scores.isnan()
    scored = {names[0]: masked_mean(known.to(scores.dtype), mask).item()}
    return scored | ({names[1]: masked_mean(chosen.to(scores.dtype), known).item()} if known.any() else {})


def threshold(scores: Tensor, correct: Tensor, group: Tensor, *, tau_mode: str, beta: float) -> Tensor:
    """[B] tau of each row's group; -inf without a threshold, 0 where no correct response has a score.

    Args:
        scores: [B, T], NaN where there is none.
        correct: [B] bool; `group`: [B].
        tau_mode: min, mean or none.
        beta: what multiplies it.
    """
    means = scores.nanmean(1).masked_fill(~correct, torch.nan)
    if tau_mode == "none":
        return torch.full_like(means, -torch.inf)
    tau = group_amin(means, group) if tau_mode == "min" else group_mean(means, group)
    return torch.where(tau.isfinite(), beta * tau, 0.0)


@torch.no_grad()
def influence(
    old_hidden: Tensor,
    old_logps: Tensor,
    ids: Tensor,
    mask: Tensor,
    head: Head,
    correct: Tensor,
    rewards: Tensor,
    group: Tensor,
    *,
    length_norm: bool,
    exclude_self: bool,
    vocabulary: str,
    max_tokens: int | None,
    elements: int,
) -> Tensor:
    """[B, T] s of each trained token: how a step on it moves the correct responses of its group; NaN where unknown.

    Args:
        old_hidden: [B, T, H] what the head saw when it gave each token.
        old_logps: [B, T] log-probabilities at the head's temperature.
        ids: [B, T] long, the tokens.
        mask: [B, T] 1 on trained tokens; no other one counts.
        head: the head with which `old_logps` were made.
        correct: [B] bool.
        rewards: [B] NaN where nothing was graded; such a row is neither correct nor wrong.
        group: [B].
        length_norm: a correct response counts by the mean over its tokens, else by their sum.
        exclude_self: a correct response does not count towards its own tokens; the only one of a group has no score.
        vocabulary: 'full', or 'group': the inner products of errors run over the group's own tokens only (V*).
        max_tokens: of a group with more trained tokens, about this many are sampled: each response keeps its share,
            but at least one, evenly spaced. They stand for the rest of the response in the sums; the rest has no score.
            None: no limit.
        elements: numbers that a temporary tensor may hold; changes memory and speed, not the result.
    """
    assert old_logps.shape == ids.shape == mask.shape == old_hidden.shape[:2], (old_logps.shape, old_hidden.shape)
    graded = ~rewards.isnan()
    trained = (mask > 0) & graded.unsqueeze(1)
    right = correct & trained.any(1)
    scored = compared(right, graded & ~correct, group, exclude_self)
    scores = old_logps.new_full(old_logps.shape, torch.nan, dtype=torch.promote_types(old_logps.dtype, torch.float32))
    for number in group[scored].unique().tolist():
        own = trained & (group == number).unsqueeze(1)
        sampled = own if max_tokens is None else evenly_sampled(own, max_tokens)
        row, column = sampled.nonzero(as_tuple=True)
        share = (1 if length_norm else own.sum(1)) / sampled.sum(1).to(scores.dtype)
        tokens = ids[row, column]
        found = token_scores(
            old_hidden[row, column],
            old_logps[row, column],
            tokens,
            torch.where(right[row], share[row], 0.0),
            row if exclude_self else None,
            head,
            tokens.unique() if vocabulary == "group" else torch.arange(head.weight.size(0), device=tokens.device),
            elements,
        )
        scores[row, column] = torch.where(scored[row], found, torch.nan).to(scores.dtype)
    return scores


def compared(right: Tensor, wrong: Tensor, group: Tensor, exclude_self: bool) -> Tensor:
    """[B] bool: rows of groups with a right [B] and a wrong [B] one; with `exclude_self` not the only right one."""
    rights = group_sum(right.float(), group)
    contrast = (rights > 0) & (group_sum(wrong.float(), group) > 0)
    return contrast & (~right | (rights > 1)) if exclude_self else contrast


def evenly_sampled(trained: Tensor, most: int) -> Tensor:
    """[B, T] bool: about `most` of the tokens that are `trained` [B, T], of each row its share, but at least one."""
    length = trained.sum(1, keepdim=True)
    if length.sum() <= most:
        return trained
    kept = (length * most // length.sum()).clamp(min=1)
    # Bresenham's line: of `length` tokens exactly `kept` step over a multiple of `length`, whatever the offset is
    reached = trained.cumsum(1) * kept + length // 2
    return trained & (reached // length.clamp(min=1) > (reached - kept) // length.clamp(min=1))


def token_scores(
    hidden: Tensor,
    logps: Tensor,
    ids: Tensor,
    share: Tensor,
    own: Tensor | None,
    head: Head,
    vocabulary: Tensor,
    elements: int,
) -> Tensor:
    """[n] <g, M h> of the tokens of a group, exact, slice by slice of the vocabulary.

    Args:
        hidden: [n, H]; `logps`, `ids`: [n].
        share: [n] what each token counts in M: 0 outside the correct responses.
        own: [n] the response of each token, which is left out of its M; None leaves nothing out.
        head: what gives the logits.
        vocabulary: the token ids over which the inner products run, ascending.
        elements: numbers that a temporary tensor may hold.
    """
    n, width = hidden.shape
    size = max(1, elements // max(n, width))
    blocks = torch.arange(n, device=ids.device).split(max(1, elements // max(size, width)))
    log_z = torch.cat([head.logit(hidden[block], ids[block]) - logps[block] for block in blocks])
    scores = torch.zeros_like(log_z)
    counted = share > 0
    responses = [] if own is None else [(own == i) & counted for i in own[counted].unique().tolist()]
    for entries in vocabulary.split(size):
        errors = log_z.new_empty(n, entries.numel())
        for block in blocks:
            errors[block] = prediction_errors(hidden[block], log_z[block], ids[block], head, entries)
        scores += projected(errors, hidden, share, counted.nonzero().squeeze(1), blocks)
        for response in responses:
            index = response.nonzero().squeeze(1)
            scores -= projected(errors, hidden, share, index, index.split(blocks[0].numel()))
    return scores


def projected(errors: Tensor, hidden: Tensor, share: Tensor, source: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
    """[n] <g, M h> over a slice of the vocabulary, M from the tokens `source`; 0 outside `blocks`.

    Args:
        errors: [n, v] g; `hidden`: [n, H]; `share`: [n].
        source: indices of tokens.
        blocks: indices of the tokens to score, a block at a time.
    """
    m = errors.new_zeros(errors.size(1), hidden.size(1))
    for index in source.split(blocks[0].numel()):
        m.addmm_(errors[index].T, hidden[index].to(errors.dtype) * share[index].unsqueeze(1))
    scores = errors.new_zeros(errors.size(0))
    for index in blocks:
        scores[index] = (errors[index] * (hidden[index].to(errors.dtype) @ m.T)).sum(1)
    return scores


def prediction_errors(hidden: Tensor, log_z: Tensor, ids: Tensor, head: Head, entries: Tensor) -> Tensor:
    """[n, v] the entries `entries` [v], ascending, of e_y - pi for tokens `ids` [n] given by `hidden` [n, H]."""
    errors = head.logits(hidden, entries).sub_(log_z.unsqueeze(1)).exp_().neg_()
    place = torch.searchsorted(entries, ids).clamp(max=entries.numel() - 1)
    errors[torch.arange(ids.numel(), device=ids.device), place] += (entries[place] == ids).to(errors.dtype)
    return errors
