"""The arms of scripts/bench_grader.py do the same work; how fast is for the script itself to say."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def bench_grader(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)  # the workers import the judged function from there too
    import bench_grader

    return bench_grader


def test_all_arms_have_the_loops_verdicts(bench_grader, capsys):
    bench_grader.main(["--items", "6", "--workers", "1", "--repeats", "2"])
    heading, *arms = capsys.readouterr().out.splitlines()
    assert heading.startswith("6 items, 1 workers, 2 turns")
    assert len(arms) == 5 and all(arm.endswith(" 0 verdicts unlike the loop's") for arm in arms)


def test_right_and_wrong_pairs_are_made_up(bench_grader):
    verdicts = [bench_grader.judge(pair) for pair in bench_grader.made_up(4)]
    assert verdicts == [False, True, False, True]


def test_data_is_read_without_repeats(bench_grader, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"completion": "a", "answer": "1"}\n' * 2 + '{"completion": "b", "answer": "1"}\n')
    assert bench_grader.read(path) == [("a", "1"), ("b", "1")]
