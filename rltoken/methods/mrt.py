"""MRT: credit for the progress that each episode of thinking makes (Meta Reinforcement Fine-Tuning).

Paper: Qu et al., "Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning", ICML 2025 (arXiv 2503.07572); code:
CMU-AIRe/MRT (analysis and SFT; of the RL part a README only). In the order of the code below:

    z_1 ... z_k    the episodes of a trace: steps between blank lines, cut where one begins with a marker ("Wait", ...)
    J(c)           mean score of answers forced after c (the meta-prover mu)
    r_prg(z_j; c)  J(c, z_j) - J(c)                                                                (Definition 6.1)

Prefix rollouts (Fig. 6, right): c = the first j episodes of a trace, j uniform in 0 ... k-1; M rollouts terminate there
(an answer is forced), the group's G continue. Only what follows c is trained:

    termination    A_i = R_i - mean of the M terminating rewards                                   (the README)
    joint          A_i = (R_i - mean) / (std + 1e-4) over the M + G rewards                        (the caption)
    bonus          R_i + alpha r_prg(z_{j+1} of rollout i; c)                                      (the objective)

Credit per episode: answers forced at every episode's end, and for a token t of episode j

    A_t + alpha (J(z_1 .. z_j) - J(z_1 .. z_{j-1}))

Summed over the episodes of a trace this is alpha (J_end - J_0): as one number per response a noisy copy of the outcome
less a constant of the prompt, which a group's mean removes, hence GRPO. So it is credit per token only.

The STaR variant (`rltoken.star`) cuts traces after the episode j of the largest r_prg (best_cut) and learns from those
whose answer, forced there, is right.

Deviations:
- All siblings of a group continue one prefix, that of the first sibling's trace, which is one of the continuations; the
  others are sampled again from it (j = 0: they are what was sampled). M, alpha and the number of answers behind J are
  not in the paper.
- Answers are forced in the words of `model.forced`, not by the analysis code's "Time is up.".
- Markers are compared without spaces, since pieces of text are decoded token by token.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from rltoken.ops import group_mean, group_std
from rltoken.ranges import Count, Range
from rltoken.rng import seeded
from rltoken.rollout.forced import SUMMARY, Prefix, sample_answers, thinking_part
from rltoken.signals import plain_text
from rltoken.types import THINKING, Rollout, Sampler, Template

GRACE = 3
"""A marker among so many first steps of an episode begins no new one."""


def episode_ends(
    pieces: Sequence[str], *, separator: str | None, markers: Sequence[str], most: int | None = None
) -> list[int]:
    """Where episodes end, in tokens from the beginning; the last end is the number of tokens.

    Args:
        pieces: the text of each token.
        separator: what stands between steps; None: each token is a step.
        markers: how a step begins that opens an episode.
        most: episodes at most; the last one takes the rest.
    """
    texts = [piece.replace(" ", "") for piece in pieces]
    opening = tuple(marker.replace(" ", "") for marker in markers)
    found, begun = [], 0
    for number, (token, text) in enumerate(steps(texts, separator)):
        if token and text.startswith(opening) and number - begun >= GRACE and (most is None or len(found) + 1 < most):
            found.append(token)
            begun = number
    return [*found, len(pieces)] if pieces else []


def steps(texts: Sequence[str], separator: str | None) -> list[tuple[int, str]]:
    """(first token, text) of each step; a token that holds the end of one and the beginning of another is the one's."""
    if separator is None:
        return list(enumerate(texts))
    starts, position = {}, 0
    for token, text in enumerate(texts):
        starts.setdefault(position, token)
        position += len(text)
    found, place, joined = [], 0, "".join(texts)
    for part in joined.split(separator):
        first = next((starts[at] for at in range(place, len(joined)) if at in starts), len(texts))
        if part:
            found.append((first, part))
        place += len(part) + len(separator)
    return found


def open_episodes(markers: Sequence[str]) -> None:
    """Let a list of texts pass: without any a trace is one episode, and an empty one would open every step."""
    listed = isinstance(markers, Sequence) and not isinstance(markers, str) and len(markers) > 0
    if not listed or not all(isinstance(marker, str) and marker.strip() for marker in markers):
        raise ValueError(f"{markers!r} opens no episodes; set model.episodes.markers to texts, as in [Wait,But wait]")


Markers = Annotated[Sequence[str], open_episodes]


def prefix_rollouts(
    rollout: Rollout,
    sampler: Sampler,
    *,
    separator: str | None,
    markers: Markers,
    longest: Count,
    most_episodes: Count = 45,
    terminations: Count = 4,
    max_new_tokens: Count = 128,
    progress_answers: Annotated[int, Range(least=0, whole=True)] = 0,
) -> Rollout:
    """Let each group go on from a random prefix of its first trace, and add answers forced at that prefix.

    Args:
        rollout: graded thinking rows; with `progress_answers`, publishes the signal `episode_progress`.
        separator, markers, most_episodes: as in `episode_ends`.
        longest: completion tokens at most, those of the prefix among them.
        terminations: M, answers forced at the prefix, per group: rows of kind 'summary'.
        max_new_tokens: tokens of a forced answer.
        progress_answers: answers behind J after the episode that follows the prefix; 0: no progress is measured.

    Raises:
        ValueError: the model's template forces nothing where thinking is cut.
    """
    size, n = rollout.group_size, len(rollout.inputs)
    cut_up = functools.partial(row_episodes, sampler=sampler, separator=separator, markers=markers, most=most_episodes)
    kept = [drawn_prefix(rollout, first, cut_up) for first in range(0, n, size)]
    rollout = continued(rollout, sampler, kept, longest)
    branches = [
        # spread over the siblings, which all begin with the prefix
        (
            number * size + answer % size,
            Prefix(rollout.rows[number * size].completion_ids[:cut], sampler.template.cut, False),
        )
        for number, cut in enumerate(kept)
        for answer in range(terminations)
    ]
    rows, raw, _ = sample_answers(rollout, sampler, branches, max_new_tokens=max_new_tokens)
    scores = sampler.total(raw)
    added = [replace(row, reward=score) for row, score in zip(rows, scores.tolist(), strict=True)]
    before = scores.view(len(kept), terminations).nanmean(1)
    rollout = replace(
        rollout,
        rows=[*rollout.rows, *added],
        metrics=rollout.metrics
        | {"mrt/prefix_tokens": sum(kept) / len(kept), "mrt/terminated_score": float(before.nanmean())},
    )
    if not progress_answers:
        return rollout
    return with_progress(
        rollout, sampler, kept, before, cut_up, answers=progress_answers, max_new_tokens=max_new_tokens
    )


def with_progress(
    rollout: Rollout,
    sampler: Sampler,
    kept: Sequence[int],
    before: Tensor,
    cut_up: Callable[[Rollout, int], list[int]],
    *,
    answers: int,
    max_new_tokens: int,
) -> Rollout:
    """The rollout with `episode_progress` published: the progress of the episode that follows each row's prefix.

    Args:
        kept: tokens of each group's prefix.
        before: [groups] J there.
        cut_up: gives a row's episodes.
        answers, max_new_tokens: behind each J, and tokens of one.
    """
    size, n = rollout.group_size, len(rollout.inputs)
    following = [
        forced_at(
            rollout.rows[i].completion_ids,
            next((end for end in cut_up(rollout, i) if end > kept[i // size]), kept[i // size]),
            sampler.template,
            sampler.ends,
        )
        for i in range(n)
    ]
    after = mean_scores(rollout, sampler, following, answers=answers, max_new_tokens=max_new_tokens)
    progress = (after - before.repeat_interleave(size)).nan_to_num(0.0)
    return replace(
        rollout,
        signals=rollout.signals | {"episode_progress": progress},
        metrics=rollout.metrics | {"mrt/progress": float(progress.mean())},
    )


def row_episodes(
    rollout: Rollout, i: int, *, sampler: Sampler, separator: str | None, markers: Sequence[str], most: int
) -> list[int]:
    """`thinking_episodes` of row `i`; [0] where it has no thinking."""

    def decode(tokens: list[list[int]]) -> list[str]:
        return list(map(plain_text, sampler.decode([rollout.inputs[i]] * len(tokens), tokens)))

    ids = rollout.rows[i].completion_ids
    thinking = open_thinking(ids, sampler.template, sampler.ends)
    return thinking_episodes(thinking, decode, separator=separator, markers=markers, most=most) or [0]


def thinking_episodes(
    thinking: Sequence[int],
    decode: Callable[[list[list[int]]], list[str]],
    *,
    separator: str | None,
    markers: Sequence[str],
    most: int,
) -> list[int]:
    """`episode_ends` of `open_thinking`.

    Args:
        thinking: token ids.
        decode: the text of each of several lists of ids.
        separator, markers, most: as in `episode_ends`.
    """
    pieces = decode([[token] for token in thinking]) if thinking else []
    return episode_ends(pieces, separator=separator, markers=markers, most=most)


def open_thinking(ids: Sequence[int], template: Template, ends: Collection[int]) -> list[int]:
    """The thinking of a completion without the token that ends it."""
    thinking = thinking_part(ids, template.think_end_id)
    closing = ends if template.think_end_id is None else {template.think_end_id}
    return thinking[:-1] if thinking and thinking[-1] in closing else thinking


def forced_at(ids: Sequence[int], end: int, template: Template, ends: Collection[int]) -> Prefix:
    """What an answer is forced after where a completion's thinking is cut at `end` tokens, or ended there by itself."""
    thinking = thinking_part(ids, template.think_end_id)
    if (
        template.think_end_id is not None
        and end == len(thinking) - 1
        and len(open_thinking(thinking, template, ends)) == end
    ):
        return Prefix(thinking, template.ended, closed=True)
    return Prefix(thinking[:end], template.cut, closed=False)


def drawn_prefix(rollout: Rollout, first: int, cut_up: Callable[[Rollout, int], list[int]]) -> int:
    """Tokens of the first j episodes of row `first`, j uniform from 0 to one less than it has."""
    rng = seeded(rollout.seed, rollout.progress.step, rollout.rows[first].prompt_ids)
    ends = [0, *cut_up(rollout, first)]
    return ends[rng.randrange(len(ends) - 1)]


def continued(rollout: Rollout, sampler: Sampler, kept: Sequence[int], longest: int) -> Rollout:
    """The rollout with every sibling going on from the first one's prefix, which is not trained; graded anew.

    Args:
        kept: tokens of each group's prefix; where it is 0 the siblings stay what they are.
        longest: completion tokens at most.
    """
    size, rows = rollout.group_size, list(rollout.rows)
    again = [i for i in range(len(rollout.inputs)) if i % size and kept[i // size]]
    prefix = [rows[number * size].completion_ids[:cut] for number, cut in enumerate(kept)]
    found = sampler.generate([rows[i].prompt_ids + prefix[i // size] for i in again])
    for i, sampled in zip(again, found, strict=True):
        first, cut = rows[i - i % size], kept[i // size]
        logps = None if sampled.logps is None else [*first.logps[:cut], *sampled.logps][:longest]
        rows[i] = replace(rows[i], completion_ids=[*prefix[i // size], *sampled.ids][:longest], logps=logps)
    rows = [
        replace(row, train_mask=[int(t >= kept[row.parent // size]) for t in range(len(row.completion_ids))])
        for row in rows
    ]
    rewards, extras, texts = rollout.rewards.clone(), list(rollout.extras), list(rollout.texts)
    if sampler.most(len(again)):
        inputs, ids = [rollout.inputs[i] for i in again], [rows[i].completion_ids for i in again]
        raw, told = sampler.grade(inputs, ids)
        rewards[again] = raw.to(rewards)
        for i, extra, text in zip(again, told, sampler.decode(inputs, ids), strict=True):
            extras[i], texts[i] = extra, text
    return replace(rollout, rows=rows, rewards=rewards, extras=extras, texts=texts)


def mean_scores(
    rollout: Rollout,
    sampler: Sampler,
    cuts: Sequence[Prefix],
    *,
    answers: int,
    max_new_tokens: int,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """[n] J: the mean score of `answers` answers forced after each prefix, which belongs to row `rows[i]` or i."""
    rows = range(len(cuts)) if rows is None else rows
    branches = [(row, cut) for row, cut in zip(rows, cuts, strict=True) for _ in range(answers)]
    _, raw, _ = sample_answers(rollout, sampler, branches, max_new_tokens=max_new_tokens)
    return sampler.total(raw).view(len(cuts), answers).nanmean(1)


def mrt(
    rewards: Tensor,
    group: Tensor,
    kind: Sequence[str],
    *,
    baseline: Literal["termination", "joint"] = "termination",
    kinds: tuple[str, ...] = (THINKING, SUMMARY),
) -> Tensor:
    """[B] advantage of rollouts that go on and of those that terminate.

    Args:
        rewards, group: [B].
        kind: of each row: 'thinking' goes on, 'summary' terminates.
        baseline: termination: the mean reward of the group's terminating rollouts; joint: mean and standard deviation
            over all of the group's.
        kinds: the rows it acts on.
    """
    if baseline == "joint":
        return (rewards - group_mean(rewards, group)) / (group_std(rewards, group) + 1e-4)
    terminated = torch.tensor([name == SUMMARY for name in kind], device=rewards.device)
    return rewards - group_mean(rewards.masked_fill(~terminated, torch.nan), group)


mrt.only_with = prefix_rollouts


def mrt_progress(rewards: Tensor, episode_progress: Tensor, *, alpha: Annotated[float, Range(least=0)] = 1.0) -> Tensor:
    """[B] reward plus alpha times the progress of the episode that follows the prefix.

    Args:
        rewards, episode_progress: [B].
    """
    return rewards + alpha * episode_progress


def episode_answers(
    rollout: Rollout,
    sampler: Sampler,
    *,
    separator: str | None,
    markers: Markers,
    most_episodes: Count = 8,
    answers: Count = 4,
    max_new_tokens: Count = 128,
) -> Rollout:
    """Force answers before the first and after each episode of every trace; publish `episodes`, `episode_scores`.

    Args:
        rollout: graded thinking rows.
        separator, markers, most_episodes: as in `episode_ends`.
        answers: answers behind each J.
        max_new_tokens: tokens of one.

    Raises:
        ValueError: the model's template forces nothing where thinking is cut.
    """
    n = len(rollout.inputs)
    ends = [
        row_episodes(rollout, i, sampler=sampler, separator=separator, markers=markers, most=most_episodes)
        for i in range(n)
    ]
    places = [(i, end) for i in range(n) for end in [0, *ends[i]]]
    found = mean_scores(
        rollout,
        sampler,
        [forced_at(rollout.rows[i].completion_ids, end, sampler.template, sampler.ends) for i, end in places],
        rows=[i for i, _ in places],
        answers=answers,
        max_new_tokens=max_new_tokens,
    )
    columns = most_episodes + 1
    scores = found.new_full((n, columns), torch.nan)
    last = torch.zeros(n, columns, dtype=torch.long, device=found.device)
    for (i, end), score, j in zip(places, found, (j for own in ends for j in range(len(own) + 1)), strict=True):
        scores[i, j:], last[i, j:] = score, end  # padded with the last one, after which there is no progress
    progress = scores[:, -1] - scores[:, 0]
    return replace(
        rollout,
        signals=rollout.signals | {"episodes": last, "episode_scores": scores},
        metrics=rollout.metrics | {"mrt/episodes": sum(map(len, ends)) / n, "mrt/progress": float(progress.nanmean())},
    )


episode_answers.only_for = "episode_scores"


def episode_credit(
    advantages: Tensor,
    episodes: Tensor,
    episode_scores: Tensor,
    *,
    alpha: Annotated[float, Range(least=0)] = 1.0,
) -> Tensor:
    """[B, T] advantages plus alpha times the progress of each token's episode; nothing after the thinking.

    Args:
        advantages: [B, T].
        episodes: [B, K + 1] tokens before the first and up to each episode's end, padded with the last.
        episode_scores: [B, K + 1] J there.
    """
    return advantages + alpha * token_progress(episodes, episode_scores, advantages.size(1))


episode_credit.per_token = True


def best_cut(scores: Sequence[float]) -> int | None:
    """The number of the episode that makes most progress, from 1 on, the first of equals; None where none makes any.

    Args:
        scores: J before the first episode and after each.
    """
    progress = [after - before for before, after in itertools.pairwise(scores)]
    best = max(progress, default=0.0)
    return progress.index(best) + 1 if best > 0 else None


def token_progress(episodes: Tensor, scores: Tensor, tokens: int) -> Tensor:
    """[B, T] the progress J_j - J_{j-1} of the episode each of `tokens` tokens belongs to; 0 beyond the last."""
    progress = scores.diff(dim=1).nan_to_num(0.0)
    position = torch.arange(tokens, device=episodes.device).expand(len(episodes), tokens)
    number = torch.searchsorted(episodes[:, 1:].contiguous(), position.contiguous(), right=True)
    beyond = progress.new_zeros(len(progress), 1)
    return torch.cat([progress, beyond], 1).gather(1, number)
