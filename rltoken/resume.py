"""What makes a checkpoint complete: it is whole, as its manifest proves, or it is not there.

A checkpoint is written into RUN/.saving, the manifest last, and renamed to RUN/checkpoint-N in one step. The manifest
holds the size and the SHA-256 of every file, so that one that was cut short or damaged later is told from a whole one.
Nothing here needs torch: the entry looks for a checkpoint before anything is loaded.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rltoken.errors import UserError, first_line

MANIFEST = "rltoken_manifest.json"
SCRATCH = ".saving"
"""The directory inside a run in which checkpoints are written: on the same disk, so that a rename is one step."""
NAME = re.compile(r"checkpoint-(\d+)")
PROBE_BYTES = 1 << 20
THREADS = 8

_GO_ON = "then go on with resume=auto: earlier checkpoints are as they were"
_SPACE = (
    "free space (a save needs room for one checkpoint more than trainer.save_total_limit keeps) and go on with "
    "resume=auto, or go on in another runs_dir with resume=PATH of the newest checkpoint; earlier ones are as they were"
)
_WRITABLE = ("it may not be written", f"make the directory writable, {_GO_ON}")
_DESCRIPTORS = ("no file descriptor is free", f"raise their limit (ulimit -n), {_GO_ON}")
TROUBLES = {
    errno.ENOSPC: ("the disk is full", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", _SPACE),
    errno.EFBIG: ("a file would pass the limit on file sizes", f"raise it (ulimit -f), {_GO_ON}"),
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EMFILE: _DESCRIPTORS,
    errno.ENFILE: _DESCRIPTORS,
}
"""Error number -> cause and fix."""
GONE = ("the run directory is gone", "set runs_dir to a place that stays, and start again")


def write_manifest(folder: Path, *, step: int, processes: int, **facts: Any) -> None:
    """Write the list of every file of a checkpoint, which declares it complete.

    Args:
        folder: the checkpoint, with all else that belongs to it.
        step: the optimizer step it was saved at.
        processes: how many processes wrote it.
        facts: what it belongs to (`rltoken.identity.changed`), and `run`, which identifies the run.
    """
    paths = _files(folder)
    with ThreadPoolExecutor(THREADS) as pool:  # hashing leaves the interpreter to others
        digests = pool.map(_digest, paths)
        files = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        }
    content = {"step": step, "processes": processes, **facts, "files": files}
    text = json.dumps({"manifest": content, "sha256": _digest_of(content)}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote: `step`, `processes`, the facts, and `files`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content, digest = found["manifest"], found["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is damaged") from error
    if digest != _digest_of(content):
        raise ValueError(f"{MANIFEST} is damaged")
    return content


def verify(folder: Path) -> str | None:
    """Read a checkpoint through and compare it with its manifest.

    Returns:
        None where it is whole, else why it is not.

    Raises:
        UserError: no file descriptor is free, so that nothing can be said.
    """
    try:
        files = read_manifest(folder)["files"]
        return next(filter(None, (_damage(folder / name, **expected) for name, expected in files.items())), None)
    except FileNotFoundError:
        return f"it has no {MANIFEST}: not finished, or not written by rltoken"
    except ValueError as error:
        return str(error)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError(f"resume: {folder} cannot be read: {_DESCRIPTORS[0]}; {_DESCRIPTORS[1]}.") from error
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"


def _damage(path: Path, *, bytes: int, sha256: str) -> str | None:
    """What is wrong with a file, if anything; the names of the arguments are those of the manifest."""
    if not path.is_file():
        return f"{path.name} is missing"
    if (found := path.stat().st_size) != bytes:
        return f"{path.name} has {found} bytes instead of {bytes}"
    return None if _digest(path) == sha256 else f"{path.name} is damaged: its checksum differs"


def newest_whole(run: Path, identity: str | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Look for the checkpoint to go on from.

    Args:
        run: the run directory.
        identity: what identifies the run; one that another run wrote is skipped. None: they are not told apart.

    Returns:
        The whole checkpoint of the highest step or None, and those of higher steps with the reason to skip each.
    """
    skipped = []
    for step, path in sorted(_steps(run).items(), reverse=True):
        reason = verify(path) or _foreign(read_manifest(path), step, identity)
        if reason is None:
            return path, skipped
        skipped.append((path, reason))
    return None, skipped


def _foreign(manifest: Mapping[str, Any], step: int, identity: str | None) -> str | None:
    """Why a whole checkpoint has no business under this name in this run, if so."""
    if manifest["step"] != step:
        return f"it was written at step {manifest['step']}"
    written_by = manifest.get("run")
    return None if None in (identity, written_by) or written_by == identity else "it belongs to another run"


def _steps(run: Path) -> dict[int, Path]:
    """Step -> checkpoint, whole or not."""
    return {int(match[1]): path for path in run.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))}


def prepare(scratch: Path) -> None:
    """Make the empty folder that the next checkpoint is written into; what a killed save left goes."""
    shutil.rmtree(scratch.parent, ignore_errors=True)
    scratch.parent.mkdir()  # without parents: a run directory that is gone must not come back
    scratch.mkdir()


def publish(scratch: Path, final: Path) -> None:
    """Put a complete checkpoint in its place: on the disk first, then under its name in one step.

    A checkpoint of the same name is replaced. Where the process is killed in between, `recover` finishes the work.

    Args:
        scratch: the complete checkpoint.
        final: its path in the run directory, on the same disk.
    """
    with ThreadPoolExecutor(THREADS) as pool:  # the disk commits together what is asked for together
        list(pool.map(_sync, (*_files(scratch), scratch / MANIFEST)))
    _sync(scratch)
    if final.exists():
        shutil.rmtree(final)
    scratch.rename(final)
    _sync(final.parent)
    with contextlib.suppress(OSError):
        scratch.parent.rmdir()


def recover(run: Path) -> None:
    """Finish or remove what a killed save left: a scratch folder that is whole lacked only its rename."""
    with contextlib.suppress(OSError):  # a directory that cannot be written is told by what needs to write
        for scratch in (run / SCRATCH).glob("checkpoint-*"):
            if verify(scratch) is None and verify(run / scratch.name) is not None:
                publish(scratch, run / scratch.name)
        shutil.rmtree(run / SCRATCH, ignore_errors=True)


def rotate(run: Path, limit: int | None, protected: Iterable[Path]) -> None:
    """Remove the checkpoints of the earliest steps beyond `limit`, but none that is protected."""
    if limit is None or limit <= 0:
        return
    by_step = _steps(run)
    removable = [path for step, path in sorted(by_step.items()) if path not in set(protected)]
    for path in removable[: max(0, len(by_step) - limit)]:
        shutil.rmtree(path, ignore_errors=True)


def put_aside(run: Path, after: int) -> list[Path]:
    """Rename the checkpoints of later steps than `after`, which the run that goes on from there is not to find.

    They are broken, another run's, or what this run is going back from. Returns their new paths.
    """
    moved = []
    for _, path in sorted((step, path) for step, path in _steps(run).items() if step > after):
        numbers = itertools.count()
        place = run / f"aside-{path.name}"
        while place.exists():
            place = run / f"aside-{path.name}.{next(numbers)}"
        with contextlib.suppress(OSError):  # a directory that cannot be written is told by what needs to write
            moved.append(path.rename(place))
    return moved


def not_written(error: BaseException, path: Path, run: Path) -> UserError | None:
    """The message for an error that came up while `path` was written, or None where the disk had no part in it.

    Args:
        error: what was raised.
        path: what was being written. A folder in `run`'s scratch directory is tried: torch hides the error number.
        run: the run directory.
    """
    number = _error_number(error)
    if number is None and isinstance(error, RuntimeError):
        number = _probe(run / SCRATCH / path.name)
    if number is None:
        return None
    unknown = (first_line(error), f"mend that, {_GO_ON}")
    gone = number == errno.ENOENT and not os.path.exists(run)  # Path.exists raises where it may not look
    cause, fix = GONE if gone else TROUBLES.get(number, unknown)
    return UserError(f"runs_dir: {path} could not be written: {cause}; {fix}.")


@contextlib.contextmanager
def disk_errors_told(run: Path) -> Iterator[None]:
    """Turn an error of writing into the run directory into one line.

    Raises:
        UserError: names the cause, the directory and the fix.
    """
    try:
        yield
    except Exception as error:
        filename = getattr(error, "filename", None)
        inside = filename is not None and run.absolute() in Path(str(filename)).absolute().parents
        full = filename is None and _error_number(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        told = not_written(error, Path(filename) if inside else run, run) if inside or full else None
        if told is None:
            raise
        raise told from error


def _error_number(error: BaseException) -> int | None:
    """The number of an OSError, or of what safetensors made of one."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def _probe(scratch: Path) -> int | None:
    """The error number of writing on in the largest file of a folder, which is the one that could not grow."""
    try:
        largest = max(_files(scratch), key=lambda path: path.stat().st_size, default=scratch / "probe")
        with largest.open("ab", buffering=0) as file:
            written = 0
            while written < PROBE_BYTES:
                written += file.write(bytes(PROBE_BYTES - written))
    except OSError as error:
        return error.errno
    return None if scratch.exists() else errno.ENOENT


def _files(folder: Path) -> list[Path]:
    """Every file of a checkpoint but its manifest, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
