"""`scripts/token_kinds.py`: what a token is by where it stands, and shares of made-up windows."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
STEPS = "plan A B S 5 F1 A +3 1 F2 quick B *2 2 so 2 </think> ans 2 <eos>"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import token_kinds

    return token_kinds


def test_digits_are_known_by_what_stands_before_them(script):
    assert script.kinds_of(STEPS.split()) == [
        "plan", "letter", "letter", "frame", "start value", "style", "letter", "operation", "result", "style", "quick",
        "letter", "operation", "result", "frame", "conclusion", "frame", "other", "answer", "frame",
    ]  # fmt: skip
    assert script.kinds_of(["<CODE>", "5", "-4", "1", "#", "4"])[2:] == ["operation", "result", "operation", "result"]
    assert script.kinds_of(["F1", "F2", "A"], apart=["style"]) == ["style F1", "style F2", "letter"]


def cells(table):
    columns = zip(*(column.cells for column in table.columns), strict=True)
    return {(first, second): rest for first, second, *rest in columns}


def test_shares_of_tokens_and_of_those_that_are_kept(script):
    """Two responses of three tokens: a style and a result kept at 1.1 and 0.9, a frame and a second style left out."""
    rows = [
        (["F1", "+3", "1"], [1.1, 1.0, 0.9], True, 1),
        (["F1", "S", "5"], [0.0, 0.0, 1.0], False, 2),
    ]
    found = cells(script.by_kind(rows, []))
    # share, of those kept, 0, below 1, 1, above 1, mean
    assert found["all", "style"] == ["0.333", "0.250", "0.500", "0.000", "0.000", "0.500", "0.550"]
    assert found["all", "result"] == ["0.167", "0.250", "0.000", "1.000", "0.000", "0.000", "0.900"]
    assert found["wrong", "start value"] == ["0.333", "1.000", "0.000", "0.000", "1.000", "0.000", "1.000"]
    assert found["all", "all of them"] == ["1.000", "1.000", "0.333", "0.167", "0.333", "0.167", "0.667"]
    assert ("correct", "frame") not in found
    assert cells(script.by_kind(rows[:1], []))["correct", "style"][0] == "0.333", "none is wrong"


def test_responses_by_opening_word_and_operations(script):
    rows = [(["<CODE>", "5"], [1, 1], True, 1), (["<CODE>", "5", "6"], [1, 1, 1], False, 2), (["5"], [1], True, 1)]
    found = cells(script.by_opening(rows))
    assert found["<CODE>", "all"] == ["2", "1 (0.500)", "2.5"] and found["none", "1"] == ["1", "1 (1.000)", "1.0"]


def test_it_samples_a_window_and_runs_the_weights_on_it():
    command = [sys.executable, SCRIPTS / "token_kinds.py", "+exp=forking_tokens", "model.source.steps=2"]
    sizes = ["trainer.per_device_train_batch_size=8", "trainer.num_generations=4", "trainer.max_completion_length=20"]
    found = subprocess.run([*command, *sizes, "--windows", "2"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("16 responses, ")
    (line,) = (line for line in found.stdout.splitlines() if line.startswith("| all ") and "all of them" in line)
    share, kept, zero, *_ = (float(cell) for cell in line.strip("| ").split("|")[2:])
    # of each window the top fifth, and what has the entropy of its last one
    assert (share, kept) == (1.0, 1.0) and 0.7 < zero < 0.82
