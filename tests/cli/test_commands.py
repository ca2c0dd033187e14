"""`python -m rltoken`: the list of commands, and what follows it by mistake."""

import sys
from pathlib import Path

import pytest

from rltoken import __main__ as commands


def listed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["rltoken", *arguments])
    commands.main()
    return capsys.readouterr().out.splitlines()


def test_every_module_that_can_be_run_is_listed_with_how(monkeypatch, capsys):
    lines = listed(monkeypatch, capsys, "--help")
    modules = Path(commands.__file__).parent.rglob("*.py")
    runnable = {file.stem for file in modules if 'if __name__ == "__main__"' in file.read_text(encoding="utf-8")}
    assert set(commands.COMMANDS) == runnable - {"__main__"}
    assert len(lines) == len(commands.COMMANDS)
    for name, line in zip(commands.COMMANDS, lines, strict=True):
        assert f"`python -m rltoken.{name} " in line


@pytest.mark.parametrize(("given", "command"), [("evaluate", "evaluate"), ("+exp=brpo", "train")])
def test_a_command_after_it_is_told_how_to_be_written(monkeypatch, capsys, given, command):
    with pytest.raises(SystemExit) as left:
        listed(monkeypatch, capsys, given, "seed=1")
    assert left.value.code == 2
    assert f"error: {given}: write python -m rltoken.{command};" in capsys.readouterr().err
