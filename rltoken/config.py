"""From the composed configuration to checked objects, and from Hydra's errors to one line that names key and fix."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Optional

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from trl import GRPOConfig

from rltoken.errors import UserError, first_line
from rltoken.pipeline import refuse_split_groups

TOP_LEVEL = (
    "name", "seed", "resume", "runs_dir", "world", "model", "data", "reward", "rollout", "trainer", "eval", "method",
)  # fmt: skip
GROUPS = (
    "exp", "prompt", "control", "rows", "shape", "credit", "bounds", "weight", "ratio", "aux", "lora",
    "scale", "hardware",
)  # fmt: skip
"""Groups of configuration files that have no key of their own at the top level."""
CHOICES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
"""What TRL knows but checks only once training has begun."""
OWNED = {"output_dir": "runs_dir and name", "seed": "seed", "data_seed": "seed"}
"""Fields of GRPOConfig that other keys of the configuration decide."""
PLAIN = (bool, int, float, str)


def register_schemas() -> None:
    """Tell Hydra the schema of `trainer`: every field of TRL's GRPOConfig with its type and default."""
    ConfigStore.instance().store(group="trainer", name="schema", node=trainer_schema())


def trainer_schema() -> type:
    """A dataclass with the fields of GRPOConfig in types that OmegaConf can check (unions become Any)."""
    fields = []
    for field in dataclasses.fields(GRPOConfig):
        if field.name not in OWNED and field.init:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = default.value if isinstance(default, enum.Enum) else default
            fields.append((field.name, _checkable(field.type), _field(default)))
    return dataclasses.make_dataclass("GRPOConfigSchema", fields)


def to_grpo_config(trainer: DictConfig, *, output_dir: str, seed: int) -> GRPOConfig:
    """TRL's arguments. `bf16: null` means: where the hardware has it.

    Raises:
        UserError: TRL or transformers refuses a value or a combination.
    """
    settings = OmegaConf.to_container(trainer, resolve=True)
    if settings["bf16"] is None:
        settings["bf16"] = not settings["fp16"] and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if "seed" in (settings["generation_kwargs"] or {}):
        raise UserError(
            "trainer.generation_kwargs.seed: one seed for all would make the completions of a group identical; "
            "remove it and set seed."
        )
    if settings["num_generations"] is not None and settings["num_generations"] < 2:
        raise UserError(
            f"trainer.num_generations: GRPO compares the completions of a prompt, so {settings['num_generations']} "
            "is too few; set it to 2 or more."
        )
    for key in ("max_completion_length", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if settings[key] is None or settings[key] < 1:
            raise UserError(f"trainer.{key}: {settings[key]} is not possible; set it to 1 or more.")
    for key, choices in CHOICES.items():
        if settings[key] not in (*choices, True, False):
            raise UserError(
                f"trainer.{key}: there is no {settings[key]!r}{nearest(str(settings[key]), choices)}; choose one of: "
                f"{', '.join(choices)}."
            )
    batch, world = settings["per_device_train_batch_size"], int(os.environ.get("WORLD_SIZE", "1"))
    steps = settings["steps_per_generation"] or settings["gradient_accumulation_steps"]
    if settings["generation_batch_size"]:
        steps = settings["generation_batch_size"] // (batch * world)
    refuse_split_groups(batch, steps, settings["num_generations"])
    try:
        return GRPOConfig(output_dir=output_dir, seed=seed, **settings)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"trainer: TRL refuses the settings: {first_line(error)}") from error


def check_keys(cfg: DictConfig) -> None:
    """Refuse a key at the top level that nobody reads (`+modle.path=x` would otherwise be ignored), and missing values.

    Raises:
        UserError: names the key and the nearest one.
    """
    for key in cfg:
        if key not in TOP_LEVEL:
            known = (*GROUPS, *TOP_LEVEL)
            raise UserError(
                f"{key}: there is no such key or group{nearest(key, known)}; there are: {', '.join(known)}."
            )
    for key in sorted(OmegaConf.missing_keys(cfg), key=len):
        raise UserError(f"{key}: it has no value yet; set {key}=...")


def explain(error: Exception, keys: Iterable[str], groups: Mapping[str, Iterable[str]]) -> UserError:
    """Hydra's or OmegaConf's error about the command line or a config file as one line with the nearest valid names.

    Args:
        error: what composition, or the resolution of a value, raised.
        keys: every key of the configuration as it would be without the mistake, dotted.
        groups: group -> its choices.
    """
    chain = _chain(error)
    text = "\n".join(str(link) for link in chain)
    if choice := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        group, name = choice.groups()
        options = sorted(groups.get(group, ()))
        return UserError(
            f"{group}={name}: there is no such choice{nearest(name, options)}; '{group}' has: {', '.join(options)}."
        )
    if value := re.search(
        r"(Value '.*' .*could not be converted to \w+|Incompatible value '.*' for field of type '.*')", text
    ):
        key = re.search(r"full_key: (\S+)", text)
        return UserError(f"{key[1] if key else 'configuration'}: {value[1]}; give a value of that type.")
    if missing := re.search(r"[Mm]issing mandatory value: ([\w.]+)", text):
        return UserError(f"{missing[1]}: it has no value yet; set {missing[1]}=...")
    unknown = re.search(r"Could not (?:override|append to config|delete).*?'([^']+)'", text) or re.search(
        r"full_key: (\S+)", text
    )
    if unknown:
        near = nearest_key(unknown[1], [*keys, *groups])
        return UserError(
            f"{unknown[1]}: there is no such key{near}. 'python -m rltoken.train --cfg job' prints all of them; a "
            "leading '+' adds a group such as +exp=grpo."
        )
    if parsed := re.search(r"Error parsing override '(.*)'", text):
        return UserError(
            f"{parsed[1]}: this is no override; write key=value, and quote what the shell would take apart."
        )
    return UserError(f"command line: {first_line(error)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest of the known names, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def nearest_key(name: str, known: Iterable[str]) -> str:
    """The same for a dotted key: the first part of it that is wrong is compared with what stands at its place."""
    known, parts = set(known), name.split(".")
    wrong = next((i for i in range(len(parts)) if ".".join(parts[: i + 1]) not in known), len(parts) - 1)
    prefix = ".".join(parts[:wrong])
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == prefix]
    near = difflib.get_close_matches(parts[wrong], sorted(siblings), n=1, cutoff=0.6)
    if near:
        return f" (did you mean '{prefix}{'.' if prefix else ''}{near[0]}'?)"
    elsewhere = sorted(key for key in known if key.rpartition(".")[2] == parts[-1])
    return f" (did you mean '{elsewhere[0]}'?)" if elsewhere else ""


def flat_keys(cfg: DictConfig) -> list[str]:
    """Every key of a configuration, dotted."""
    keys = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return keys


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def _checkable(annotation: Any) -> Any:
    """The annotation where OmegaConf can check it: a plain type or an optional one; Any otherwise."""
    if annotation in PLAIN:
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        if len(parts) == 1 and parts[0] in PLAIN:
            return Optional[parts[0]]  # noqa: UP045  (OmegaConf needs the old form)
    return Any


def _field(default: Any) -> Any:
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default)
    return dataclasses.field(default=None if default is dataclasses.MISSING else default)
