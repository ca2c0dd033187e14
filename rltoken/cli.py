"""What every command of rltoken shares: a Hydra job whose mistakes end in one line with the nearest names."""

from __future__ import annotations

import gc
import importlib.resources
import os
import re
import string
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rltoken import config, runs
from rltoken.errors import SharedError, UserError, first_line, nearest
from rltoken.preemption import EXIT_CODE, Preempted

CONFIG_MODULE = "rltoken.conf"
STATUSES: list[int] = []
"""Exit status of each job of this process: --multirun runs several."""


def main(
    job: Callable[[], None], config_name: str, top_level: Sequence[str], when_interrupted: str, *, about: str = ""
) -> None:
    """Run a Hydra job and leave.

    The status is 0, 2 where the user can mend something, 75 where the job was told to leave and can be gone on with,
    130 after Ctrl-C, 1 for anything else.

    Args:
        job: decorated by `hydra.main`; it calls `attempt`.
        config_name: the primary configuration, for the names to suggest.
        top_level: the keys at its top.
        when_interrupted: what to say after Ctrl-C.
        about: what `--help` says before the help of that configuration.
    """
    if not {"--help", "-h"}.isdisjoint(sys.argv[1:]):
        print(about + help_text(config_name))
        sys.exit(0)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on, instead of printing and exiting
    config.register_schemas()
    refuse_dashes(sys.argv[1:], top_level)
    refuse_bases(sys.argv[1:])
    try:
        job()
    except UserError as error:
        fail(error)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: Hydra's for a group set to null
        GlobalHydra.instance().clear()
        fail(config.explain(error, *known_names(config_name), sys.argv[1:]))
    except Preempted as told:  # no Exception, so that no later job of a sweep begins
        STATUSES.append(EXIT_CODE)
        if runs.is_main_process():
            print(told, file=sys.stderr)
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr)
        sys.exit(130)
    status = max(STATUSES, default=0)
    if status in (0, EXIT_CODE):
        leave_process_group()
    sys.exit(status)


def leave_process_group() -> None:
    """End this process's part in torch's process group; whatever holds it, as a trainer does, must be gone.

    A gloo thread that outlives the interpreter aborts the process now and then (pytorch #190489).
    """
    from torch import distributed

    gc.collect()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def leave_terminal_to_us() -> None:
    """Switch off the bars that libraries draw for work of a second."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def attempt(work: Callable[[], None]) -> None:
    """Do the work of one job; errors are told here, since Hydra would add lines of its own."""
    try:
        work()
        STATUSES.append(0)
    except Exception as error:
        mendable = user_error(error)
        STATUSES.append(2 if mendable else 1)
        if mendable is None:
            traceback.print_exc()
        elif runs.is_main_process() or not isinstance(mendable, SharedError):
            print(f"error: {mendable}", file=sys.stderr)


def fail(error: UserError) -> None:
    """Print the one line, on rank 0 only since composition fails alike everywhere, and leave."""
    if runs.is_main_process():
        print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def refuse_dashes(arguments: Sequence[str], top_level: Sequence[str]) -> None:
    """Leave where an override is written as an option (`--exp=grpo`): Hydra would take it for something else."""
    for argument in arguments:
        key = argument.lstrip("-").partition("=")[0]
        if argument.startswith("--") and key.split(".")[0] in (*top_level, *config.GROUPS):
            plus = "+" if key in config.ADDED_GROUPS else ""
            fail(UserError(f"{argument}: overrides are written without dashes: {plus}{argument.lstrip('-')}"))


def refuse_bases(arguments: Sequence[str]) -> None:
    """Leave where a file is chosen that other choices of its group build on: alone it lacks what makes it one."""
    for argument in arguments:
        base = re.fullmatch(r"\+?(\w+)=(?:.*[\[,])?(_\w+)\b.*", argument)
        if base and importlib.resources.files(CONFIG_MODULE).joinpath(base[1], f"{base[2]}.yaml").is_file():
            fail(UserError(f"{base[1]}={base[2]}: it is only what other choices build on; --help lists those."))


def user_error(error: BaseException) -> UserError | None:
    """The UserError that an exception is or was raised from, also through Hydra's instantiation."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, InstantiationException):
        return (error.__cause__ and user_error(error.__cause__)) or _not_instantiated(error)
    if isinstance(error, OmegaConfBaseException):
        return config.explain(error, (), {})
    return None


def _not_instantiated(error: InstantiationException) -> UserError | None:
    """What a `_target_` raised, or that there is none of that name, under its key; None for a bug of ours."""
    key, target = re.search(r"full_key: (\S+)", str(error)), re.search(r"target '([^']+)'", str(error))
    where, cause = key[1] if key else "configuration", error.__cause__
    if cause is None:
        uncallable = re.search(r"Expected a callable target, got (.+)", str(error))
        return uncallable and UserError(f"{where}: {uncallable[1]} cannot be called; name a function or a class.")
    setting, _, told = first_line(cause).partition(": ")
    if key and isinstance(cause, ValueError) and told and setting.isidentifier():
        return UserError(f"{key[1]}.{setting}: {told.rstrip('.')}.")
    root = cause.__cause__ if isinstance(cause, ImportError) and cause.__cause__ else cause
    return UserError(
        f"{where}: {target[1] if target else '_target_'} cannot be had or called: {type(root).__name__}: "
        f"{first_line(root).rstrip(':.')}{_near_target(target[1] if target else '')}. Correct _target_ or its settings."
    )


def _near_target(target: str) -> str:
    """A name in the module of a target that is not there which it may stand for, as a question."""
    module, _, name = target.rpartition(".")
    return nearest(name, dir(sys.modules[module])) if module in sys.modules else ""


def known_names(config_name: str) -> tuple[list[str], dict[str, list[str]]]:
    """Every key that there is beside the mistake, and the choices of every group."""
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        return config.flat_keys(_without_mistake(config_name)), _groups()


def help_text(config_name: str) -> str:
    """What the configuration says of itself, with the choices that are meant for it: Hydra would list every file."""
    told = OmegaConf.load(importlib.resources.files(CONFIG_MODULE) / f"{config_name}.yaml").hydra.help.template
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        choices = "\n".join(f"{group}: {', '.join(sorted(names))}" for group, names in sorted(_groups().items()))
    return string.Template(told).substitute(APP_CONFIG_GROUPS=choices)


def choices(group: str) -> list[str]:
    """The choices of a group that are meant for it; Hydra must be initialised."""
    return _choices(GlobalHydra.instance().config_loader(), group)


def _groups() -> dict[str, list[str]]:
    loader = GlobalHydra.instance().config_loader()
    return {name: _choices(loader, name) for name in loader.list_groups("") if not name.startswith(("hydra", "_"))}


def _choices(loader: Any, group: str) -> list[str]:
    """The choices of a group, those in its folders as folder/choice."""
    own = [name for name in loader.get_group_options(group) if not name.startswith("_") and name != "schema"]
    folders = [name for name in loader.list_groups(group) if not name.startswith("_")]
    return own + [f"{folder}/{name}" for folder in folders for name in _choices(loader, f"{group}/{folder}")]


def _without_mistake(config_name: str) -> DictConfig:
    """The configuration that the command line's choices of groups give, or the default one if those are wrong."""
    choices = [item for item in sys.argv[1:] if "=" in item and "." not in item.partition("=")[0] and item[0] != "-"]
    try:
        return compose(config_name, overrides=choices)
    except (HydraException, OmegaConfBaseException, ValueError):
        return compose(config_name)
