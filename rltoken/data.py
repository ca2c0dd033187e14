"""Problems with checked gold answers, from the hub or from a local file, in the columns that training reads."""

from __future__ import annotations

import difflib
import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Literal, get_args

from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

from rltoken.errors import UserError, first_line
from rltoken.rewards.math import gradable
from rltoken.rewards.text import last_box

logger = logging.getLogger(__name__)

Gold = Literal["auto", "plain", "hash", "boxed"]
Unreadable = Literal["drop", "keep"]
Role = Literal["train", "eval"]
Candidate = tuple[int, object, object, list[str], str]
"""Row, problem and gold answer as they stand in the source, gold answers as they are read, id."""
UNREADABLE = "unreadable gold answer"
CHUNK = 1024
"""How many gold answers are tried at once, so that a small `limit` need not wait for all of them."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("problem", "question", "prompt"),
    "answer": ("answer", "final_answer", "solution"),
    "id": ("id", "unique_id"),
}
"""Where each column is looked for when it is not named: GSM8K, MATH, DeepScaleR and AIME name theirs so."""

_TRL_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})
_TRL_COLUMNS = frozenset({"completion", "environment", "environments", "image", "images", "tools"})
RESERVED = _TRL_ARGUMENTS | _TRL_COLUMNS
"""Columns that would collide with what TRL hands to reward functions, or switch on what it does with images."""

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class _Kept:
    """The rows that passed the checks, and how many did not, by reason, with the first of each."""

    rows: list[int] = field(default_factory=list)
    prompts: list[list[dict[str, str]]] = field(default_factory=list)
    answers: list[list[str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0
    examples: dict[str, str] = field(default_factory=dict)
    seen: int = 0


def load(
    *,
    path: str | None = None,
    hub: str | None = None,
    name: str | None = None,
    split: str = "train",
    columns: Mapping[str, str | Sequence[str] | None] | None = None,
    template: str = "{problem}",
    gold: Gold = "auto",
    limit: int | None = None,
    seed: int = 0,
    max_unparsable: float = 0.05,
    unreadable: Unreadable = "drop",
    answers: bool = True,
    role: Role = "train",
) -> Dataset:
    """A set of problems as `prompt`, `answer` and `id`, and whatever other columns the source has.

    A row without a problem, with a gold answer that is empty or (unless kept) unreadable, or with an id that came
    before is dropped; one logged line says how many and why.

    Args:
        path: a .jsonl, .json or .parquet file; where given, the hub is not asked.
        hub: name of a data set on the hub, or a local folder of one.
        name: the hub data set's configuration, where it has several.
        split: the hub data set's split.
        columns: `prompt`, `answer`, `id` -> the source's column, or several to look for in this order; a key that is
            missing or null means those of `COLUMNS`. Without an id column the id is made from the row's number.
        template: the user message; `{problem}` stands for the problem. A list of messages is taken as it is.
        gold: how the answer column, or each item of a list in it, holds the answer: `hash` (after the last ####, as
            GSM8K), `boxed` (in the last box, as MATH's solutions), `plain`, or `auto`: the first of these there is.
        limit: at most this many problems, drawn with `seed`; None takes all in their order.
        seed: what `limit` draws with.
        max_unparsable: share of the problems looked at whose gold answer may be missing or unreadable before the whole
            set is refused; a single one always may.
        unreadable: `drop` or `keep` a problem whose gold answer the grader cannot read; no answer to it is right.
        answers: whether there are gold answers; without, the column is not looked for, and `answer` is null.
        role: `train` or `eval`; tells which setting an error names.

    Returns:
        Columns `prompt` ([{"role": "user", "content": str}]), `answer` (str; a list of them for every problem where one
        has several, any of which is right; null without answers), `id` (str, unique) and the rest.

    Raises:
        UserError: no source, an unreadable source, a missing column, a template without `{problem}`, too many
            unreadable gold answers, ids that mostly repeat, or nothing left.
    """
    _refuse_settings(template, gold, unreadable, limit, role)
    source = _read(path, hub, name, split, role)
    label = path or f"{hub} [{split}]"
    wanted = [key for key in COLUMNS if answers or key != "answer"]
    found = {"answer": None} | {key: _find(source, key, (columns or {}).get(key), role) for key in wanted}
    order = list(range(len(source)))
    if limit is not None:
        random.Random(seed).shuffle(order)
    kept = _check(source, found, order, template, gold, limit, Path(path).stem if path else split, unreadable == "keep")
    _refuse_bad(kept, found, label, max_unparsable)
    collisions = sorted(RESERVED & set(source.column_names) - set(found.values()))
    _report(kept, label, len(source), collisions)
    return _columns(kept, source, {*RESERVED, *COLUMNS, *found.values()})


def _columns(kept: _Kept, source: Dataset, replaced: set[str | None]) -> Dataset:
    """What was made of the rows that are kept, and the source's other columns."""
    several = any(len(golds) > 1 for golds in kept.answers)
    answers = kept.answers if several else [golds[0] if golds else None for golds in kept.answers]
    made = Dataset.from_dict({"prompt": kept.prompts, "answer": answers, "id": kept.ids})
    rest = source.select(kept.rows).remove_columns([column for column in source.column_names if column in replaced])
    return concatenate_datasets([made, rest], axis=1) if rest.column_names else made


def load_traces(
    *,
    path: str | None,
    columns: Mapping[str, str | Sequence[str]],
    template: str = "{problem}",
    formats: Mapping[str, str] | None = None,
    key: str = "data.traces_path",
) -> Dataset:
    """Problems with whole completions, for a supervised stage.

    A row without a problem or a completion is dropped; one logged line says how many.

    Args:
        path: a .jsonl, .json or .parquet file.
        columns: `prompt`, `completion`, `answer`, `format` -> the source's column, or several to look for in order.
            Where there is a format, its tags are put around the completion, and the answer follows
            (`rltoken.methods.ada_grpo.written`); else it is taken as it is, and no answer is needed. `tokens`, the
            length of its thinking as `rltoken.star` tells it, may be left out.
        template: the user message; `{problem}` stands for the problem.
        formats: format -> the tag that opens it.
        key: the setting that holds the path, which messages name; `columns` stands beside it.

    Returns:
        Columns `prompt` ([{"role": "user", "content": str}]), `completion` (str) and, where they are asked for and the
        source tells them, `format` and `tokens`.

    Raises:
        UserError: no file, one that cannot be read, a missing column, an unknown format, or nothing left.
    """
    from rltoken.methods.ada_grpo import written

    if path is None:
        raise UserError(f"{key}: there are no traces. Set it to a .jsonl, .json or .parquet file.")
    source = _read_file(path, key)
    section = key.removesuffix("_path").removesuffix(".path")
    found = _columns_of_traces(source, columns, path, section)
    told = [name for name in ("format", "tokens") if found.get(name)]
    rows = []
    for example in source:
        prompt, text = _messages(example[found["prompt"]], template), example[found["completion"]]
        form = example[found["format"]] if "format" in told else None
        if form is not None and form not in (formats or {}):
            raise UserError(
                f"{section}.columns.format: {path} holds the format {form!r}; model.formats has: "
                f"{', '.join(formats or ['none'])}. Correct the file, or add its tag there."
            )
        if form is not None:
            text = written(form, text, str(example[found["answer"]]), formats)
        if prompt and isinstance(text, str) and text.strip():
            rows.append({"prompt": prompt, "completion": text} | {name: example[found[name]] for name in told})
    if not rows:
        raise UserError(f"{key}: {path} has no row with a problem and a completion. Correct the file.")
    if len(rows) < len(source):
        logger.warning("%s: dropped %d of %d rows without both.", key, len(source) - len(rows), len(source))
    return Dataset.from_list(rows)


def _columns_of_traces(
    source: Dataset, columns: Mapping[str, str | Sequence[str]], path: str, section: str
) -> dict[str, str | None]:
    """The source's column for each key, the first that is there; None for a format, or an answer that nobody needs."""
    wanted = {key: [names] if isinstance(names, str) else list(names) for key, names in columns.items()}
    found = {key: next((name for name in names if name in source.column_names), None) for key, names in wanted.items()}
    for key in ("prompt", "completion", *(["answer"] if found.get("format") else [])):
        if found[key] is None:
            raise UserError(
                f"{section}.columns.{key}: {path} has no column {' or '.join(map(repr, wanted[key]))}; it has: "
                f"{', '.join(source.column_names)}. Set {section}.columns.{key} to one of them."
            )
    return found


def check_prompt_lengths(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int | None,
    too_long: Literal["refuse", "drop"] = "refuse",
) -> Dataset:
    """The data set without prompts that are too long; none is ever dropped without being told.

    Args:
        dataset: with a conversational `prompt` column.
        tokenizer: whose chat template the prompts go through, with the generation prompt.
        max_prompt_tokens: the longest prompt in tokens, special tokens included; None allows any.
        too_long: `refuse` raises, `drop` leaves them out and logs their number.

    Raises:
        UserError: some are too long under `refuse`, or all under `drop`, or `too_long` is neither.
    """
    if too_long not in ("refuse", "drop"):
        raise UserError(f"data.too_long: there is no {too_long!r}. Set data.too_long to refuse or drop.")
    if max_prompt_tokens is None:
        return dataset
    encoded = tokenizer.apply_chat_template(
        dataset["prompt"][:], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    kept = [row for row, length in enumerate(lengths) if length <= max_prompt_tokens]
    count = len(lengths) - len(kept)
    if not count:
        return dataset
    told = f"{count} of {len(lengths)} prompts exceed {max_prompt_tokens} tokens (the longest has {max(lengths)})"
    if too_long == "refuse" or not kept:
        drop = "" if too_long == "drop" else ", or data.too_long=drop to train without them"
        raise UserError(f"data.max_prompt_tokens: {told}. Set data.max_prompt_tokens={max(lengths)}{drop}.")
    logger.warning("data.too_long=drop: %s; dropped them, %d remain.", told, len(kept))
    return dataset.select(kept)


def warn_shared(train: Dataset, evaluation: Dataset) -> None:
    """Tell when problems are both trained and evaluated: the evaluation then says nothing about new problems.

    Args:
        train, evaluation: with a `prompt` column; problems are the same where their text is, spaces apart.
    """
    seen = {_text(prompt) for prompt in train["prompt"]}
    shared = [text for text in map(_text, evaluation["prompt"]) if text in seen]
    if shared:
        logger.warning(
            "data.eval_path: %d of %d evaluated problems are trained on too, for example %s; leave them out of one of "
            "the two, or read the evaluation as one of known problems.",
            len(shared),
            len(evaluation),
            _short(shared[0]),
        )


def _text(prompt: str | list[dict[str, str]]) -> str:
    turns = [prompt] if isinstance(prompt, str) else [str(turn["content"]) for turn in prompt]
    return " ".join(" ".join(turns).split())


def _refuse_settings(template: str, gold: str, unreadable: str, limit: int | None, role: Role) -> None:
    if "{problem}" not in template:
        raise UserError(f"data.template: {template!r} does not contain {{problem}}. Put {{problem}} where it belongs.")
    if gold not in get_args(Gold):
        raise UserError(f"data.gold: there is no {gold!r}. Set data.gold to one of: {', '.join(get_args(Gold))}.")
    if unreadable not in get_args(Unreadable):
        raise UserError(f"data.unreadable: there is no {unreadable!r}. Set data.unreadable to drop or keep.")
    if limit is not None and limit < 1:
        key = "data.limit" if role == "train" else "data.eval_limit"
        raise UserError(f"{key}: {limit} problems are none. Set {key} to at least 1, or to null for all.")


def _read(path: str | None, hub: str | None, name: str | None, split: str, role: Role) -> Dataset:
    key = "data.path" if role == "train" else "data.eval_path"
    if path is not None:
        return _read_file(path, key)
    if hub is None:
        raise UserError(f"{key}: there is no {role} data. Set {key} to a .jsonl, .json or .parquet file.")
    key_hub = "data.hub" if role == "train" else "data.eval_hub"
    try:
        return load_dataset(hub, name, split=split)
    except Exception as error:  # the hub client, the builders and pyarrow share no base class
        raise UserError(
            f"{key_hub}: {hub}{f' ({name})' if name else ''} [{split}] cannot be loaded ({first_line(error)}). "
            f"Correct {key_hub}, or set {key} to a local .jsonl or .parquet file."
        ) from error


def _read_file(path: str, key: str) -> Dataset:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: there is no file {path}. Set {key} to a .jsonl, .json or .parquet file.")
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise UserError(f"{key}: cannot read {path} by its ending. Use one of: {', '.join(_READERS)}.")
    if not file.stat().st_size:
        raise UserError(f"{key}: {path} is empty. Set {key} to a file with problems.")
    try:
        return load_dataset(reader, data_files=str(file), split="train")
    except Exception as error:  # as above
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{key}: {path} cannot be read as {reader} ({reason}). Correct the file.") from error


def _find(source: Dataset, key: str, wanted: str | Sequence[str] | None, role: Role) -> str | None:
    """The source's column for `key`: the first that is there; None only for an id that nobody named."""
    names = [wanted] if isinstance(wanted, str) else list(COLUMNS[key] if wanted is None else wanted)
    if found := next((column for column in names if column in source.column_names), None):
        return found
    if key == "id" and not isinstance(wanted, str):
        return None
    others = {name for other, known in COLUMNS.items() if other != key for name in known}
    left = [column for column in source.column_names if column not in others]
    near = difflib.get_close_matches(names[0], source.column_names, n=1, cutoff=0.5) or left[-1:]
    fix = f"Set data.columns.{key}={near[0]}" if near else "Add it to the file"
    if key == "answer" and role == "train" and not near:
        fix += ", or data.answers=false to train on votes alone (+exp=ttrl)"
    raise UserError(
        f"data.columns.{key}: the data set has no column {' or '.join(repr(column) for column in names)}; it has: "
        f"{', '.join(source.column_names)}. {fix}."
    )


def _check(
    source: Dataset,
    found: Mapping[str, str | None],
    order: Sequence[int],
    template: str,
    gold: Gold,
    limit: int | None,
    stem: str,
    keep: bool,
) -> _Kept:
    """Look at rows in `order` until `limit` have passed; `keep` lets those pass that have an unreadable gold answer."""
    kept, ids, unlabelled = _Kept(), set(), found["answer"] is None
    for (row, problem, raw, golds, identity), readable in _tried(_rows(source, found, order, stem, gold)):
        kept.seen += 1
        prompt = _messages(problem, template)
        if prompt is None:
            _drop(kept, "empty problem", f"{identity}: {_short(problem)}")
        elif not unlabelled and not golds:
            _drop(kept, "no gold answer", f"{identity}: {_short(raw)}")
        elif not unlabelled and not readable and not keep:
            _drop(kept, UNREADABLE, f"{identity}: {_short(golds[0] if len(golds) == 1 else golds)}")
        elif identity in ids:
            _drop(kept, "repeated id", identity)
        else:
            if not unlabelled and not readable:
                kept.unreadable += 1
                kept.examples.setdefault(UNREADABLE, f"{identity}: {_short(golds[0] if len(golds) == 1 else golds)}")
            ids.add(identity)
            kept.rows.append(row)
            kept.prompts.append(prompt)
            kept.answers.append(golds)
            kept.ids.append(identity)
            if len(kept.rows) == limit:
                break
    return kept


def _tried(candidates: Iterator[Candidate]) -> Iterator[tuple[Candidate, bool]]:
    """Each with whether the grader can read any of its gold answers; in its processes, where one may hang."""
    while chunk := list(itertools.islice(candidates, CHUNK)):
        yield from zip(chunk, gradable([golds for _, _, _, golds, _ in chunk]), strict=True)


def _drop(kept: _Kept, reason: str, example: str) -> None:
    kept.dropped[reason] += 1
    kept.examples.setdefault(reason, example)


def _rows(
    source: Dataset, found: Mapping[str, str | None], order: Sequence[int], stem: str, gold: Gold
) -> Iterator[Candidate]:
    problems = source[found["prompt"]][:]
    answers = source[found["answer"]][:] if found["answer"] else [None] * len(problems)
    identities = source[found["id"]][:] if found["id"] else None
    for row in order:
        given = None if identities is None else identities[row]
        identity = f"{stem}-{row}" if given is None else str(given)
        yield row, problems[row], answers[row], _golds(answers[row], gold), identity


def _messages(problem: object, template: str) -> list[dict[str, str]] | None:
    """The conversation that poses a problem, or None where there is none."""
    if isinstance(problem, str):
        text = problem.strip()
        return [{"role": "user", "content": template.replace("{problem}", text)}] if text else None
    turns = problem if isinstance(problem, list) else []
    if turns and all(isinstance(turn, dict) and turn.get("content") for turn in turns):
        return [{"role": turn.get("role", "user"), "content": turn["content"]} for turn in turns]
    return None


def _golds(raw: object, gold: Gold) -> list[str]:
    """The gold answers in a raw value; none where one of them is missing."""
    found = [_gold(item, gold) for item in (raw if isinstance(raw, list) else [raw])]
    return found if all(found) else []


def _gold(raw: object, gold: Gold) -> str:
    """The gold answer in a raw value, "" where there is none: only a text or a number is one."""
    if isinstance(raw, bool) or not isinstance(raw, str | Real):
        return ""
    text = str(raw).strip()
    _, hashes, after = text.rpartition("####")
    readings = {"plain": text, "hash": after.strip() if hashes else "", "boxed": last_box(text) or ""}
    if gold == "auto":
        return readings["hash"] if hashes else readings["boxed"] or text
    return readings[gold]


def _refuse_bad(kept: _Kept, found: Mapping[str, str | None], label: str, max_unparsable: float) -> None:
    dropped, reasons = kept.dropped, (UNREADABLE, "no gold answer")
    bad = sum(dropped[reason] for reason in reasons) + kept.unreadable
    if bad > max(1, max_unparsable * kept.seen) or (bad and not kept.rows):
        example = next(kept.examples[reason] for reason in reasons if reason in kept.examples)
        raise UserError(
            f"data.columns.answer: {bad} of {kept.seen} gold answers in {label}, column {found['answer']!r}, cannot be "
            f"read by the grader, for example {example}. Set data.columns.answer to the column with final "
            "answers, data.gold to the way they are written, or raise data.max_unparsable."
        )
    if dropped["repeated id"] > kept.seen / 2:
        raise UserError(
            f"data.columns.id: {dropped['repeated id']} of {kept.seen} rows of {label} repeat an id in column "
            f"{found['id']!r}. Set data.columns.id to a column that tells problems apart, or to [] for row numbers."
        )
    if not kept.rows:
        raise UserError(
            f"data.columns.prompt: {label} has no problem in column {found['prompt']!r} ({kept.seen} rows). "
            "Set data.columns.prompt to the column with problems."
        )


def _report(kept: _Kept, label: str, total: int, collisions: Sequence[str]) -> None:
    reasons = ", ".join(
        f"{count} with {reason} (the first is {kept.examples[reason]})" for reason, count in kept.dropped.items()
    )
    left_out = f"; left out columns {', '.join(collisions)} (names that TRL uses)" if collisions else ""
    told = f"{label}: {len(kept.rows)} problems from {kept.seen} of {total} rows; "
    if kept.unreadable:
        told += (
            f"{kept.unreadable} of them with {UNREADABLE}, so never right (the first is {kept.examples[UNREADABLE]}); "
        )
    told += f"dropped {kept.dropped.total()}: {reasons}" if reasons else "dropped none"
    logger.log(logging.WARNING if reasons or collisions or kept.unreadable else logging.INFO, "%s%s.", told, left_out)


def _short(value: object) -> str:
    if value is None:
        return "null"
    text = " ".join(str(value).split())
    return repr(text if len(text) <= 60 else text[:57] + "...")
