"""Sample completions of a problem set, force answers at thinking budgets, and grade all of them.

Every batch of problems, or with vLLM every request, has a random state of its own, so the table does not depend on how
many processes share the work; every global random state is left as it was.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rltoken.errors import UserError
from rltoken.evals.generators import Generator
from rltoken.evals.metrics import AT_BUDGET, MALFORMED, OUTCOME, UNGRADED
from rltoken.rewards.outcomes import Outcome
from rltoken.rng import forked_rng, request_seed
from rltoken.rollout.forced import Prefix, in_tokens, prefixes, thinking_part, well_formed
from rltoken.signals import plain_text, thinking_length
from rltoken.types import Template

Graded = tuple[float, str]
"""Correctness, and what became of the grading (`rltoken.rewards.outcomes`)."""
CHUNK = 2048
"""Completions that are asked for at once, at most, where each has a random stream of its own."""


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
    """

    samples: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    seed: int
    budgets: tuple[int, ...] = ()
    max_answer_tokens: int = 128


def settings_of(config: Mapping[str, Any], longest: int) -> Settings:
    """The settings in the section `eval` of the configuration; `longest` is what fractional budgets are shares of.

    Raises:
        ValueError: budgets that are not ascending.
    """
    names = ("samples", "temperature", "max_new_tokens", "max_answer_tokens", "batch_size", "seed")
    budgets = in_tokens(config["budgets"], longest) if config["budgets"] else ()
    return Settings(**{name: config[name] for name in names}, budgets=tuple(budgets))


def evaluate(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward: Callable[..., list[float | None]],
    template: Template,
    settings: Settings,
    *,
    label: str = "evaluation",
) -> pd.DataFrame:
    """Sample and grade completions of every problem, each process its share of the batches.

    Each completion is generated once; at every budget its thinking is cut, an answer is forced, and that is graded too
    (thinking that ended before a budget is answered once for all of those).

    Args:
        generator: the model; its temperature is that of the settings.
        dataset: with `prompt` (conversational), `id` and what `reward` reads.
        reward: correctness in TRL's signature; None counts as wrong.
        template: what forces an answer.
        label: what the progress bar says.

    Returns:
        One row per sample, on every process: id, sample, correct (0 or 1), outcome, thinking_tokens, completion_tokens,
        truncated, text, and `correct@B` and `outcome@B` for every budget B.

    Raises:
        UserError: there are budgets and the template forces nothing.
    """
    if settings.budgets and not template.cut:
        raise UserError(
            "model.forced.header: nothing would make the model answer where its thinking is cut; set it or "
            "model.think_end, or set eval.budgets=null."
        )
    state = PartialState()
    jobs = [(row, sample) for row in range(len(dataset)) for sample in range(settings.samples)]
    size = generator.together or even_chunk(len(jobs), state.num_processes)
    batches = list(enumerate(range(0, len(jobs), size)))[state.process_index :: state.num_processes]
    tables = []
    with torch.no_grad(), tqdm(total=len(batches), desc=label, disable=not sys.stderr.isatty()) as bar:
        for number, start in batches:
            batch = jobs[start : start + size]
            with forked_rng(settings.seed * 1_000_003 + number):
                records = _batch(generator, tokenizer, dataset, reward, template, settings, batch)
            tables.append(pd.DataFrame.from_records(records, index=range(start, start + len(batch))))
            bar.update()
    if state.num_processes > 1:
        tables = gather_object(tables)
    return pd.concat(tables).sort_index()


def even_chunk(jobs: int, processes: int) -> int:
    """How many jobs to do at once, `CHUNK` at most, so that processes that take turns do equally many."""
    share = max(1, math.ceil(jobs / processes))
    return math.ceil(share / math.ceil(share / CHUNK))


def _batch(generator, tokenizer, dataset, reward, template, settings, batch) -> list[dict[str, Any]]:
    """The records of one batch of (problem, sample)."""
    examples = [dataset[row] for row, _ in batch]
    prompts = tokenizer.apply_chat_template(
        [example["prompt"] for example in examples], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    seeds = [request_seed(settings.seed, *job, "completion") for job in batch]
    completions = generator.complete(prompts, settings.max_new_tokens, (), seeds)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    graded = _graded(reward, examples, completions, texts)
    at_budgets = _at_budgets(generator, tokenizer, reward, template, settings, batch, examples, prompts, completions)
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
        }
        for example, (_, sample), (value, outcome), ids, text, forced in zip(
            examples, batch, graded, completions, texts, at_budgets, strict=True
        )
    ]


def _at_budgets(
    generator, tokenizer, reward, template, settings, batch, examples, prompts, completions
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
    # sorted by length, so that a batch is not padded to the longest context of all
    order = sorted(range(len(branches)), key=lambda k: len(branches[k][1].ids))
    chosen = [branches[k][:2] for k in order]
    answers = generator.complete(
        [prompts[i] + prefix.ids for i, prefix in chosen],
        settings.max_answer_tokens,
        template.stops,
        [request_seed(settings.seed, *batch[i], "answer", len(prefix.kept)) for i, prefix in chosen],
    )
    ids = [prefix.ids + answer for (_, prefix), answer in zip(chosen, answers, strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    graded = _graded(reward, [examples[i] for i, _ in chosen], ids, texts)
    scores: list[Graded] = [(0.0, "")] * len(branches)
    for k, answer, (value, outcome) in zip(order, answers, graded, strict=True):
        formed = well_formed(branches[k][1], answer, template, generator.ends)
        scores[k] = (value, outcome) if formed or not value else (0.0, MALFORMED)
    found: list[list[Graded]] = [[] for _ in completions]
    for (i, _, shared), score in zip(branches, scores, strict=True):
        found[i] += [score] * shared
    return found


def _graded(reward, examples, completions, texts) -> list[Graded]:
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
