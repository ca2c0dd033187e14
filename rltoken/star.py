"""Supervised traces out of a model's own: `python -m rltoken.star 'runs=[runs/a]' out=traces.jsonl`.

The STaR variant of MRT (Qu et al., 2025, arXiv 2503.07572; `rltoken.methods.mrt` has the definitions), in this order:

    sample      traces of training problems
    J           force answers before the first and after each episode of every trace
    cut         after the episode that makes most progress, J_j - J_{j-1}, the first of equals
    keep        where some episode makes progress and an answer forced at the cut is right: thinking and that answer

`star.cut=none` is plain STaR: traces that came to the right answer by themselves, whole. A supervised stage learns from
the file (docs/supervised.md). Finished batches are kept beside it until it is whole: the same command after a kill goes
on.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rltoken import cli, config, evaluate
from rltoken.errors import UserError
from rltoken.evals import shards

if TYPE_CHECKING:
    import pandas as pd
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from rltoken.evals.generate import Job, Settings
    from rltoken.evals.generators import Generator
    from rltoken.types import Template

TOP_LEVEL = (*evaluate.TOP_LEVEL, "star")
CUTS = ("progress", "none")


@dataclass(frozen=True)
class Kept:
    """What is kept of a trace, its thinking tokens and the progress of its last episode; None where nothing is."""

    completion: str | None = None
    tokens: int | None = None
    progress: float | None = None


LEFT_OUT = Kept()


@dataclass(frozen=True)
class Source:
    """What traces come from.

    Args:
        generator, tokenizer: the model.
        template: what forces an answer.
        problems: with `prompt` (conversational) and what `reward` reads.
        reward: correctness in TRL's signature.
        settings: how to sample.
    """

    generator: Generator
    tokenizer: PreTrainedTokenizerBase
    template: Template
    problems: Dataset
    reward: Callable[..., list[float | None]]
    settings: Settings

    def ended(self, ids: Sequence[int], stops: Sequence[int] = ()) -> bool:
        """Whether what was sampled came to its end, and was not cut; an answer may end with one of `stops` too."""
        return bool(ids) and ids[-1] in self.generator.ends.union(stops)


def main() -> None:
    """The entry point."""
    cli.main(_job, "star", TOP_LEVEL, "interrupted; the same command goes on from the last batch")


@hydra.main(config_path=f"pkg://{cli.CONFIG_MODULE}", config_name="star", version_base="1.3")
def _job(cfg: DictConfig) -> None:
    cli.attempt(lambda: run(cfg, HydraConfig.get().overrides.task))


def run(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Make the traces of one model and write them.

    Raises:
        UserError: whatever the user can mend.
    """
    from accelerate import PartialState

    evaluate.settle(cfg, TOP_LEVEL)
    subject, out = checked(cfg, overrides), Path(cfg.out)
    cli.leave_terminal_to_us()
    state = PartialState(cpu=cfg.trainer.use_cpu)
    prepared = evaluate.prepare(subject, state, "train", ("star",))
    batches = out.with_name(f"{out.name}.shards")
    with evaluate.alone(batches, state):
        shards.check(batches, prepared.facts)
        state.wait_for_everyone()
        if state.is_main_process:
            shards.begin(batches, prepared.facts)
        state.wait_for_everyone()
        table = made(subject.cfg, prepared, state, batches)
        if state.is_main_process:
            lines = written(table, prepared.problems)
            if not lines:
                raise UserError(f"star: none of {len(table)} traces is kept; raise eval.samples or eval.limit.")
            shards.written(out, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
            shutil.rmtree(batches)
            print(told(table, lines, out))


def checked(cfg: DictConfig, overrides: Sequence[str]) -> evaluate.Subject:
    """The model whose traces are asked for, with its settings.

    Raises:
        UserError: several models, or a server that is asked by messages; a setting that cannot be; a file in the way.
    """
    from rltoken.methods.mrt import open_episodes

    if cfg.server is not None:
        raise UserError("server: traces are cut by token ids, which no chat server gives; leave it out.")
    found = evaluate.subjects(cfg, overrides)
    if len(found) > 1:
        raise UserError(f"runs: traces are those of one model, and {len(found)} are named; name one.")
    if cfg.star.cut not in CUTS:
        raise UserError(f"star.cut: there is no {cfg.star.cut!r}; choose one of: {', '.join(CUTS)}.")
    for key in ("answers", "most_episodes"):
        if not isinstance(cfg.star[key], int) or cfg.star[key] < 1:
            raise UserError(f"star.{key}: {cfg.star[key]} is not possible; set it to a whole number from 1.")
    if cfg.star.cut == "progress":
        try:
            open_episodes(OmegaConf.select(found[0].cfg, "model.episodes.markers"))
        except ValueError as error:
            raise UserError(f"model.episodes.markers: {error}.") from error
    found[0].cfg.eval.budgets = None  # answers are forced where episodes end
    config.check_values(found[0].cfg)
    evaluate.check_back_end(found[0])
    if found[0].cfg.eval.format is not None:
        raise UserError("eval.format: traces are written in the format that the model chooses; set it to null.")
    if not found[0].cfg.data.get("answers", True):
        raise UserError(
            "data.answers: traces are kept where their answer is right, which gold answers tell; set it to true."
        )
    for path in cfg.models:
        evaluate.existing_model(str(path))
    if Path(cfg.out).exists():
        raise UserError(f"out: {cfg.out} is there already; choose another with out=..., or remove it.")
    return found[0]


def made(cfg: DictConfig, prepared: evaluate.Prepared, state: PartialState, batches: Path) -> pd.DataFrame:
    """The table of all sampled traces.

    Args:
        cfg: of the model.
        prepared: what it is sampled with.
        batches: the folder of those that are finished.

    Raises:
        UserError: the model cannot be had, or nothing would make it answer where its thinking is cut.
    """
    from rltoken import parts
    from rltoken.evals.generate import in_batches, settings_of

    settings = settings_of(cfg.eval, cfg.rollout.max_thinking_tokens)
    template = parts.template(cfg.model, prepared.tokenizer)
    if cfg.star.cut != "none" and not template.cut:
        raise UserError("model.forced.header: no answer can be forced; set it or model.think_end, or star.cut=none.")
    reward = parts.correctness(parts.rewards(cfg.reward)[0])
    scratch = batches / ".merged"
    with evaluate.generating(cfg, prepared.path, prepared.tokenizer, settings, state, scratch) as generator:
        source = Source(generator, prepared.tokenizer, template, prepared.problems, reward, settings)
        episodes = functools.partial(episodes_of, source, **cfg.model.episodes, most=cfg.star.most_episodes)
        answers = 0 if cfg.star.cut == "none" else cfg.star.answers
        return in_batches(
            functools.partial(traces, source, answers=answers, episodes=episodes),
            generator.together,
            len(prepared.problems),
            settings,
            label="traces",
            shards=batches,
        )


def episodes_of(
    source: Source, ids: Sequence[int], *, separator: str | None, markers: Sequence[str], most: int
) -> list[int]:
    """Where the episodes of a completion's thinking end, in tokens; none where it did not think."""
    from rltoken.methods.mrt import open_thinking, thinking_episodes

    thinking = open_thinking(ids, source.template, source.generator.ends)
    return thinking_episodes(thinking, source.tokenizer.batch_decode, separator=separator, markers=markers, most=most)


def traces(
    source: Source, batch: Sequence[Job], *, answers: int, episodes: Callable[[Sequence[int]], list[int]]
) -> list[dict[str, Any]]:
    """One row per (problem, sample) of a batch.

    Args:
        source: of the traces.
        batch: numbers of problems and of their samples.
        answers: answers behind each J; 0: traces stay whole.
        episodes: gives the ends of a completion's episodes.

    Returns:
        problem, its number; sampled_tokens, thinking tokens that were sampled; right, whether the whole trace is;
        completion (text, None where the trace is not kept), its thinking tokens and the progress of its last episode.
    """
    from rltoken.evals.generate import graded
    from rltoken.rng import request_seed
    from rltoken.signals import thinking_length

    examples = [source.problems[row] for row, _ in batch]
    prompts = source.tokenizer.apply_chat_template(
        [example["prompt"] for example in examples], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    seeds = [request_seed(source.settings.seed, *job, "completion") for job in batch]
    completions = source.generator.complete(prompts, source.settings.max_new_tokens, (), seeds)
    texts = source.tokenizer.batch_decode(completions, skip_special_tokens=True)
    right = [value > 0.5 for value, _ in graded(source.reward, examples, completions, texts)]
    lengths = [thinking_length(ids, source.template.think_end_id) for ids in completions]
    if answers:
        kept = cut_traces(source, batch, examples, prompts, completions, answers=answers, episodes=episodes)
    else:
        kept = [
            Kept(text, tokens) if good and source.ended(ids) else LEFT_OUT
            for ids, text, tokens, good in zip(completions, texts, lengths, right, strict=True)
        ]
    return [
        {"problem": row, "sampled_tokens": tokens, "right": good, **asdict(trace)}
        for (row, _), tokens, good, trace in zip(batch, lengths, right, kept, strict=True)
    ]


def cut_traces(
    source: Source,
    batch: Sequence[Job],
    examples: Sequence[dict[str, Any]],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    answers: int,
    episodes: Callable[[Sequence[int]], list[int]],
) -> list[Kept]:
    """What is kept of each completion: up to the end of the episode of most progress, with an answer that is right.

    Args:
        source, batch, answers, episodes: as in `traces`.
        examples, prompts, completions: the batch's problems, the ids of their prompts, and what was sampled.
    """
    from rltoken.evals.generate import answered
    from rltoken.methods.mrt import forced_at
    from rltoken.rng import request_seed

    ends = [[0, *episodes(ids)] for ids in completions]
    places = [(i, end, n) for i, own in enumerate(ends) for end in own for n in range(answers)]
    branches = [(i, forced_at(completions[i], end, source.template, source.generator.ends)) for i, end, _ in places]
    told = answered(
        source.generator,
        source.tokenizer,
        source.reward,
        source.template,
        examples,
        prompts,
        branches,
        [request_seed(source.settings.seed, *batch[i], "answer", end, n) for i, end, n in places],
        max_new_tokens=source.settings.max_answer_tokens,
    )
    found, each = [], iter(zip(branches, told, strict=True))
    for own in ends:
        at_ends = [list(itertools.islice(each, answers)) for _ in own]
        found.append(best_of(source, own, at_ends))
    return found


def best_of(source: Source, ends: Sequence[int], at_ends: Sequence[Sequence[tuple[Any, Any]]]) -> Kept:
    """What is kept of one trace.

    Args:
        ends: tokens before its first and up to the end of each episode.
        at_ends: for each of them, what was answered there: ((completion, prefix), answer), several times.
    """
    from rltoken.methods.mrt import best_cut

    scores = [sum(answer.graded[0] for _, answer in told) / len(told) for told in at_ends]
    chosen = best_cut(scores)
    if chosen is None:
        return LEFT_OUT
    right = [
        prefix.ids + answer.ids
        for (_, prefix), answer in at_ends[chosen]
        if answer.graded[0] > 0.5 and source.ended(answer.ids, source.template.stops)
    ]
    if not right:
        return LEFT_OUT
    text = source.tokenizer.decode(right[0], skip_special_tokens=True)
    return Kept(text, ends[chosen], scores[chosen] - scores[chosen - 1])


def written(table: pd.DataFrame, problems: Dataset) -> list[dict[str, Any]]:
    """The lines of the file: prompt (messages), completion, id, tokens of thinking, those sampled, and progress."""
    kept = table[table["completion"].notna()]
    return [
        {
            "prompt": problems[int(row.problem)]["prompt"],
            "completion": row.completion,
            "id": problems[int(row.problem)]["id"],
            "tokens": int(row.tokens),
            "sampled_tokens": int(row.sampled_tokens),
            **({} if table["progress"].isna().all() else {"progress": row.progress}),
        }
        for row in kept.itertuples()
    ]


def told(table: pd.DataFrame, lines: Sequence[dict[str, Any]], out: Path) -> str:
    """What was made, in a line."""
    tokens, sampled = (sum(line[key] for line in lines) / len(lines) for key in ("tokens", "sampled_tokens"))
    return (
        f"{out}: {len(lines)} of {len(table)} traces, {table['right'].mean():.1%} of which were right by themselves; "
        f"{tokens:.1f} thinking tokens each, of {sampled:.1f} that were sampled"
    )


if __name__ == "__main__":
    main()
