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


def closed(completions):
    return [0.0] * len(completions)


def wants(completions, levle, **_):
    return [0.0] * len(completions)


def leaves(completions, **_):
    raise SystemExit(0)


SEVEN = 7


class Near:
    # 1 at `target` tokens, less the further away, 0 from twice as many on

    def __init__(self, target):
        self.target = target

    def __call__(self, completion_ids, **columns):
        return [max(0.0, 1 - abs(len(ids) - self.target) / self.target) for ids in completion_ids]
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


def test_an_object_of_a_class_is_named_without_partial(cli, own):
    near = "+reward.funcs.near={_target_: own_rewards.Near, target: 12}"
    found = cli(near, "reward.weights=[1,0.2]")
    assert found.status == 0, found.err
    assert 0 < logged(found)[0]["rewards/near/mean"] <= 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("closed", "its signature (completions) has no place for the columns"),
        ("wants", "nothing fills its parameter 'levle' (did you mean 'level'?)"),
        ("leaves", "raised SystemExit: 0 for the sample id="),
    ],
)
def test_what_is_wrong_with_it_is_told_in_one_line(cli, own, name, message):
    found = cli(*own(name))
    told = found.err.strip().splitlines()
    assert found.status == 2 and told[-1].startswith(f"error: reward.funcs.{name}: {message}")
    assert len(told) == 1 or name == "leaves", "a signature has no traceback"
    assert name != "closed" or not found.runs.exists() or not list(found.runs.iterdir()), "nothing has begun"


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


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (
            "own_reward.gone",
            "own_reward.gone cannot be had or called: ModuleNotFoundError: No module named 'own_reward'",
        ),
        ("own_rewards.breif", "'own_rewards' is not a package (did you mean 'brief'?). Correct _target_"),
        ("bad_syntax.f", "SyntaxError: expected ':' (bad_syntax.py, line 1). Correct _target_"),
        ("bad_import.f", "ModuleNotFoundError: No module named 'no_such_module'. Correct _target_"),
        ("own_rewards.SEVEN", "'7' of type 'int' cannot be called; name a function or a class"),
    ],
)
def test_a_reward_that_is_not_there_is_one_line(cli, own, tmp_path, target, told):
    (tmp_path / "bad_syntax.py").write_text("def f(completions, **c)\n")
    (tmp_path / "bad_import.py").write_text("import no_such_module\n")
    found = cli(f"+reward.funcs.gone={{_target_: {target}, _partial_: true}}")
    assert found.status == 2 and len(found.err.strip().splitlines()) == 1, found.err
    assert "error: reward.funcs.gone: " in found.err and told in found.err
