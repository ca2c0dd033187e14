"""Evaluation through a method's own prompts, as `eval.prompts` asks for it.

    +eval.prompts.tldr_style.levels=[short]                  one of its levels
    +eval.prompts.budget.budgets=[32]                        one of its budgets
    '+eval.prompts.l1={least: 512, most: 512}'               one of its lengths

Each entry is a prompt stage under its name: settings that go before those of the method's stage of that name, or a
whole stage with its `_target_`, as '+prompt@eval.prompts.budget=budget' gives it. Every problem is a group of its own,
asked once for all of its samples. A prompt that follows training asks as at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rltoken.errors import UserError, nearest
from rltoken.pipeline import Pipeline, build
from rltoken.running import change_prompts
from rltoken.types import Progress

END = Progress(2**31, 2**31)
"""After every step at which a schedule may change."""


def settle(section: DictConfig, stages: Mapping[str, Any]) -> None:
    """Make each of the section's `prompts` a whole stage.

    Args:
        section: the section `eval`, changed in place.
        stages: the method's prompt stages by name; none of a model that comes without a method.

    Raises:
        UserError: an entry without a `_target_` that the method has no stage for, or a setting that cannot be.
    """
    for name, given in section.prompts.items():
        if not OmegaConf.is_dict(given):
            raise UserError(
                f"eval.prompts.{name}: {given!r} is no settings; write '+eval.prompts.{name}={{KEY: VALUE}}'."
            )
        if "_target_" in given:
            continue
        if name not in stages:
            raise UserError(
                f"eval.prompts.{name}: the method has no such prompt{nearest(name, stages)}, only "
                f"[{', '.join(stages)}]; name one of them, or give it whole, as '+prompt@eval.prompts.{name}=CHOICE'."
            )
        if unknown := sorted(given.keys() - stages[name].keys()):
            near = nearest(unknown[0], stages[name])
            raise UserError(f"eval.prompts.{name}.{unknown[0]}: there is no such setting{near}; correct or remove it.")
        section.prompts[name] = OmegaConf.merge(stages[name], given)
    _built(section)


def ask(problems: Dataset, section: DictConfig) -> Dataset:
    """The problems as the section's prompts ask them, in their order; drawn from `eval.seed`.

    Args:
        problems: with a conversational `prompt`.
        section: the section `eval`, settled.

    Raises:
        UserError: what a prompt stage raises.
    """
    stages = _built(section)["prompts"]
    if not stages:
        return problems
    rng = torch.Generator().manual_seed(section.seed)
    inputs, group = list(problems), torch.arange(len(problems))
    for stage in stages:
        inputs = change_prompts(stage, inputs, group, END, rng)
    return Dataset.from_list(inputs)


def _built(section: DictConfig) -> Pipeline:
    return build({"prompts": instantiate(section.prompts, _convert_="object")}, section="eval")
