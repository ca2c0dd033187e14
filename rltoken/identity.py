"""What a checkpoint belongs to: settings, code, data, versions and processes, and what of it has changed since.

All of it stands in the manifest (`rltoken.resume`). Nothing here needs torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rltoken import __version__
from rltoken.errors import UserError

SHAPING = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "numpy", "math-verify", "sympy")
"""Packages of which another version may compute other numbers from the same state."""
WHEN_TO_END = ("trainer.max_hours", "trainer.max_skipped_steps", "trainer.ddp_timeout")
"""Settings of when a run leaves unfinished: the next start may have others."""
FREE = ("name", "runs_dir", "resume", "on_change", *WHEN_TO_END, "trainer.save_total_limit", "reward.workers")
"""Settings on which no number depends."""
LOADED = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
"""Endings of the files that a model and its tokenizer are loaded from."""
ORDERED = ("method", "reward.funcs")
"""Sections whose order counts."""
SENTENCES = {
    "data": "the training data are others than then",
    "eval_data": "the evaluation data are others than then",
    "problems": "the problems evaluated before and after are others than then",
    "model": "the model is another than then",
    "frozen": "the weights that are not trained (an adapter's base, the reference, the teacher) are others than then",
}
"""What is compared by a digest -> what is said where it differs."""
SHOWN = 5
"""How many changes one message names."""


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what shapes the numbers of a run; rltoken's with a digest of its code."""
    own = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*own.glob("**/*.py"), *(own.parent / "rewards").glob("*.py")]):
        digest.update(path.read_bytes())
    found = {"rltoken": f"{__version__}+{digest.hexdigest()[:8]}"}
    return found | {package: importlib.metadata.version(package) for package in SHAPING}


def digest_of_model(path: str) -> str:
    """What identifies a model: the content of the files in its folder, or the revision that a hub id stands for."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(path, "config.json")).parent.name
    digest = hashlib.sha256()
    for file in sorted(found for found in folder.iterdir() if found.suffix in LOADED):
        with file.open("rb") as content:
            digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def digest_of_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """What identifies a data set: its rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def settings(cfg: DictConfig) -> dict[str, Any]:
    """Every setting on which a number may depend, under its dotted key."""
    return {key: value for key, value in flat(OmegaConf.to_container(cfg, resolve=True)).items() if key not in FREE}


def code(cfg: DictConfig) -> dict[str, str]:
    """Digest of the source of each module of the user's own that a `_target_` of the configuration names."""
    targets = flat(OmegaConf.to_container(cfg, resolve=True))
    files = [_own_file(str(target)) for key, target in targets.items() if key.rpartition(".")[2] == "_target_"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path}


def _own_file(target: str) -> Path | None:
    """The file of the module that a target stands in; None for those of rltoken, of Python and of packages."""
    parts = target.split(".")
    if parts[0] == "rltoken" or parts[0] in sys.stdlib_module_names:
        return None
    for end in range(len(parts) - 1, 0, -1):
        try:
            spec = importlib.util.find_spec(".".join(parts[:end]))
        except Exception:  # a class in the place of a module, or what the user will be told when it is loaded
            continue
        path = Path(spec.origin) if spec and spec.origin else None
        if path and path.is_file():
            return None if "site-packages" in path.parts else path
    return None


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was when a checkpoint was written, in words.

    Args:
        then: the checkpoint's manifest.
        now: what is known of the same keys; None where nothing can be said.
    """
    found = ["it has no state of the optimizer (trainer.save_only_model)"] if then.get("weights_only") else []
    pairs = {key: (then[key], value) for key, value in now.items() if None not in (value, then.get(key))}
    for key, (old, new) in pairs.items():
        if key == "processes" and old != new:
            found.append(f"it was written by {old} processes and there are {new}")
        elif key == "versions":
            each = {package: (old.get(package), version) for package, version in new.items()}
            found += [f"it was written by {name} {a} and this is {b}" for name, (a, b) in each.items() if a != b]
        elif key == "settings":
            found += changed_settings(old, new)
        elif key == "code":
            found += [f"{name} is not as it was" for name, digest in new.items() if old.get(name) != digest]
        elif key in SENTENCES and old != new:
            found.append(SENTENCES[key])
    return found


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Which settings differ, in words."""
    found = [
        f"{key} was {old.get(key)} and is {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    return found or list(_reordered(old, new))


def _reordered(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for section in ORDERED:
        before, after = ([key for key in keys if key.startswith(f"{section}.")] for keys in (old, new))
        if before != after:
            yield f"the order of {section} is another"


def accept_or_refuse(what: str, changes: Sequence[str], on_change: str) -> None:
    """Print changes that were accepted, and what stops being exact.

    Args:
        what: the checkpoint or run directory.
        changes: in words.
        on_change: 'refuse' or 'accept'.

    Raises:
        UserError: there are some and they are not accepted.
    """
    if not changes:
        return
    told = "; ".join(changes[:SHOWN]) + (f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else "")
    if on_change != "accept":
        raise UserError(
            f"resume: {what} does not fit: {told}; go back to what was, choose another name, or set on_change=accept."
        )
    if os.environ.get("RANK", "0") == "0":
        print(f"resume: {what}: {told}. Accepted: from here on the numbers are not those of a run in one piece.")


def flat(container: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of nested dicts under its dotted key."""
    found: dict[str, Any] = {}
    for key, value in container.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
