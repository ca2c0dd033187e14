"""Sample completions of a problem set, force answers at thinking budgets, and grade all of them.

Every batch of problems, or with vLLM every request, has a random state of its own, so the table does not depend on how
many processes share the work; every global random state is left as it was.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rltoken.errors import UserError
from rltoken.evals.chat import ChatGenerator
from rltoken.evals.generators import Generator
from rltoken.evals.metrics import AT_BUDGET, MALFORMED, OUTCOME, UNGRADED
from rltoken.evals.shards import read, write
from rltoken.evals.verification import APPENDED, MEAN_LOGP, SELF_REWARD
from rltoken.methods.last_token import self_reward
from rltoken.rewards.outcomes import Outcome
from rltoken.rng import forked_rng, request_seed
from rltoken.rollout.forced import Prefix, in_tokens, prefixes, thinking_part, well_formed
from rltoken.signals import plain_text, thinking_length
from rltoken.types import Template

Graded = tuple[float, str]
"""Correctness, and what became of the grading (`rltoken.rewards.outcomes`)."""
Job = tuple[int, int]
"""Number of a problem, and of a sample of it."""


@dataclass(frozen=True)
class SelfReward:
    """How to read what a model holds of its own completions (LaSeR, `rltoken.methods.last_token.self_reward`).

    Args:
        token: the id of the token whose log-probability right after a completion says it.
        reference: that log-probability before training.
        scale: self-reward per nat.
        temperature: by which logits are divided, that of training; 1 where vLLM samples.
    """

    token: int
    reference: float
    scale: float
    temperature: float


@dataclass(frozen=True)
class Settings:
    """How to sample.

    Args:
        samples: completions per problem; `temperature` 0 is greedy, for which one is enough.
        max_new_tokens: completion tokens at most; `max_answer_tokens` those of a forced answer.
        budgets: ascending thinking budgets in tokens at which an answer is forced; none by default.
        batch_size: completions that transformers generates at once. It is part of what a seed reproduces there; vLLM
            decides by itself how many it has under way.
        seed: of the sampling.
        top_p: sample from the most probable tokens that hold this share of the probability.
        chunk: completions that are asked for at once, at most, where each has a random stream of its own.
        self_reward: have the model judge its completions too; None: not.
    """

    samples: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    seed: int
    budgets: tuple[int, ...] = ()
    max_answer_tokens: int = 128
    top_p: float = 1.0
    chunk: int = 512
    self_reward: SelfReward | None = None


@dataclass(frozen=True)
class Answer:
    """A forced answer: what was sampled, its grade, and the tokens of its context that were computed."""

    ids: list[int]
    graded: Graded
    prefilled: int


@dataclass
class Cost:
    """Tokens that one completion, and the answers forced in it, took: `sampled`, and computed of contexts."""

    sampled: int
    prefilled: int = 0


def settings_of(config: Mapping[str, Any], longest: int, appended_id: int | None = None) -> Settings:
    """The settings in the section `eval` of the configuration.

    Args:
        config: the section.
        longest: what fractional budgets are shares of.
        appended_id: the token that self-rewards are read from; not read where none are asked for.

    Raises:
        ValueError: budgets that are not ascending.
    """
    names = {field.name for field in dataclasses.fields(Settings)} - {"budgets", "self_reward"}
    budgets = in_tokens(config["budgets"], longest) if config["budgets"] else ()
    asked = config["self_reward"]
    return Settings(
        **{name: config[name] for name in names},
        budgets=tuple(budgets),
        self_reward=None if asked["reference"] is None else SelfReward(appended_id, **asked),
    )


def evaluate(
    generator: Generator | ChatGenerator,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Dataset,
    reward: Callable[..., list[float | None]],
    template: Template | None,
    settings: Settings,
    *,
    label: str = "evaluation",
    shards: Path | None = None,
) -> pd.DataFrame:
    """Sample and grade completions of every problem, each process its share of the batches.

    Each completion is generated once; at every budget its thinking is cut, an answer is forced, and that is graded too
    (thinking that ended before a budget is answered once for all of those).

    Args:
        generator: the model; its temperature and top-p are those of the settings.
        tokenizer: of the model; a server that is asked by messages needs none.
        dataset: with `prompt` (conversational), `id` and what `reward` reads.
        reward: correctness in TRL's signature; None counts as wrong.
        template: what forces an answer; None for a server that is asked by messages.
        label: what the progress bar says.
        shards: a folder that takes the table of every batch as it is finished (`rltoken.evals.shards`); those that are
            there already are taken, and not sampled again.

    Returns:
        One row per sample, on every process: id, sample, correct (0 or 1), outcome, thinking_tokens, completion_tokens,
        truncated, text, `correct@B` and `outcome@B` for every budget B; where self-rewards are asked for self_reward,
        appended_logp and mean_logp (nats; of a completion with the token that ended it; NaN of one that was cut); and
        what it cost, forced answers included: sampled_tokens and, where the generator counts them, prefilled_tokens.

    Raises:
        UserError: there are budgets and the template forces nothing.
    """
    by_messages = isinstance(generator, ChatGenerator)
    assert not (by_messages and (settings.budgets or settings.self_reward)), "chat completions are texts alone"
    if settings.budgets and not template.cut:
        raise UserError(
            "model.forced.header: nothing would make the model answer where its thinking is cut; set it or "
            "model.think_end, or set eval.budgets=null."
        )

    def records(batch: Sequence[Job]) -> list[dict[str, Any]]:
        if by_messages:
            return _chat_batch(generator, dataset, reward, settings, batch)
        return _batch(generator, tokenizer, dataset, reward, template, settings, batch)

    return in_batches(records, generator.together, len(dataset), settings, label=label, shards=shards)


def in_batches(
    records: Callable[[Sequence[Job]], list[dict[str, Any]]],
    together: int | None,
    problems: int,
    settings: Settings,
    *,
    label: str,
    shards: Path | None = None,
) -> pd.DataFrame:
    """The table of all samples of all problems, one row each, on every process; each makes its share of the batches.

    Args:
        records: the rows of a batch, called under a random state of the batch's own.
        together: samples in a batch; None: as even a share of `settings.chunk` at most as there is.
        problems: their number.
        settings: how many samples of each, and the seed.
        label, shards: as in `evaluate`.
    """
    tables = _tables(records, together, problems, settings, label, shards)
    if PartialState().num_processes > 1:
        tables = gather_object(tables)
    return pd.concat(tables).sort_index().reset_index(drop=True)


def _tables(records, together, problems, settings, label, shards) -> list[pd.DataFrame]:
    """The tables of this process's batches, their rows numbered among those of all."""
    state = PartialState()
    jobs = [(row, sample) for row in range(problems) for sample in range(settings.samples)]
    size = together or even_chunk(len(jobs), state.num_processes, settings.chunk)
    mine = list(enumerate(range(0, len(jobs), size)))[state.process_index :: state.num_processes]
    tables = {number: shards and read(shards, number) for number, _ in mine}
    missing = [(number, jobs[start : start + size], start) for number, start in mine if tables[number] is None]
    total = sum(len(jobs[start : start + size]) for _, start in mine)
    done = total - sum(len(batch) for _, batch, _ in missing)
    bar = tqdm(total=total, initial=done, desc=label, unit="completion", disable=not sys.stderr.isatty())
    with torch.no_grad(), bar:
        for number, batch, start in missing:
            with forked_rng(settings.seed * 1_000_003 + number):
                rows = records(batch)
            tables[number] = pd.DataFrame.from_records(rows, index=range(start, start + len(batch)))
            if shards:  # read again, so that types do not tell what was there before
                write(shards, number, tables[number])
                tables[number] = read(shards, number)
            bar.update(len(batch))
    return list(tables.values())


def even_chunk(jobs: int, processes: int, chunk: int) -> int:
    """How many jobs to do at once, `chunk` at most, so that processes that take turns do equally many."""
    share = max(1, math.ceil(jobs / processes))
    return math.ceil(share / math.ceil(share / chunk))


def _batch(generator, tokenizer, dataset, reward, template, settings, batch) -> list[dict[str, Any]]:
    """The records of one batch of (problem, sample)."""
    examples = [dataset[row] for row, _ in batch]
    prompts = tokenizer.apply_chat_template(
        [example["prompt"] for example in examples], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    seeds = [request_seed(settings.seed, *job, "completion") for job in batch]
    completions = generator.complete(prompts, settings.max_new_tokens, (), seeds)
    costs = [
        Cost(len(ids) + more) for ids, more in zip(completions, generator.besides or [0] * len(batch), strict=True)
    ]
    _count_prefilled(generator, costs)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    marks = graded(reward, examples, completions, texts)
    at_budgets = _at_budgets(
        generator, tokenizer, reward, template, settings, batch, examples, prompts, completions, costs
    )
    judged = _self_rewards(generator, settings.self_reward, prompts, completions)
    return [
        {
            "id": example["id"],
            "sample": sample,
            "correct": value,
            OUTCOME: outcome,
            "thinking_tokens": thinking_length(ids, template.think_end_id),
            "completion_tokens": len(ids),
            "truncated": not ids or ids[-1] not in generator.ends,
            "text": plain_text(text),
            **{f"{AT_BUDGET}{budget}": score for budget, (score, _) in zip(settings.budgets, forced, strict=True)},
            **{f"{OUTCOME}@{budget}": told for budget, (_, told) in zip(settings.budgets, forced, strict=True)},
            **own,
            "sampled_tokens": cost.sampled,
            **({} if generator.prefilled is None else {"prefilled_tokens": cost.prefilled}),
        }
        for example, (_, sample), (value, outcome), ids, text, forced, own, cost in zip(
            examples, batch, marks, completions, texts, at_budgets, judged, costs, strict=True
        )
    ]


def _self_rewards(generator, asked: SelfReward | None, prompts, completions) -> list[dict[str, float]]:
    """Per completion the columns of its self-reward, and the mean log-probability of its tokens as a control."""
    if asked is None:
        return [{} for _ in completions]
    found = [{SELF_REWARD: math.nan, APPENDED: math.nan, MEAN_LOGP: math.nan} for _ in completions]
    ended = [i for i, ids in enumerate(completions) if ids and ids[-1] in generator.ends]
    logps = generator.logps(
        [prompts[i] for i in ended], [[*completions[i], asked.token] for i in ended], asked.temperature
    )
    for i, (*own, appended) in zip(ended, logps, strict=True):
        reward = self_reward(appended, scale=asked.scale, reference=asked.reference)
        found[i] = {SELF_REWARD: reward, APPENDED: appended, MEAN_LOGP: math.fsum(own) / len(own)}
    return found


def _chat_batch(generator, dataset, reward, settings, batch) -> list[dict[str, Any]]:
    """The same of a server that is asked by messages."""
    examples = [dataset[row] for row, _ in batch]
    seeds = [request_seed(settings.seed, *job, "completion") for job in batch]
    replies = generator.replies([example["prompt"] for example in examples], settings.max_new_tokens, seeds)
    texts = [reply.text for reply in replies]
    marks = graded(reward, examples, [[] for _ in texts], texts)
    return [
        {
            "id": example["id"],
            "sample": sample,
            "correct": value,
            OUTCOME: outcome,
            "thinking_tokens": reply.thinking_tokens,
            "completion_tokens": reply.completion_tokens,
            "truncated": reply.truncated,
            "text": reply.text,
            "sampled_tokens": reply.sampled,
            "prefilled_tokens": reply.prefilled,
        }
        for example, (_, sample), (value, outcome), reply in zip(examples, batch, marks, replies, strict=True)
    ]


def _count_prefilled(generator: Generator, costs: Sequence[Cost]) -> None:
    """Add what the last call computed of each context to the cost of the completion it belongs to."""
    for cost, tokens in zip(costs, generator.prefilled or [0] * len(costs), strict=True):
        cost.prefilled += tokens


def _at_budgets(
    generator, tokenizer, reward, template, settings, batch, examples, prompts, completions, costs
) -> list[list[Graded]]:
    """Per completion its correctness and outcome at every budget, each from an answer forced there."""
    if not settings.budgets:
        return [[] for _ in completions]
    branches: list[tuple[int, Prefix, int]] = [
        (i, prefix, shared)
        for i, ids in enumerate(completions)
        for prefix, shared in prefixes(
            thinking_part(ids, template.think_end_id), settings.budgets, template, generator.ends
        )
    ]
    seeds = [request_seed(settings.seed, *batch[i], "answer", len(prefix.kept)) for i, prefix, _ in branches]
    forced = answered(
        generator, tokenizer, reward, template, examples, prompts, [branch[:2] for branch in branches], seeds,
        max_new_tokens=settings.max_answer_tokens,
    )  # fmt: skip
    found: list[list[Graded]] = [[] for _ in completions]
    for (i, _, shared), answer in zip(branches, forced, strict=True):
        costs[i].sampled += len(answer.ids)
        costs[i].prefilled += answer.prefilled
        found[i] += [answer.graded] * shared
    return found


def answered(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    reward: Callable[..., list[float | None]],
    template: Template,
    examples: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    branches: Sequence[tuple[int, Prefix]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
) -> list[Answer]:
    """An answer forced after each prefix, all in one call after that of the completions which they are cut from.

    Args:
        generator, tokenizer, reward, template: as in `evaluate`.
        examples, prompts: of each completion the problem, and its prompt's token ids.
        branches: (completion, prefix of it) of each answer.
        seeds: of the random stream of each.
        max_new_tokens: tokens of an answer at most.
    """
    # sorted by length, so that a batch is not padded to the longest context of all
    order = sorted(range(len(branches)), key=lambda k: len(branches[k][1].ids))
    chosen = [branches[k] for k in order]
    answers = generator.complete(
        [prompts[i] + prefix.ids for i, prefix in chosen],
        max_new_tokens,
        template.stops,
        [seeds[k] for k in order],
        [(i, len(prompts[i]) + len(prefix.kept)) for i, prefix in chosen],
    )
    prefilled = generator.prefilled or [0] * len(chosen)
    ids = [prefix.ids + answer for (_, prefix), answer in zip(chosen, answers, strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    marks = graded(reward, [examples[i] for i, _ in chosen], ids, texts)
    found: dict[int, Answer] = {}
    for k, answer, (value, outcome), tokens in zip(order, answers, marks, prefilled, strict=True):
        formed = well_formed(branches[k][1], answer, template, generator.ends)
        mark = (value, outcome) if formed or not value else (0.0, MALFORMED)
        found[k] = Answer(answer, mark, tokens)
    return [found[k] for k in range(len(branches))]


def graded(reward, examples, completions, texts) -> list[Graded]:
    """Correctness and outcome of each completion; a reward function that logs no outcome is told by its value."""
    logged: dict[str, list[Any]] = {}
    columns = {key: [example[key] for example in examples] for key in examples[0] if key != "prompt"}
    values = reward(
        prompts=[example["prompt"] for example in examples],
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=completions,
        log_extra=logged.__setitem__,
        log_metric=lambda name, value: None,
        **columns,
    )
    if inspect.isawaitable(values):
        values = asyncio.run(values)
    told = [UNGRADED if value is None else Outcome.CORRECT if value > 0.5 else Outcome.WRONG for value in values]
    outcomes = logged.get(OUTCOME, told)
    return [(float(value or 0.0), str(outcome or UNGRADED)) for value, outcome in zip(values, outcomes, strict=True)]
