"""`python -m rltoken.evaluate`: runs and models under budgets, what it writes, and what it refuses."""

import importlib.util
import json
import re
import shutil

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from rltoken import runs

SHORT = ("eval.limit=3", "eval.samples=2", "eval.max_new_tokens=24", "eval.budgets=[4,8,24]")


KEPT = {}


@pytest.fixture
def two_runs(cli, tmp_path_factory):
    """Two finished runs of two steps, trained once for all tests."""
    if not KEPT:
        for exp in ("brpo", "grpo"):
            found = cli(f"+exp={exp}", f"name={exp}")
            assert found.status == 0, found.err
        KEPT["runs"] = tmp_path_factory.mktemp("evaluate") / "runs"
        shutil.copytree(found.runs, KEPT["runs"])
    return KEPT["runs"]


def test_runs_are_compared_on_their_own_data(cli, two_runs):
    folders = f"runs=[{two_runs}/brpo,{two_runs}/grpo]"
    found = cli.evaluate(folders, *SHORT, "out=both")
    assert found.status == 0, found.err
    results = json.loads((found.cwd / "both/metrics.json").read_text())
    assert results["models"].keys() == {"brpo", "grpo"} and (found.cwd / "both/curves.png").stat().st_size > 5000
    numbers = results["models"]["brpo"]
    assert numbers["budgets"] == [4, 8, 24] and (numbers["problems"], numbers["samples"]) == (3, 6)
    assert numbers["anytime_accuracy"] == pytest.approx(sum(numbers["budget_accuracy"]) / 3)
    assert numbers["final_accuracy"] == numbers["budget_accuracy"][-1]
    table = pd.read_parquet(found.cwd / "both/brpo.parquet")
    assert len(table) == 6 and {"correct@4", "correct@8", "correct@24"} <= set(table.columns)
    assert "4 problems" not in found.out and "brpo" in found.out and "grpo" in found.out
    again = cli.evaluate(folders, *SHORT, "out=both")
    assert again.status == 0 and "finished already: both/metrics.json" in again.out
    other = cli.evaluate(folders, *SHORT, "eval.seed=5", "out=both")
    assert (
        other.status == 2 and "both holds an evaluation already, and another: eval.seed was 1234 and is 5" in other.err
    )
    fewer = cli.evaluate(f"runs=[{two_runs}/brpo]", *SHORT, "out=both")
    assert fewer.status == 2 and "out: both holds an evaluation already, of brpo, grpo" in fewer.err


def test_the_evaluation_of_a_run_is_repeated_exactly(cli, two_runs):
    report = json.loads((two_runs / "brpo/report.json").read_text())
    found = cli.evaluate(f"runs=[{two_runs}/brpo]", "out=again")
    assert found.status == 0, found.err
    results = json.loads((found.cwd / "again/metrics.json").read_text())
    assert results["models"]["brpo"] == report["after"]


def test_a_second_process_in_the_folder_of_results_is_refused(cli, two_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.1)
    with runs.alone(tmp_path / "mine"):
        found = cli.evaluate(f"runs=[{two_runs}/brpo]", *SHORT, "out=mine")
    assert found.status == 2 and "error: out: another process evaluates in mine; wait for its end, or" in found.err
    with runs.alone(tmp_path / "traces.jsonl.shards"):
        found = cli.star(f"runs=[{two_runs}/brpo]", "out=traces.jsonl")
    assert found.status == 2 and "error: out: another process evaluates in traces.jsonl.shards; wait" in found.err


ASKED = "eval.self_reward.reference=-4"


def test_models_judge_their_own_completions_where_asked(cli, two_runs, tmp_path):
    """A run and a plain model; the run's temperature is that of its training."""
    shutil.copytree(two_runs / "grpo/final", tmp_path / "plain")
    run = f"runs=[{two_runs}/grpo]"
    found = cli.evaluate(run, "models=[plain]", "data.eval.n=4", *SHORT[1:3], ASKED, "eval.budgets=null", "out=own")
    assert found.status == 0, found.err
    models = json.loads((found.cwd / "own/metrics.json").read_text())["models"]
    for name, numbers in models.items():
        table = pd.read_parquet(found.cwd / f"own/{name}.parquet")
        ended = ~table["truncated"]
        assert (table["self_reward"].notna() == ended).all() and ended.any()
        assert table["self_reward"][ended].tolist() == pytest.approx((0.1 * (table["appended_logp"] + 4))[ended])
        assert numbers["appended_logp"] == pytest.approx(table["appended_logp"].mean())
        assert "weighted_majority" in numbers and "self_reward_auroc_interval" in numbers
    assert "self-reward, accuracy" in found.out and "weighted majority" in found.out
    assert "self_reward_accuracy" in (found.cwd / "own/summary.csv").read_text()
    without = cli.evaluate(run, *SHORT, "out=plain_one")
    assert without.status == 0 and "self-reward" not in without.out


def test_training_evaluates_self_rewards_as_evaluate_does(cli):
    trained = cli("+exp=laser_self_reward", "name=own", ASKED, "eval.samples=2", "trainer.temperature=0.9")
    assert trained.status == 0, trained.err
    found = cli.evaluate(f"runs=[{trained.runs}/own]", "out=again")
    assert found.status == 0, found.err
    report = json.loads((trained.runs / "own/report.json").read_text())
    results = json.loads((found.cwd / "again/metrics.json").read_text())
    assert results["settings"]["own"]["eval"]["self_reward"] == {"reference": -4, "scale": 0.1, "temperature": 0.9}
    assert results["models"]["own"] == report["after"] and "majority_at_k" in report["after"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ASKED, "model.appended=null"), "model.appended: a self-reward is the probability of a token"),
        ((ASKED, "model.appended='<eos>'"), "model.appended: '<eos>' is what ends or pads"),
        ((ASKED, "eval.self_reward.scale=0"), "eval.self_reward.scale: 0.0 is not possible; set it to a number above"),
        (("eval.self_reward.reference=low",), "eval.self_reward.reference: Value 'low'"),
        ((ASKED, "eval.self_reward.temperature=-1"), "eval.self_reward.temperature: -1.0 is not possible"),
        (("eval.self_reward.refrence=1",), "did you mean 'eval.self_reward.reference'"),
        (("+eval.self_reward.clamp=true",), "eval.self_reward.clamp: there is no such key"),
        (("eval.self_reward=null",), "eval.self_reward: "),
        (
            (ASKED, "models=[x]", "server=http://localhost:1/v1", "eval.budgets=null"),
            "eval.self_reward.reference: chat completions give no log-probability",
        ),
        (
            (ASKED, "rollout=vllm_colocate", "eval.self_reward.temperature=0.7"),
            "eval.self_reward.temperature: vLLM gives log-probabilities of a prompt at temperature 1, and not at 0.7",
        ),
    ],
)
def test_self_rewards_that_cannot_be_had_are_refused_in_one_line(cli, arguments, message):
    found = cli.evaluate("model.source.steps=2", "data.eval.n=2", *arguments)
    *bars, told = found.err.splitlines()  # of the warm start, in whichever test comes first
    assert found.status == 2 and told.startswith("error: ") and message in told, found.err
    assert "Traceback" not in found.err and not any("error: " in bar for bar in bars), found.err
    assert not (found.cwd / "evaluations").exists()


def test_models_and_the_configured_one(cli, two_runs, tmp_path):
    shutil.copytree(two_runs / "grpo/final", tmp_path / "copy")
    found = cli.evaluate("models=[copy]", *SHORT, "data.eval.n=4")
    assert found.status == 0, found.err
    assert (found.cwd / "evaluations/copy/copy.parquet").exists()
    found = cli.evaluate(*SHORT, "model.source.steps=2", "data.eval.n=4")
    assert found.status == 0 and (found.cwd / "evaluations/tiny/metrics.json").exists(), found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runs=[nowhere]",), "runs: nowhere is no run directory"),
        (("runs=[{runs}/brpo,{runs}/brpo]",), "runs: there are two of the name brpo"),
        (("runs=[{runs}/brpo]", "eval.budgets=[8,4]"), "eval.budgets: "),
        (("runs=[{runs}/brpo]", "eval.budget=[8]"), "did you mean 'eval.budgets'"),
        (("runs=[{runs}/brpo]", "eval.budgets=[8,500]"), "eval.budgets: a budget of 500 tokens is more"),
        (("runs=[{runs}/brpo]", "eval.budgets=16"), "eval.budgets: 16 is no list of budgets"),
        (("runs=[{runs}/brpo]", "eval.max_answer_tokens=0"), "eval.max_answer_tokens: 0 is not possible"),
        (("runs=[{runs}/brpo]", "eval.temperature=nan"), "eval.temperature: nan is not possible; set it to a number"),
        (("runs=[{runs}/brpo]", "eval.count=9999"), "eval.count: the evaluation has 9999 problems, and"),
        (("runs=[{runs}/brpo]", "out={runs}/brpo/config.yaml/x"), "config.yaml/x cannot be made (Not a directory)"),
        (("runs={runs}/brpo",), "is no list; write 'runs=[FOLDER,...]'"),
        (("models=null",), "models: None is no list"),
        (("models=[{runs}/brpo]",), "brpo is a run directory; set 'runs=[{runs}/brpo]'"),
        (("models=[./nowhere]",), "models: there is no folder ./nowhere"),
        (("runs=[{runs}/brpo/checkpoint-7]",), "brpo has no checkpoint-7; go on with resume=auto"),
        (("+exp=brpo",), "method: only training has one; leave out +exp"),
        (("model.forced.header=null",), "model.forced.header: None is no text"),
        (("model.forced.stops=abc",), "model.forced.stops: 'abc' is no list of texts"),
        (("run=[{runs}/brpo]",), "run: there is no such key"),
        (("--runs=[{runs}/brpo]",), "overrides are written without dashes"),
    ],
)
def test_mistakes_end_in_one_line(cli, two_runs, arguments, message):
    found = cli.evaluate(*(argument.format(runs=two_runs) for argument in arguments))
    assert found.status == 2 and message.format(runs=two_runs) in found.err and "Traceback" not in found.err, found.err
    assert len(found.err.strip().splitlines()) == 1
    assert not (found.cwd / "evaluations").exists()


def test_an_unfinished_run_and_runs_on_different_data_are_refused(cli, two_runs):
    other = cli("+exp=grpo", "name=other", "data.eval.n=3")
    assert other.status == 0
    found = cli.evaluate(f"runs=[{two_runs}/brpo,{other.runs}/other]")
    assert found.status == 2 and "brpo and other are evaluated on different problems (4 and 3)" in found.err
    shutil.rmtree(other.runs / "other/final")
    found = cli.evaluate(f"runs=[{other.runs}/other]")
    assert found.status == 2 and "is not finished" in found.err


def test_a_checkpoint_is_evaluated_under_the_name_of_its_run(cli, two_runs):
    budgets = "eval.budgets=[4,8]"  # in tokens: what fractions would be shares of does not matter
    found = cli.evaluate(f"runs=[{two_runs}/grpo,{two_runs}/grpo/checkpoint-2]", *SHORT, budgets, "out=both")
    assert found.status == 0, found.err
    models = json.loads((found.cwd / "both/metrics.json").read_text())["models"]
    assert models.keys() == {"grpo", "grpo-checkpoint-2"}
    assert models["grpo"] == models["grpo-checkpoint-2"]


def test_the_longest_thinking_matters_only_to_fractions(cli, two_runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(two_runs / "grpo", other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"max_thinking_tokens: \d+", "max_thinking_tokens: 3", text))
    assert "max_thinking_tokens: 3\n" in (other / "config.yaml").read_text()
    both = f"runs=[{two_runs}/grpo,{other}]"
    found = cli.evaluate(both, "eval.limit=1", "eval.samples=1", "eval.budgets=[4]", "out=tokens")
    assert found.status == 0, found.err
    found = cli.evaluate(both, "eval.limit=1", "eval.samples=1", "eval.budgets=[0.5]", "out=shares")
    assert found.status == 2 and "rollout.max_thinking_tokens: grpo has" in found.err


@pytest.fixture
def sampled_by_vllm(two_runs, tmp_path):
    """A run whose settings say that it was sampled by vLLM and thought for at most 12 tokens."""
    folder = tmp_path / "vllm"
    shutil.copytree(two_runs / "grpo", folder)
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.trainer.use_vllm, cfg.rollout.max_thinking_tokens = True, 12
    OmegaConf.save(cfg, folder / "config.yaml")
    return folder


def test_a_run_brings_what_it_was_sampled_by(cli, sampled_by_vllm, monkeypatch):
    stock = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "vllm" else stock(name, *_))
    for asked in ((), ("trainer.vllm_max_model_length=64",), ("data.eval.n=3",)):
        found = cli.evaluate(f"runs=[{sampled_by_vllm}]", *asked)
        assert found.status == 2 and not (found.cwd / "evaluations").exists()
        assert re.match(r"error: rollout: vllm samples by vllm_colocate\. .*vLLM is not installed", found.err)
        assert "rollout=hf" in found.err and found.err.count("\n") == 1
    found = cli.evaluate("rollout=vllm_colocate", *SHORT)
    assert found.status == 2 and "error: rollout: tiny samples by vllm_colocate" in found.err


@pytest.mark.parametrize("chosen", ["rollout=hf", "trainer.use_vllm=false"])
def test_the_command_line_says_what_samples(cli, sampled_by_vllm, chosen):
    found = cli.evaluate(f"runs=[{sampled_by_vllm}]", chosen, *SHORT[:3], "eval.budgets=[0.5,1.0]", "out=results")
    assert found.status == 0, found.err
    results = json.loads((found.cwd / "results/metrics.json").read_text())
    assert results["settings"]["vllm"]["sampled_by"] == "hf"
    assert results["models"]["vllm"]["budgets"] == [6, 12], "the run's own longest thinking, whatever samples"


def test_weights_in_few_bits_are_not_for_vllm(cli, sampled_by_vllm, monkeypatch):
    monkeypatch.setattr("rltoken.config.check_vllm", lambda *_: None)
    monkeypatch.setattr("rltoken.adapters.check_quantization", lambda *_: None)
    found = cli.evaluate(f"runs=[{sampled_by_vllm}]", "+model.quantization={load_in_4bit: true}")
    assert found.status == 2 and "error: model.quantization: vLLM would serve vllm with its weights as" in found.err


def test_evaluation_never_touches_training(cli):
    with_one = cli("+exp=brpo", "name=with")
    without = cli("+exp=brpo", "name=without", "eval.before=false", "eval.after=false", "eval.budgets=null")
    assert with_one.status == without.status == 0, with_one.err + without.err
    one, other = (load_file(with_one.runs / name / "final/model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_longer_than_the_default_scale_is_evaluated(cli):
    run = cli("+exp=grpo", "name=long", "trainer.max_completion_length=150", "rollout.max_thinking_tokens=140")
    found = cli.evaluate(f"runs=[{run.runs}/long]", "eval.limit=2", "eval.samples=1")
    assert run.status == found.status == 0, run.err + found.err


def test_a_template_that_forces_nothing_or_ends_thinking_twice_is_refused(cli):
    for settings, message in (
        (("model.think_end=null",), "model.forced.header: nothing would make the model answer"),
        (('model.forced.header="</think>"',), "model.forced.header: '</think>' ends the thinking a second time"),
    ):
        found = cli.evaluate("model.source.steps=2", "data.eval.n=2", *settings)
        assert found.status == 2 and message in found.err, found.err
