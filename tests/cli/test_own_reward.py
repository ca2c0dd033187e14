"""A reward function of the user's own: one function in one file, named on the command line or in a YAML file."""

import json

import pytest

OWN = """
import asyncio


def brief(completions, completion_ids, level, log_extra, *, most=8, **_):
    log_extra("level_seen", level)
    return [None if problem > 4 else float(len(ids) <= most) for ids, problem in zip(completion_ids, level)]


async def patient(completions, **_):
    await asyncio.sleep(0)
    return [0.25] * len(completions)


def broken(completion_ids, **_):
    return [1.0 / (ids[0] % 2) for ids in completion_ids]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name: [f"+reward.funcs.{name}._target_=own_rewards.{name}", f"+reward.funcs.{name}._partial_=true"]


def logged(found):
    (folder,) = found.runs.iterdir()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_function_gets_the_columns_may_abstain_and_may_be_async(cli, own):
    found = cli(*own("brief"), *own("patient"), "+reward.funcs.brief.most=5", "reward.weights=[1,0.5,0.5]")
    assert found.status == 0, found.err
    first = logged(found)[0]
    assert first["rewards/patient/mean"] == 0.25 and 0 <= first["rewards/brief/mean"] <= 1
    assert first["outcome/correct"] == pytest.approx(first["rewards/accuracy/mean"])


def test_a_file_of_the_users_own_names_it(cli, own, tmp_path):
    (tmp_path / "mine/reward").mkdir(parents=True)
    (tmp_path / "mine/reward/mine.yaml").write_text(
        "defaults: [tiny]\nfuncs:\n  patient: {_target_: own_rewards.patient, _partial_: true}\n"
    )
    found = cli("reward=mine", "--config-dir", str(tmp_path / "mine"))
    assert found.status == 0, found.err
    assert logged(found)[0]["rewards/patient/mean"] == 0.25


def test_what_it_raises_stops_the_run_and_names_the_sample(cli, own):
    found = cli(*own("broken"))
    assert found.status == 2 and found.err.count("Traceback") == 1
    told = found.err.strip().splitlines()[-1]
    assert told.startswith(
        "error: reward.funcs.broken: raised ZeroDivisionError: float division by zero for the sample"
    )
    assert " id=" in told and "reward.on_error=crash" in told
    (folder,) = found.runs.iterdir()
    assert "ZeroDivisionError" in (folder / "traceback.txt").read_text()


def test_or_counts_as_crashed(cli, own):
    found = cli(*own("broken"), "reward.on_error=crash", "reward.weights=[1,0.1]")
    assert found.status == 0, found.err
    assert found.err.count("Traceback") == 1
    crashed = [line["broken/crashed"] for line in logged(found) if "broken/crashed" in line]
    assert crashed and all(0 < share <= 1 for share in crashed)


def test_a_reward_that_is_not_there_is_one_line(cli):
    found = cli("+reward.funcs.gone._target_=own_reward.gone")
    assert found.status == 2 and len(found.err.strip().splitlines()) == 1, found.err
    assert "reward.funcs.gone: own_reward.gone cannot be had or called" in found.err
