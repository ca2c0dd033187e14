"""What a command loads, made from the sections of the configuration: tokenizer, template, model, rewards, problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rltoken import models, signals
from rltoken.data import check_prompt_lengths
from rltoken.rewards.guard import guarded
from rltoken.rollout.forced import encode_template
from rltoken.types import Template


def tokenizer(section: DictConfig, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`, checked against the section `model`."""
    return models.load_tokenizer(path, think_end=section.think_end, trust_remote_code=section.trust_remote_code)


def template(section: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """What forces an answer of the model, by the section `model`."""
    return encode_template(tokenizer, think_end=section.think_end, **section.forced)


def model(section: DictConfig, path: str) -> PreTrainedModel:
    """The model at `path`, loaded as the section `model` says."""
    return models.load_model(
        path,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
    )


def rewards(section: DictConfig) -> tuple[dict[str, Callable[..., Any]], list[float] | None, Callable[..., Any] | None]:
    """The reward functions under the names of the section `reward`, which TRL's metrics then use; weights; classes."""
    made = instantiate(section)
    funcs = {name: guarded(func, name=name, on_error=section.on_error) for name, func in made.funcs.items()}
    return funcs, None if made.weights is None else list(made.weights), made.classes


def correctness(funcs: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """What evaluations count: the reward function that the signal `correct` follows in training."""
    return list(funcs.values())[signals.correctness(list(funcs))]


def problems(section: DictConfig, role: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The problems of a role (train or eval) by the section `data`, none with a longer prompt than allowed."""
    longest = section.get("max_prompt_tokens")
    return check_prompt_lengths(instantiate(section[role]), tokenizer, longest, section.get("too_long", "refuse"))


def first(dataset: Dataset, limit: int | None) -> Dataset:
    """At most `limit` problems, from the first on."""
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
