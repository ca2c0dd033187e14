"""Each rank has a log in the run directory, and ranks that would not run the same refuse to start."""

import hashlib
import io
import logging
import sys
import threading

import pytest
from omegaconf import OmegaConf

from rltoken import logs, runs
from rltoken.errors import UserError
from rltoken.ranks import differences, facts
from tests.resume import phases
from tests.resume.phases import started
from tests.resume.test_preempted_processes import QUICK, TWO

OTHER = """
import os, sys
if os.environ["RANK"] == "1":
    {change}
"""


def test_what_differs_is_said_with_its_place():
    same = {"trainer.beta": 0.0, "version of torch": "2.13.0", "seed": 1}
    assert differences([same, dict(same), dict(same)]) == []
    found = differences([same, same | {"trainer.beta": 0.1}, same, {"seed": 1, "version of torch": "2.13.0"}])
    assert found == ["trainer.beta is 0.0 on ranks 0 and 2, 0.1 on rank 1, absent on rank 3"]
    assert differences([{"a": 1}, {"a": 1, "code of mine.py": "x" * 64}]) == [
        f"code of mine.py is absent on rank 0, {'x' * 60} on rank 1"
    ]


def test_settings_versions_and_the_users_own_code_are_compared():
    accuracy = {"_target_": "tests.resume.phases.parity"}
    found = facts(OmegaConf.create({"trainer": {"beta": 0.5}, "reward": {"funcs": {"accuracy": accuracy}}}))
    assert found["trainer.beta"] == 0.5 and {"version of rltoken", "version of torch"} <= found.keys()
    with open(phases.__file__, "rb") as source:
        assert found["code of phases.py"] == hashlib.file_digest(source, "sha256").hexdigest()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("sys.argv.append('trainer.beta=0.25')", "trainer.beta is 0.0 on rank 0, 0.25 on rank 1"),
        pytest.param(
            "from rltoken import identity; identity.versions()['torch'] = '2.0'",
            "version of torch is 2.13.0",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "from rltoken import identity; identity.digest_of_rows = lambda rows: '0123456789'",
            "; the evaluation data is ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "from rltoken import parts; get = parts.problems; parts.problems = lambda section, role, tokenizer: "
            "get(section, role, tokenizer).select(range(2 if role == 'eval' else 32))",
            "same: the evaluation data is ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "from rltoken import parts; get = parts.model; parts.model = lambda *given, **said: "
            "get(*given, **said).apply(lambda part: [value.data.mul_(2) for value in part.parameters(recurse=False)])",
            "same: the model is ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_that_differ_refuse_to_start(tmp_path, cache, change, told):
    found = started(tmp_path, cache, QUICK, OTHER.format(change=change), TWO)
    lines = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert (
        found.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: ranks: they would not run the same: ")
    )
    assert told in lines[0] and "Start every rank by the same command" in lines[0]
    assert not (tmp_path / "runs/x").exists(), "nothing came of it"


@pytest.mark.slow
def test_where_one_rank_cannot_begin_the_others_end_without_a_word(tmp_path, cache):
    (tmp_path / "runs/x/checkpoint-1").mkdir(parents=True)
    found = started(tmp_path, cache, [item for item in QUICK if item != "resume=auto"], launcher=TWO)
    lines = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert found.returncode == 1 and len(lines) == 1 and "runs/x exists already" in lines[0]


@pytest.mark.slow
def test_a_rank_that_does_not_see_the_run_directory_ends_all_of_them(tmp_path, cache):
    """As on a machine with a disk of its own."""
    (tmp_path / "elsewhere").mkdir()
    change = "from rltoken import runs; runs.SEEN_SECONDS = 0.5; os.chdir('elsewhere')"
    found = started(tmp_path, cache, QUICK, OTHER.format(change=change), TWO)
    assert found.returncode == 1 and found.stderr.count("error: ") == 2, found.stderr  # two ranks may share a line
    assert f"error: runs_dir: {tmp_path}/elsewhere/runs/x on " in found.stderr
    assert "error: rank 1 could not begin." in found.stderr and not (tmp_path / "elsewhere/runs").exists()


def test_the_run_directory_of_rank_0_may_be_seen_late(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SEEN_SECONDS", 5.0)
    threading.Timer(0.3, (tmp_path / runs.RUN_ID).write_text, ["abc\n"]).start()
    runs.refuse_unseen(tmp_path, "abc")
    monkeypatch.setattr(runs, "SEEN_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"^runs_dir: .* is not the run directory of rank 0"):
        runs.refuse_unseen(tmp_path, "other")


def test_a_log_has_what_stays_on_a_terminal():
    terminal, file = io.StringIO(), io.StringIO()
    tee = logs.Tee(terminal, file)
    for text in ("one\ntw", "o\n", "\x1b[1mbold\x1b[0m\n", " 10%\r 20%", "\r\x1b[2Kdone\n", "never ended"):
        tee.write(text)
    assert terminal.getvalue().endswith("done\nnever ended") and tee.getvalue() == terminal.getvalue()
    assert [line.split(" ", 2)[2] for line in file.getvalue().splitlines()] == ["one", "two", "bold", "done"]


def test_a_log_that_cannot_be_written_ends_nothing():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError("No space left on device")

    terminal = io.StringIO()
    tee = logs.Tee(terminal, Full())
    assert tee.write("a\nb\n") == 4 and terminal.getvalue() == "a\nb\n"


def test_prints_loggers_and_what_ends_a_rank_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    before = sys.stdout, sys.stderr
    logger, handler = logging.getLogger("rltoken.tests.logged"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    with pytest.raises(ZeroDivisionError), logs.kept(tmp_path):
        print("printed")
        logger.warning("logged")
        raise ZeroDivisionError("why it ended")
    assert (sys.stdout, sys.stderr) == before and handler.stream is sys.stderr
    logger.removeHandler(handler)
    text = logs.path(tmp_path, 3).read_text()
    assert all(part in text for part in ("printed\n", "logged\n", "ZeroDivisionError: why it ended", "process "))
    assert capsys.readouterr() == ("printed\n", "logged\n")


def test_a_run_keeps_the_logs_of_every_start(cli):
    quick = ("name=x", "eval.before=false", "eval.after=false", "trainer.max_steps=1")
    assert cli(*quick).status == 0
    text = (cli(*quick, "resume=auto", "on_change=accept", "trainer.max_steps=2").runs / "x/logs/rank0.log").read_text()
    assert text.count("process ") == 2 and "step 1/1: reward" in text and "step 2/2: reward" in text
