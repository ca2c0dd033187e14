"""What an evaluation has done so far: one table per finished batch, written whole or not at all, in one folder.

`facts.json` says what they belong to. A folder that belongs to anything else is refused, so that no number is ever put
together from two models, prompts, settings or versions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rltoken import identity
from rltoken.errors import UserError, first_line

FACTS = "facts.json"


def refuse_other(where: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Let an evaluation that was begun or finished pass where it is the same one.

    Args:
        where: its folder.
        then: the facts that it was begun with, in the keys of `rltoken.identity.changed`.
        now: those of the command.

    Raises:
        UserError: names what has changed.
    """
    if changes := identity.changed(then, now):
        told = "; ".join(changes[: identity.SHOWN]) + ("; and more" if len(changes) > identity.SHOWN else "")
        raise UserError(
            f"out: {where} holds an evaluation already, and another: {told}; choose another with out=..., or remove it."
        )


def check(folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a folder of shards, if it holds any, that belongs to another evaluation.

    Raises:
        UserError: it does.
    """
    if (folder / FACTS).exists() and any(folder.glob("*.parquet")):
        refuse_other(folder, whole(folder / FACTS, _object), facts)


def begin(folder: Path, facts: Mapping[str, Any]) -> None:
    """Make a folder of shards, where there is none, and write what they will belong to."""
    folder.mkdir(exist_ok=True)
    if not any(folder.glob("*.parquet")):
        written(folder / FACTS, (json.dumps(facts, indent=2) + "\n").encode())


def whole(path: Path, parse: Callable[[Path], Any]) -> Any:
    """What `parse` makes of a file that was written whole: anything else was done to it from outside.

    Raises:
        UserError: it is damaged.
    """
    try:
        return parse(path)
    except (OSError, ValueError, LookupError) as error:
        raise UserError(
            f"out: {path} is damaged ({first_line(error)}); remove it to do its part again, or choose another folder "
            "with out=..."
        ) from error


def results(path: Path) -> Mapping[str, Any]:
    """A finished evaluation's results.

    Raises:
        UserError: the file is damaged.
    """
    return whole(path, _object)


def _object(path: Path) -> Mapping[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


def read(folder: Path, number: int) -> pd.DataFrame | None:
    """The table of a batch, or None where it is not finished."""
    path = _path(folder, number)
    return whole(path, pd.read_parquet) if path.exists() else None


def write(folder: Path, number: int, table: pd.DataFrame) -> None:
    """Write the table of a finished batch."""
    written(_path(folder, number), table.to_parquet())


def written(path: Path, content: bytes) -> None:
    """Write a file such that it is whole or not there, whenever the process is killed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.parquet"
