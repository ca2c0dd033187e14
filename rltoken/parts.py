"""What a command loads, made from the sections of the configuration: tokenizer, template, model, rewards, problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rltoken import adapters, models, signals, teachers
from rltoken.data import check_prompt_lengths
from rltoken.errors import UserError
from rltoken.evals import prompts
from rltoken.evals.generators import ends_of
from rltoken.rewards.guard import guarded
from rltoken.rollout.forced import encode_template
from rltoken.types import Template

if TYPE_CHECKING:
    import pandas as pd
    from peft import PeftModel

    from rltoken.pipeline import Pipeline


def source(section: DictConfig) -> str:
    """What the section `model` names: the adapter's folder where it has one, else the model's folder or hub id."""
    return section.get("adapter") or instantiate(section.source)


def tokenizer(section: DictConfig, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model or adapter at `path`, checked against the section `model`."""
    if adapters.is_adapter(path) and not adapters.has_tokenizer(path):
        path = base_of(section, path)
    return models.load_tokenizer(path, think_end=section.think_end, trust_remote_code=section.trust_remote_code)


def template(section: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """What forces an answer of the model, by the section `model`."""
    return encode_template(tokenizer, think_end=section.think_end, **section.forced)


def appended(section: DictConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the section's `appended`, whose probability after the last token is a signal; None without one.

    Raises:
        UserError: it is no token of the tokenizer, or one that ends or pads sequences.
    """
    token = section.get("appended")
    if token is None:
        return None
    number = tokenizer.get_vocab().get(token)
    if number is None or number in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        what = "no token of the tokenizer" if number is None else "what ends or pads its sequences"
        raise UserError(f"model.appended: {token!r} is {what}; set a token that the model never writes, or null.")
    return number


def model(section: DictConfig, path: str, *, trainable: bool = False) -> PreTrainedModel | PeftModel:
    """The model at `path`, or the adapter on its base, loaded as the section `model` says.

    Args:
        section: the section `model`.
        path: what `source` gave, or another folder or hub id.
        trainable: an adapter is to be trained further; a model always can be.
    """
    adapter = adapters.is_adapter(path)
    base = base_of(section, path) if adapter else path
    loaded = models.load_model(
        base,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
        quantization=adapters.quantization(section.get("quantization")),
    )
    return adapters.attached(loaded, path, base, trainable=trainable) if adapter else loaded


def teacher(cfg: DictConfig, pipeline: Pipeline, tokenizer: PreTrainedTokenizerBase) -> teachers.Teacher | None:
    """The teacher of the section `teacher`; None where there is none, or no stage names its signal.

    Args:
        cfg: the whole configuration.
        pipeline: the method.
        tokenizer: the student's.

    Raises:
        UserError: it cannot be had, or has another tokenizer.
    """
    section = cfg.teacher
    if not pipeline.needs(teachers.SIGNAL) or section.kind == "none":
        return None
    if section.kind == "base":
        return teachers.Teacher(None)
    if section.kind == "server":
        server = teachers.Server(section.url, patience=cfg.rollout.patience)
        teachers.refuse_other_server(tokenizer, server)
        return teachers.Teacher(server, teachers.named_ends(section.get("ends"), tokenizer))
    path, trusted = instantiate(section.source), section.trust_remote_code
    own = teachers.load_tokenizer(path, trust_remote_code=trusted)
    teachers.refuse_other_vocabulary(tokenizer, own, path, "teacher.path" if "path" in section else "teacher.source")
    with teachers.told_of_the_teacher():
        loaded = models.load_model(
            path,
            dtype=section.dtype,
            attn_implementation=section.attn_implementation,
            trust_remote_code=trusted,
        )
    return teachers.Teacher(loaded, ends_of(loaded.generation_config, own))


def base_of(section: DictConfig, adapter: str) -> str:
    """What an adapter is put on: a base given beside `model.adapter`, or the one that the adapter names."""
    given = adapter == section.get("adapter") and section.get("path") is not None
    return instantiate(section.source) if given else adapters.base_of(adapter)


def rewards(section: DictConfig) -> tuple[dict[str, Callable[..., Any]], list[float] | None, Callable[..., Any] | None]:
    """The reward functions under the names of the section `reward`, which TRL's metrics then use; weights; classes."""
    made = instantiate(section)
    funcs = {name: guarded(func, name=name, on_error=section.on_error) for name, func in made.funcs.items()}
    return funcs, None if made.weights is None else list(made.weights), made.classes


def answer(section: DictConfig) -> Callable[[str], str | None] | None:
    """What reads the final answer out of a completion, by the section `reward`; None where it does not say."""
    return instantiate(section.answer) if section.get("answer") else None


def correctness(funcs: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """What evaluations count: the reward function that the signal `correct` follows in training."""
    return list(funcs.values())[signals.correctness(list(funcs))]


def with_answers(table: pd.DataFrame, section: DictConfig) -> pd.DataFrame:
    """The table with the final answer of each completion, and the number of its class among those of its problem.

    Args:
        table: with `id` and `text`.
        section: the section `reward`, which says how answers are read and which are equal.

    Returns:
        With `answer` (text, None where there is none) and `answer_class` (from 0 in order of appearance, -1 where there
        is no answer), each where the section says how.
    """
    read, classes = answer(section), rewards(section)[2]
    texts = table["text"].tolist()
    if read is not None:
        table = table.assign(answer=[read(text) for text in texts])
    if classes is not None:
        table = table.assign(answer_class=classes(texts, table.groupby("id", sort=False).ngroup().tolist()))
    return table


def problems(section: DictConfig, role: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The problems of a role (train or eval) by the section `data`, none with a longer prompt than allowed."""
    longest = section.get("max_prompt_tokens")
    return check_prompt_lengths(instantiate(section[role]), tokenizer, longest, section.get("too_long", "refuse"))


def check_count(cfg: DictConfig, found: int) -> None:
    """Refuse a benchmark of which problems are missing, unless a part was asked for.

    Raises:
        UserError: there are more or fewer than it has.
    """
    counts = cfg.eval.count
    counts = list(counts) if OmegaConf.is_list(counts) else [counts]
    if counts == [None] or found in counts or cfg.data.get("eval_limit") is not None:
        return
    name = cfg.eval.benchmark or "the evaluation"
    raise UserError(
        f"eval.count: {name} has {' or '.join(map(str, counts))} problems, and {found} were found; "
        "correct data.eval_path or data.eval_hub, or set eval.count=null to evaluate these."
    )


def evaluated(dataset: Dataset, section: DictConfig) -> Dataset:
    """The problems that the section `eval` takes, from the first on, as its prompts ask them."""
    limit = section.limit
    return prompts.ask(dataset if limit is None else dataset.select(range(min(limit, len(dataset)))), section)
