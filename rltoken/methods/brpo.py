"""BRPO: credit for thinking tokens from the answers forced at several thinking budgets (AnytimeReasoner).

Paper: Qi et al., "Optimizing Anytime Reasoning via Budget Relative Policy Optimization", NeurIPS 2025 (arXiv
2505.13438v3); code: sail-sg/AnytimeReasoner. In the order of the code below, for response i of a group of G:

    z_{<=b}    the thinking cut at budget b, b_1 < ... < b_m; b_m is also the longest thinking that is sampled
    r_ij       mean score of A answers forced after z_{<=b_j}                                          thinking rows
    A_ija      r_ija - mean of the answers to the same distinct prefix                       (Eq. 10)  summary rows
    R_i(j)     sum_{k>=j} P_k r_ik                                                           (Eq. 3)
    V1_i(j)    [sum_{k<j} lambda^(j-k) r_ik / sum_{k<j} lambda^(j-k)] sum_{k>=j} P_k         (Eq. 7)
    V2(j)      mean over i of R_i(j), the response's own included                            (Eq. 8)
    V_i(j)     (j-1)/m V1_i(j) + (m-j+1)/m V2(j)                                             (Eq. 9)
    A_it       R_i(j_t) - V_i(j_t), j_t = min{j: b_j >= t}, for thinking token t = 1, 2, ...

No division by a standard deviation and a constant divisor (Dr. GRPO); no KL. Thinking that ended before several
budgets has one prefix for all of them: A answers for each are drawn from it, form one group, and are dealt out.

Deviations:
- Eq. 10 weighs an answer by 1/(mA); the authors' code by 1, which is m A times as much against the thinking. Both
  behind `summary_weight`, 'paper' by default; `+exp=paper/brpo` sets 'code', under which the published numbers came
  about.
- `summary_train_rows=k` trains k answers per trace, drawn from those with a non-zero advantage, with their weight
  raised so that the gradient is right in expectation (with beta = 0). Every score enters r_ij all the same.
- The paper allows 128 answer tokens, its code 118. The answer is graded by the configured reward on the whole
  completion (the last box after the end of thinking); the authors take the first paragraph that begins with the header.
- lambda is stated under a figure and hard-coded as 1/2 in the code: here `decay`.
- The authors' ablation that trains nothing is left out, and so is their V2 = 0 for groups of one: TRL makes none.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from rltoken.ops import group_mean
from rltoken.ranges import Count, Idle, Range, Share
from rltoken.rng import seeded
from rltoken.rollout.forced import Prefix, in_tokens, prefixes, sample_answers, thinking_part, well_formed
from rltoken.types import Progress, Rollout, Row, Sampler

PRIORS = ("base", "linear", "uniform")
SUMMARY_WEIGHTS = ("paper", "code")


def count_or_all(value: object) -> None:
    """Let 'all' and numbers of answers pass, and raise ValueError for anything else."""
    if isinstance(value, str) and value != "all":
        raise ValueError(f"there is no {value!r}; set it to all, or to a number of answers from 1")
    if value != "all":
        Range(least=1, whole=True)(value)


def known_weight(value: object) -> None:
    """Let 'paper', 'code' and numbers pass, and raise ValueError for anything else."""
    if isinstance(value, str) and value not in SUMMARY_WEIGHTS:
        raise ValueError(f"there is no {value!r}; set it to {', '.join(SUMMARY_WEIGHTS)} or a number from 0")
    if not isinstance(value, str):
        Range(least=0)(value)


def known_prior(value: object) -> None:
    """Let the named priors and lists of weights pass, and raise ValueError for anything else."""
    if isinstance(value, str) and value not in PRIORS:
        raise ValueError(f"there is no {value!r}; set it to {', '.join(PRIORS)}, or a list of one weight per budget")
    if not isinstance(value, str | list | tuple):
        raise ValueError(f"{value!r} is no prior; set it to {', '.join(PRIORS)}, or a list of one weight per budget")
    if not isinstance(value, str):
        for weight in value:
            Range(least=0)(weight)
        if not sum(value):
            raise ValueError("all weights are zero; give some budget a weight above 0")


Budgets = Annotated[Sequence[float], in_tokens]


def thinking_only(progress: Progress, *, budgets: Budgets, longest: Count) -> dict[str, float]:
    """Sample thinking up to its end or the last budget, whichever comes first: what comes after is cut anyway.

    Args:
        budgets, longest: as in `budget_answers`.
    """
    return {"max_completion_length": in_tokens(budgets, longest)[-1], "stop_at_think_end": True}


def budget_answers(
    rollout: Rollout,
    sampler: Sampler,
    *,
    budgets: Budgets,
    longest: Count,
    drawn: bool = False,
    n_summaries: Count = 4,
    max_new_tokens: Count = 128,
    decoupled: bool = True,
    summary_train_rows: Annotated[int | str, count_or_all] = 1,
    summary_weight: Annotated[str | float, known_weight] = "paper",
) -> Rollout:
    """Force `n_summaries` answers at every budget, score them, and add those that are trained as rows.

    Publishes the signals `budgets` and `budget_scores`; a thinking row's reward becomes its score at the last budget.

    Args:
        budgets: K ascending budgets: whole numbers are thinking tokens, fractions (up to 1.0) shares of `longest`.
        longest: the longest thinking, tokens.
        drawn: draw every budget but the last uniformly from what lies between it and the one before, once per prompt.
        n_summaries: A, answers per budget. With 1, the baseline is the mean over the group at the same budget.
        max_new_tokens: tokens of an answer.
        decoupled: train the answers of every budget; False: of the last budget only (plain GRPO's answer).
        summary_train_rows: answers to train per trace, or 'all'.
        summary_weight: weight of an answer against a thinking token: 'paper' (1 / number of answers that could be
            trained, Eq. 10), 'code' (1), or a number.

    Raises:
        ValueError: budgets that are not ascending in tokens, or a template that forces nothing.
    """
    points, n = in_tokens(budgets, longest), len(rollout.inputs)
    thinking = [thinking_row(row, points[-1], sampler) for row in rollout.rows[:n]]
    rollout = replace(rollout, rows=thinking + rollout.rows[n:], graded=True, thinking_only=True)
    row_budgets = [drawn_budgets(points, rollout, row) if drawn else points for row in thinking]
    traces = [
        prefixes(row.completion_ids, own, sampler.template, sampler.ends)
        for row, own in zip(thinking, row_budgets, strict=True)
    ]
    branches = [
        (i, prefix) for i, trace in enumerate(traces) for prefix, shared in trace for _ in range(shared * n_summaries)
    ]
    summaries, raw, extras = sample_answers(rollout, sampler, branches, max_new_tokens=max_new_tokens)
    raw = raw.view(n, len(points), n_summaries, -1)
    scores = sampler.total(raw.flatten(0, 2)).view(raw.shape[:3])
    advantages = summary_advantages(scores, distinct_prefixes(traces, scores), siblings_of(rollout, scores))
    last = (len(points) - 1) * n_summaries
    how = {"summary_train_rows": summary_train_rows, "summary_weight": summary_weight}
    choose = functools.partial(trained, first=0 if decoupled else last, **how)
    published = {"budgets": torch.tensor(row_budgets, device=scores.device), "budget_scores": scores.nanmean(2)}
    finals = slice(last, None, len(points) * n_summaries)
    return replace(
        rollout,
        rows=rollout.rows + trained_rows(rollout, summaries, scores, advantages, choose),
        rewards=final_rewards(raw[:, -1]),
        extras=extras[finals],
        texts=sampler.decode(rollout.inputs, [row.completion_ids for row in summaries[finals]]),
        signals=rollout.signals | published,
        metrics=rollout.metrics | metrics_of(scores, branches, summaries, sampler),
    )


def distinct_prefixes(traces: Sequence[Sequence[tuple[Prefix, int]]], like: Tensor) -> Tensor:
    """[N, K] number of the distinct prefix behind each budget of each trace."""
    numbers = [[number for number, (_, shared) in enumerate(trace) for _ in range(shared)] for trace in traces]
    return torch.tensor(numbers, device=like.device)


def siblings_of(rollout: Rollout, like: Tensor) -> Tensor:
    """[N] number of the group of each thinking row."""
    return torch.arange(len(rollout.inputs), device=like.device) // rollout.group_size


def final_rewards(raw: Tensor) -> Tensor:
    """[n, F] means of [n, A, F] whose weighted sum is the mean of the answers' totals, NaN left out as there."""
    graded = (~raw.isnan().all(2)).sum(1, keepdim=True)
    return (raw.nansum(1) / graded).masked_fill(raw.isnan().all(1), torch.nan)


def brpo(
    budget_scores: Tensor,
    budgets: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    prior: Annotated[str | Sequence[float], known_prior] = "uniform",
    mode: Literal["brpo", "v1only", "v2only", "none"] = "brpo",
    decay: Annotated[Share, Idle("mode", "v2only", "none")] = 0.5,
) -> Tensor:
    """[B, T] budget-relative advantage of every thinking token (Eq. 7 to 9).

    Args:
        budget_scores, budgets: [B, K].
        group: [B].
        mask: [B, T]; only its shape is read.
        prior: weight of the budgets: 'base' (the last one only), 'linear' (proportional to the budget), 'uniform', or K
            numbers, which are normalised.
        mode: the baseline: 'brpo' (V1 and V2 mixed), 'v1only', 'v2only' or 'none'.
        decay: lambda, the weight of a budget against the next one in V1.

    Raises:
        ValueError: another number of weights than budgets.
    """
    advantages = budget_advantages(budget_scores, prior_of(budgets, prior), group, mode=mode, decay=decay)
    index = budget_index(budgets, mask.size(1))
    beyond = advantages.new_zeros(len(advantages), 1)
    return torch.cat([advantages, beyond], 1).gather(1, index).nan_to_num(0.0)


def budget_advantages(
    scores: Tensor, prior: Tensor, group: Tensor, *, mode: str = "brpo", decay: float = 0.5
) -> Tensor:
    """[B, K] R_i(j) - V_i(j) of every response and budget.

    Args:
        scores: [B, K] r_ij.
        prior: [B, K] P_j, rows that sum to 1.
        group: [B].
        mode, decay: as in `brpo`.
    """
    given, scores, prior = scores.dtype, scores.double(), prior.double()  # equal scores leave no trace of rounding
    m = scores.size(1)
    ahead = prior.flip(1).cumsum(1).flip(1)
    # a budget of weight 0 takes nothing from a response that was not graded there
    returns = torch.where(prior > 0, prior * scores, 0.0).flip(1).cumsum(1).flip(1)
    v2 = group_mean(returns, group)
    if mode == "none":
        return returns.to(given)
    if mode == "v2only":
        return (returns - v2).to(given)
    v1 = earlier_mean(scores, decay) * ahead
    if mode == "v1only":
        return (returns - v1).to(given)
    share = torch.arange(m, dtype=scores.dtype, device=scores.device) / m
    return (returns - (share * v1 + (1 - share) * v2)).to(given)


def earlier_mean(scores: Tensor, decay: float) -> Tensor:
    """[B, K] mean of the scores at earlier budgets, the nearer the heavier (lambda^(j-k)); 0 for the first budget."""
    means = [torch.zeros_like(scores[:, 0])]
    for j in range(1, scores.size(1)):
        weights = decay ** torch.arange(j, 0, -1, dtype=scores.dtype, device=scores.device)
        means.append(scores[:, :j] @ (weights / weights.sum()))
    return torch.stack(means, 1)


def summary_advantages(scores: Tensor, prefix: Tensor, group: Tensor) -> Tensor:
    """[N, K, A] score of each answer minus the mean of its group: the answers to the same distinct prefix.

    With one answer per budget (A = 1) the group is that of the siblings' answers at the same budget, as in plain GRPO.

    Args:
        scores: [N, K, A]; NaN where there is none, whose advantage is 0.
        prefix: [N, K] number of the distinct prefix behind each budget, within its trace.
        group: [N].
    """
    n, k, a = scores.shape
    given, scores = scores.dtype, scores.double()
    if a == 1:
        means = group_mean(scores.squeeze(2), group).unsqueeze(2)
    else:
        number = torch.arange(n, device=scores.device).unsqueeze(1) * k + prefix
        means = group_mean(scores.flatten(), number.flatten().repeat_interleave(a)).view_as(scores)
    return (scores - means).nan_to_num(0.0).to(given)


def trained_rows(
    rollout: Rollout,
    summaries: Sequence[Row],
    scores: Tensor,
    advantages: Tensor,
    choose: Callable[..., list[Row]],
) -> list[Row]:
    """The answers of every trace that are trained, each trace with a random stream of its prompt and sibling.

    Args:
        summaries: N * K * A answers, trace by trace.
        scores, advantages: [N, K, A].
        choose: `trained` with its settings.
    """
    per_trace = scores[0].numel()
    return [
        row
        for i in range(len(scores))
        for row in choose(
            summaries[i * per_trace : (i + 1) * per_trace],
            scores[i].flatten().tolist(),
            advantages[i].flatten().tolist(),
            rng=seeded(rollout.seed, rollout.progress.step, rollout.rows[i].prompt_ids, i % rollout.group_size),
        )
    ]


def trained(
    summaries: Sequence[Row],
    scores: Sequence[float],
    advantages: Sequence[float],
    *,
    first: int,
    summary_train_rows: int | str,
    summary_weight: str | float,
    rng: random.Random,
) -> list[Row]:
    """The answers of one trace that become training rows, each with its score and its weighted advantage.

    `summary_train_rows` of them are drawn without replacement from those with a non-zero advantage, and stand for all.

    Args:
        summaries, scores, advantages: K * A of each, in the order of the budgets.
        first: the first one that may be trained.
    """
    candidates = list(range(first, len(summaries)))
    weight = {"paper": 1 / len(candidates), "code": 1.0}.get(summary_weight, summary_weight)
    if summary_train_rows != "all":
        candidates = [i for i in candidates if advantages[i] != 0.0]
        weight *= max(1.0, len(candidates) / summary_train_rows)
        candidates = sorted(rng.sample(candidates, min(summary_train_rows, len(candidates))))
    return [replace(summaries[i], reward=scores[i], advantage=weight * advantages[i]) for i in candidates]


def prior_of(budgets: Tensor, prior: str | Sequence[float]) -> Tensor:
    """[B, K] probabilities P_j of the budgets [B, K]."""
    budgets = budgets.to(torch.get_default_dtype())
    if prior == "base":
        weights = torch.zeros_like(budgets)
        weights[:, -1] = 1.0
    elif prior == "linear":
        weights = budgets
    elif prior == "uniform":
        weights = torch.ones_like(budgets)
    else:
        if len(prior) != budgets.size(1):
            raise ValueError(f"prior: {len(prior)} weights for {budgets.size(1)} budgets; give one for each")
        weights = torch.tensor(list(prior), dtype=budgets.dtype, device=budgets.device).expand_as(budgets)
    return weights / weights.sum(1, keepdim=True)


def budget_index(budgets: Tensor, tokens: int) -> Tensor:
    """[B, T] number (from 0) of the nearest budget at or after each of `tokens` thinking tokens; K beyond the last."""
    positions = torch.arange(1, tokens + 1, device=budgets.device).expand(budgets.size(0), tokens)
    return torch.searchsorted(budgets.contiguous(), positions.contiguous())


def drawn_budgets(points: Sequence[int], rollout: Rollout, row: Row) -> list[int]:
    """Every budget but the last uniformly from (the one before it, itself], the same for all siblings of a prompt."""
    rng = seeded(rollout.seed, rollout.progress.step, row.prompt_ids)
    return [rng.randint(low + 1, high) for low, high in zip([0, *points], points[:-1], strict=False)] + [points[-1]]


def thinking_row(row: Row, longest: int, sampler: Sampler) -> Row:
    """A row's thinking alone, at most `longest` tokens of it."""
    length = min(len(thinking_part(row.completion_ids, sampler.template.think_end_id)), longest)
    return replace(
        row,
        completion_ids=row.completion_ids[:length],
        train_mask=row.train_mask[:length],
        logps=None if row.logps is None else row.logps[:length],
    )


def metrics_of(
    scores: Tensor, branches: Sequence[tuple[int, Prefix]], summaries: Sequence[Row], sampler: Sampler
) -> dict[str, float]:
    """What is logged: the mean score per budget, over budgets and at the last one, and what the answers look like."""
    per_budget = scores.nanmean((0, 2))
    formed = [
        well_formed(prefix, row.completion_ids[len(prefix.ids) :], sampler.template, sampler.ends)
        for (_, prefix), row in zip(branches, summaries, strict=True)
    ]
    return {
        **{f"budget_scores/{j + 1}": float(value) for j, value in enumerate(per_budget)},
        "anytime_score": float(per_budget.mean()),
        "final_score": float(per_budget[-1]),
        "summary_tokens": sum(sum(row.train_mask) for row in summaries) / len(summaries),
        "summaries_well_formed": sum(formed) / len(formed),
        "thinking_closed": sum(prefix.closed for _, prefix in branches[scores[0].numel() - 1 :: scores[0].numel()])
        / len(scores),
    }
