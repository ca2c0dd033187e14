"""Secrets stay out of run directories: settings are written there, so that none may be one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rltoken.errors import UserError

NAMES = re.compile(
    r"(?:^|_)(?:(?:api|access|secret|private)_?key|password|passwd|secret|credentials?"
    r"|(?:hub|hf|api|access|auth|bearer|github)_token)$",
    re.I,
)
"""Settings that hold nothing else."""
VARIABLES = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.I)
"""Environment variables that do."""
SHORTEST = 12
"""Characters of a variable that no setting contains by chance."""
IN_URL = re.compile(r"://[^/\s:@]+:[^/\s@]+@")


def refuse(cfg: DictConfig, arguments: Sequence[str] = ()) -> None:
    """Refuse settings that are secrets: by their name, as a part of a URL, or as the value of such a variable.

    Args:
        cfg: the configuration, with references that can be resolved.
        arguments: the command line, which is written too; it may have settings of Hydra's own beside those of `cfg`.

    Raises:
        UserError: names the key, and where a secret is safe; never the secret.
    """
    held = {value: name for name, value in os.environ.items() if VARIABLES.search(name) and len(value) >= SHORTEST}
    for key, value in [*_texts(OmegaConf.to_container(cfg, resolve=True)), *_given(arguments)]:
        if value and NAMES.search(key.rpartition(".")[2]):
            raise UserError(
                f"{key}: it would be written into the run directory; leave it out, and set the environment variable "
                "that its reader takes it from (HF_TOKEN for the hub, OPENAI_API_KEY for a server of chat completions)."
            )
        if IN_URL.search(value):
            raise UserError(
                f"{key}: the password in its URL would be written into the run directory; leave it out of the URL."
            )
        if name := next((name for secret, name in held.items() if secret in value), None):
            raise UserError(
                f"{key}: it holds the value of ${name}, which would be written into the run directory; let the "
                "function that needs it read the variable itself."
            )


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The dotted key of every text and number in nested dicts and lists, and the text."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value, key)
    elif isinstance(node, str | int | float) and not isinstance(node, bool):  # a password may be a number
        yield key, str(node)


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The key and the text of each override, but of one that empties a setting or refers to something else."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if value != "null" and not value.startswith("${"):
            yield key.lstrip("+"), value
