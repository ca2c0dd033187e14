"""Whole checkpoints are told from broken ones, put in place in one step, and found again."""

import errno
import json
import os
import random
import resource
import shutil

import pytest
from omegaconf import OmegaConf

from rltoken import identity, resume, runs
from rltoken.errors import UserError

CONTENTS = {"model.safetensors": 5000, "optimizer.pt": 9000, "trainer_state.json": 300, "sub/adapter.bin": 70}


def written(folder, step=None, processes=1, manifest=True, **facts):
    """A checkpoint of random bytes."""
    for name, size in CONTENTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(name).randbytes(size))
    if manifest:
        step = int(folder.name.rpartition("-")[2]) if step is None else step
        resume.write_manifest(folder, step=step, processes=processes, **facts)
    return folder


def flip(path, position):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


DAMAGES = {
    "truncated": (lambda f: os.truncate(f / "optimizer.pt", 8999), "optimizer.pt has 8999 bytes instead of 9000"),
    "too long": (lambda f: os.truncate(f / "optimizer.pt", 9001), "optimizer.pt has 9001 bytes instead of 9000"),
    "bit-flipped": (lambda f: flip(f / "model.safetensors", 12345), "model.safetensors is damaged"),
    "a file missing": (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "half deleted": (lambda f: shutil.rmtree(f / "sub"), "adapter.bin is missing"),
    "no manifest": (lambda f: (f / resume.MANIFEST).unlink(), "not finished, or not written by rltoken"),
    "manifest truncated": (lambda f: os.truncate(f / resume.MANIFEST, 200), "rltoken_manifest.json is damaged"),
    "manifest empty": (lambda f: os.truncate(f / resume.MANIFEST, 0), "rltoken_manifest.json is damaged"),
    "manifest of something else": (lambda f: (f / resume.MANIFEST).write_text("[1]"), "is damaged"),
    "empty folder": (lambda f: [shutil.rmtree(f), f.mkdir()], "not finished, or not written by rltoken"),
    "a folder for a file": (lambda f: [(f / "optimizer.pt").unlink(), (f / "optimizer.pt").mkdir()], "is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told(tmp_path, name):
    folder = written(tmp_path / "checkpoint-3")
    assert resume.verify(folder) is None
    damage, reason = DAMAGES[name]
    damage(folder)
    assert reason in resume.verify(folder)


def test_any_flipped_bit_of_any_file_is_found(tmp_path):
    folder, draw = written(tmp_path / "checkpoint-3"), random.Random(0)
    for name in (*CONTENTS, resume.MANIFEST):
        bits = (folder / name).stat().st_size * 8
        for position in (0, bits - 17, *draw.sample(range(bits - 16), 30)):
            flip(folder / name, position)
            assert resume.verify(folder), f"bit {position} of {name}"
            flip(folder / name, position)
    assert resume.verify(folder) is None


def test_a_copy_elsewhere_is_whole_and_added_files_do_no_harm(tmp_path):
    shutil.copytree(written(tmp_path / "checkpoint-3"), tmp_path / "best")
    (tmp_path / "best" / "notes.txt").write_text("mine")
    assert resume.verify(tmp_path / "best") is None


def test_the_manifest_says_what_a_reader_needs(tmp_path):
    manifest = resume.read_manifest(written(tmp_path / "checkpoint-3", processes=2))
    assert (manifest["step"], manifest["processes"]) == (3, 2)
    assert manifest["files"].keys() == CONTENTS.keys()


def test_the_newest_whole_one_is_found_and_others_are_skipped_with_a_reason(tmp_path):
    for step in (2, 9, 10, 11):
        written(tmp_path / f"checkpoint-{step}")
    written(tmp_path / "checkpoint-12", manifest=False)
    flip(tmp_path / "checkpoint-11/optimizer.pt", 7)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-13")
    (tmp_path / "checkpoint-14").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-15.tar").touch()
    path, skipped = resume.newest_whole(tmp_path)
    assert path == tmp_path / "checkpoint-10"
    assert [broken.name for broken, _ in skipped] == [f"checkpoint-{step}" for step in (14, 13, 12, 11)]
    assert "written at step 2" in skipped[1][1] and "is damaged" in skipped[3][1]
    assert resume.newest_whole(tmp_path / "nowhere") == (None, [])


def test_publishing_replaces_and_leaves_no_scratch(tmp_path):
    final, scratch = tmp_path / "checkpoint-4", tmp_path / resume.SCRATCH / "checkpoint-4"
    written(final)
    (final / "old").touch()
    resume.prepare(scratch)
    resume.publish(written(scratch), final)
    assert resume.verify(final) is None and not (final / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_what_a_killed_save_left_is_finished_or_removed(tmp_path):
    scratch = tmp_path / resume.SCRATCH
    written(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2/kept").touch()
    written(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3/optimizer.pt").unlink()
    for step in (2, 3, 4):
        written(scratch / f"checkpoint-{step}")
    written(scratch / "checkpoint-5", manifest=False)
    resume.recover(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}
    assert all(resume.verify(tmp_path / f"checkpoint-{step}") is None for step in (2, 3, 4))
    assert (tmp_path / "checkpoint-2/kept").exists(), "a whole one is left alone"
    resume.recover(tmp_path / "nowhere")


def test_a_run_directory_that_is_gone_does_not_come_back(tmp_path):
    with pytest.raises(FileNotFoundError):
        resume.prepare(tmp_path / "gone" / resume.SCRATCH / "checkpoint-1")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"disk is full; free space .*trainer\.save_total_limit"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk is full; free space"),
        (OSError(errno.EDQUOT, "quota"), "quota is used up; free space"),
        (OSError(errno.EROFS, "read-only"), "may not be written; make the directory writable"),
        (OSError(errno.EMFILE, "too many"), "no file descriptor is free; raise"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; mend that"),
    ],
)
def test_an_error_of_the_disk_names_its_cause_and_fix(tmp_path, error, told):
    with pytest.raises(UserError, match=rf"^runs_dir: {tmp_path}/checkpoint-3 could not be written: .*{told}.*auto"):
        raise resume.not_written(error, tmp_path / "checkpoint-3", tmp_path)


def test_an_error_that_is_not_the_disks_is_left_alone(tmp_path):
    (tmp_path / resume.SCRATCH / "checkpoint-3").mkdir(parents=True)
    assert resume.not_written(RuntimeError("shapes differ"), tmp_path / "checkpoint-3", tmp_path) is None
    for error in (FileNotFoundError(errno.ENOENT, "none", "data.jsonl"), OSError(errno.EIO, "none"), KeyError("x")):
        with pytest.raises(type(error)), resume.disk_errors_told(tmp_path):
            raise error


def test_errors_inside_the_run_directory_and_full_disks_are_told(tmp_path):
    gone = FileNotFoundError(errno.ENOENT, "none", str(tmp_path / "run/metrics.jsonl"))
    with pytest.raises(UserError, match="the run directory is gone"), resume.disk_errors_told(tmp_path / "run"):
        raise gone
    with pytest.raises(UserError, match="the disk is full"), resume.disk_errors_told(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def chosen(folder, how, on_change="refuse"):
    return runs.checkpoint(folder, OmegaConf.create({"resume": how, "on_change": on_change}))


def test_auto_prints_what_it_skips(tmp_path, capsys):
    assert chosen(tmp_path, "auto") is None and chosen(tmp_path, None) is None
    for step in (1, 2):
        written(tmp_path / f"checkpoint-{step}")
    assert chosen(tmp_path, "auto") == str(tmp_path / "checkpoint-2") and capsys.readouterr().out == ""
    flip(tmp_path / "checkpoint-2/optimizer.pt", 5)
    assert chosen(tmp_path, "auto") == str(tmp_path / "checkpoint-1")
    skipped, going_on, aside = capsys.readouterr().out.splitlines()
    assert aside == f"resume: put aside as {tmp_path / 'aside-checkpoint-2'}"
    assert "skipped" in skipped and "checkpoint-2: optimizer.pt is damaged" in skipped and "checkpoint-1" in going_on
    (tmp_path / "checkpoint-1" / resume.MANIFEST).unlink()
    assert chosen(tmp_path, "auto") is None
    assert "from the beginning: no checkpoint is whole" in capsys.readouterr().out


def test_a_named_checkpoint_is_checked(tmp_path, capsys):
    folder = written(tmp_path / "run/checkpoint-2")
    assert chosen(tmp_path, str(folder)) == str(folder)
    (folder / "trainer_state.json").unlink()
    with pytest.raises(UserError, match=r"resume: .*checkpoint-2 is broken: trainer_state.json is missing; set resume"):
        chosen(tmp_path, str(folder))
    stock = written(tmp_path / "stock/checkpoint-2", manifest=False)
    assert chosen(tmp_path, str(stock)) == str(stock)
    assert "has no rltoken_manifest.json" in capsys.readouterr().out
    with pytest.raises(UserError, match="is no checkpoint; set resume=auto"):
        chosen(tmp_path, str(tmp_path))


@pytest.mark.parametrize("how", ["auto", "path"])
def test_another_number_of_processes_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, how):
    folder = written(tmp_path / "checkpoint-2", processes=2)
    with pytest.raises(UserError, match=r"resume: .*written by 2 processes and there are 1; go back to what was"):
        chosen(tmp_path, "auto" if how == "auto" else str(folder))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert chosen(tmp_path, "auto" if how == "auto" else str(folder)) == str(folder)


def test_other_versions_are_refused_or_accepted_with_a_word(tmp_path, monkeypatch, capsys):
    folder = written(tmp_path / "checkpoint-2", versions={"torch": "2.0", "trl": "1.16"})
    monkeypatch.setattr(identity, "versions", lambda: {"torch": "2.1", "trl": "1.16"})
    with pytest.raises(UserError, match=r"it was written by torch 2\.0 and this is 2\.1; .*set on_change=accept"):
        chosen(tmp_path, "auto")
    assert chosen(tmp_path, "auto", "accept") == str(folder)
    (line,) = capsys.readouterr().out.splitlines()
    assert "torch 2.0" in line and "from here on the numbers are not those of a run in one piece" in line


def test_a_checkpoint_of_another_run_is_skipped_and_put_aside(tmp_path, capsys):
    (tmp_path / runs.RUN_ID).write_text("mine\n")
    for step, run in ((2, "mine"), (3, None), (5, "other")):
        written(tmp_path / f"checkpoint-{step}", run=run)
    assert chosen(tmp_path, "auto") == str(tmp_path / "checkpoint-3"), "one that says nothing is not told apart"
    out = capsys.readouterr().out
    assert "checkpoint-5: it belongs to another run" in out and f"put aside as {tmp_path / 'aside-checkpoint-5'}" in out
    assert resume.verify(tmp_path / "aside-checkpoint-5") is None and not (tmp_path / "checkpoint-5").exists()
    written(tmp_path / "checkpoint-5", run="other")
    chosen(tmp_path, "auto")
    assert (tmp_path / "aside-checkpoint-5.0").exists(), "nothing is overwritten"


def test_going_back_to_an_earlier_checkpoint_puts_the_later_ones_aside(tmp_path):
    for step in (2, 4, 6):
        written(tmp_path / f"checkpoint-{step}")
    assert chosen(tmp_path, str(tmp_path / "checkpoint-2")) == str(tmp_path / "checkpoint-2")
    assert resume.newest_whole(tmp_path) == (tmp_path / "checkpoint-2", [])
    assert sorted(path.name for path in tmp_path.glob("aside-*")) == ["aside-checkpoint-4", "aside-checkpoint-6"]


def test_the_settings_of_a_lone_checkpoint_are_compared(tmp_path):
    folder = written(tmp_path / "backup/checkpoint-2", settings={"seed": 0, "trainer.beta": 0.0})
    cfg = {"resume": str(folder), "on_change": "refuse", "seed": 5, "trainer": {"beta": 0.0}}
    with pytest.raises(UserError, match=r"checkpoint-2 does not fit: seed was 0 and is 5; go back"):
        runs.checkpoint(tmp_path / "new", OmegaConf.create(cfg))
    assert runs.checkpoint(tmp_path / "new", OmegaConf.create(cfg | {"seed": 0})) == str(folder)


def test_checkpoints_are_removed_by_step_whatever_their_dates(tmp_path):
    for step in (2, 4, 10, 12):
        written(tmp_path / f"checkpoint-{step}")
    for step in (2, 4):  # as where another machine's clock is ahead
        os.utime(tmp_path / f"checkpoint-{step}", (2e9, 2e9))

    def left():
        return sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.iterdir())

    resume.rotate(tmp_path, None, [])
    assert left() == [2, 4, 10, 12]
    resume.rotate(tmp_path, 3, [tmp_path / "checkpoint-12"])
    assert left() == [4, 10, 12]
    resume.rotate(tmp_path, 2, [tmp_path / "checkpoint-12", tmp_path / "checkpoint-4"])
    assert left() == [4, 12]
    resume.rotate(tmp_path, 1, [tmp_path / "checkpoint-12", tmp_path / "checkpoint-4"])
    assert left() == [4, 12], "the newest and the best stay"
    resume.rotate(tmp_path, 1, [tmp_path / "checkpoint-12"])
    assert left() == [12]


def test_without_file_descriptors_nothing_is_skipped(tmp_path):
    """A whole checkpoint that cannot be opened now must not be taken for a broken one."""
    folder = written(tmp_path / "checkpoint-2")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(UserError, match="no file descriptor is free; raise their limit"):
            resume.verify(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_manifest_is_plain_json(tmp_path):
    found = json.loads((written(tmp_path / "checkpoint-3") / resume.MANIFEST).read_text())
    assert found.keys() == {"manifest", "sha256"}
