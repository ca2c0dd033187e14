"""Configurations as tests of the methods use them: what a command line composes, builds, and refuses."""

import functools
import inspect
from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rltoken.config import check_keys, register_schemas
from rltoken.errors import UserError
from rltoken.pipeline import Pipeline, Stage, build


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """The configuration of a command line; not to be changed."""
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))


def built(*overrides: str, settings: tuple[str, ...] = ()) -> Pipeline:
    """The pipeline of a command line; `settings` are more of it, KEY=VALUE, which cost no further composition."""
    cfg = OmegaConf.merge(composed(*overrides), OmegaConf.from_dotlist(list(settings)))
    check_keys(cfg)
    return build(instantiate(cfg.method, _convert_="object"))


def assert_refused(choice: str, setting: str) -> None:
    """Building the choice with the setting ends in one error, told under the setting's key."""
    with pytest.raises(UserError) as refused:
        built(choice, settings=(setting,))
    assert str(refused.value).startswith(setting.partition("=")[0] + ":")


def assert_defaults(stage: Stage, key: str, function: Callable) -> None:
    """The stage has the key, calls the function, and is configured with the function's own defaults."""
    assert stage.key == key and stage.call.func is function
    declared = {
        name: plain(parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert {name: plain(value) for name, value in stage.call.keywords.items()} == declared


def plain(value: object) -> object:
    """Tuples of a signature as the lists of a configuration."""
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def sections(exp: str) -> dict[str, dict]:
    """The sections of an `exp` that a method may set, as plain values: to hold a control against what it controls."""
    cfg = composed(f"+exp={exp}")
    check_keys(cfg)
    return {name: OmegaConf.to_container(cfg[name]) for name in ("method", "trainer", "teacher", "reward")}
