"""What a run leaves behind, how it is named, resumed and swept, and what the entry prints."""

import io
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from rltoken import parts, runs, train
from rltoken.callbacks import MetricsFile, ProgressLine
from rltoken.config import OWN, OWNED, trainer_schema
from rltoken.evals.generate import Settings, evaluate
from rltoken.evals.generators import TransformersGenerator
from rltoken.evals.intervals import clustered, mean_interval, paired_interval
from rltoken.evals.metrics import summary
from rltoken.rollout.forced import encode_template
from rltoken.tiny import World, problems, warm_start
from rltoken.tiny.reward import accuracy
from rltoken.types import Template


def test_a_run_directory_holds_what_a_reader_needs(cli):
    found = cli("+exp=forking_tokens", "name=mine", "trainer.report_to=tensorboard")
    assert found.status == 0, found.err
    folder = found.runs / "mine"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["method"]["weights"]["forks"]["rho"] == 0.2 and config["trainer"]["loss_type"] == "dr_grpo"
    assert "-m rltoken.train" in (folder / "command.txt").read_text()
    card = (folder / "README.md").read_text()
    assert "None" not in card and str(folder / "final") in card.replace("runs/mine", str(folder))
    versions = json.loads((folder / "versions.json").read_text())
    assert {"python", "torch", "trl", "transformers", "rltoken"} <= versions.keys()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "reward" in line] == [1, 2]
    assert {"rewards/accuracy/mean", "thinking_tokens", "entropy"} <= metrics[0].keys()
    assert len(pd.read_parquet(min(folder.glob("completions/*.parquet")))) == 8
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    AutoModelForCausalLM.from_pretrained(folder / "final")
    assert (folder / "report.png").stat().st_size > 10_000
    report = json.loads((folder / "report.json").read_text())
    assert report["before"]["problems"] == 4 and report["after"]["samples"] == 4
    assert list(folder.rglob("*tfevents*")), "report_to=tensorboard wrote nothing"
    assert "accuracy" in found.out and "picture" in found.out and "step 2/2" in found.err
    assert not (found.runs.parent / "outputs").exists()


def test_resume_auto(cli):
    quick = ("name=mine", "eval.before=false", "eval.after=false")
    assert cli(*quick, "resume=auto").status == 0, "nothing to resume: it starts"
    folder = cli(*quick).runs / "mine"
    finished = cli(*quick, "resume=auto")
    assert finished.status == 0 and "is finished" in finished.out
    whole = torch.load(folder / "checkpoint-2/rltoken_0.pt", weights_only=True)
    (folder / "report.json").unlink()
    for path in (folder / "checkpoint-2").iterdir():
        path.unlink()
    (folder / "checkpoint-2").rmdir()
    assert cli(*quick, "resume=auto").status == 0
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(1) == 1, "a resumed run logs no step twice"
    again = torch.load(folder / "checkpoint-2/rltoken_0.pt", weights_only=True)
    assert torch.equal(whole["window"][0]["completion_ids"], again["window"][0]["completion_ids"])


def test_a_checkpoint_of_another_run_is_not_gone_on_from(cli):
    quick = ("eval.before=false", "eval.after=false", "resume=auto")
    runs = cli("name=mine", *quick).runs
    assert cli("name=other", *quick, "trainer.max_steps=4", "seed=1").status == 0
    shutil.copytree(runs / "other/checkpoint-4", runs / "mine/checkpoint-4")
    (runs / "mine/report.json").unlink()
    found = cli("name=mine", *quick)
    assert found.status == 0 and "skipped runs/mine/checkpoint-4: it belongs to another run" in found.out
    assert (runs / "mine/aside-checkpoint-4").exists()
    assert [json.loads(line)["step"] for line in (runs / "mine/metrics.jsonl").open()] == [1, 2]


def test_a_run_that_goes_back_is_not_finished_any_more(cli, monkeypatch):
    quick = ("name=mine", "eval.before=false", "eval.after=false")
    folder = cli(*quick).runs / "mine"
    with monkeypatch.context() as patch:
        patch.setattr("rltoken.train.finish", lambda *_: None)  # as if it was killed just before
        assert cli(*quick, "resume=runs/mine/checkpoint-1").status == 0
    assert not (folder / "report.json").exists() and (folder / "report.0.json").exists()
    assert (folder / "aside-checkpoint-2").exists() and (folder / "checkpoint-2").exists()
    again = cli(*quick, "resume=auto")
    assert again.status == 0 and "is finished" not in again.out and (folder / "report.json").exists()


def test_a_stage_with_a_state_can_be_added_and_left_out_on_demand(cli):
    quick = ("name=mine", "eval.before=false", "eval.after=false", "resume=auto")
    folder = cli(*quick).runs / "mine"
    added = cli(*quick, "+shape=hapo_history", "trainer.max_steps=3", "on_change=accept")
    assert added.status == 0, added.err
    left_out = cli(*quick, "trainer.max_steps=4", "on_change=accept")
    assert left_out.status == 0, left_out.err
    assert json.loads((folder / "report.json").read_text())["steps"] == 4 and (folder / "config.1.yaml").exists()


def test_a_second_process_in_a_run_directory_is_refused(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.5)
    with runs.alone(tmp_path / "runs/mine"):
        found = cli("name=mine", "resume=auto")
    assert found.status == 2 and "error: name: another process trains in runs/mine; wait for its end" in found.err
    assert not (tmp_path / "runs/mine").exists(), "nothing came of it"


def test_a_changed_reward_file_is_refused(cli, tmp_path, monkeypatch):
    (tmp_path / "mine_rewards.py").write_text("def zero(completions, **_):\n    return [0.0] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    quick = ("name=mine", "eval.before=false", "eval.after=false", "resume=auto")
    quick += ("+reward.funcs.zero={_target_: mine_rewards.zero, _partial_: true}",)
    folder = cli(*quick).runs / "mine"
    (folder / "report.json").unlink()
    (tmp_path / "mine_rewards.py").write_text("def zero(completions, **_):\n    return [1.0] * len(completions)\n")
    found = cli(*quick)
    assert found.status == 2 and "does not fit: mine_rewards.py is not as it was" in found.err
    assert cli(*quick, "on_change=accept").status == 0


def test_other_problems_to_evaluate_are_refused(cli, monkeypatch):
    """Before and after would not be of the same ones."""
    quick = ("name=mine", "eval.before=false", "eval.after=false", "resume=auto")
    folder = cli(*quick).runs / "mine"
    (folder / "report.json").unlink()
    loaded = parts.problems

    def fewer(section, role, tokenizer):
        return loaded(section, role, tokenizer).select(range(2 if role == "eval" else 32))

    monkeypatch.setattr(parts, "problems", fewer)
    found = cli(*quick)
    assert (
        found.status == 2 and "does not fit: the problems evaluated before and after are others than then" in found.err
    )


def test_a_resumed_run_keeps_its_evaluation_before_training(cli, monkeypatch):
    folder = cli("name=mine", "resume=auto").runs / "mine"
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").unlink()
    from rltoken.evals import generate

    phases, evaluate = [], generate.evaluate
    monkeypatch.setattr(
        generate, "evaluate", lambda *args, label: [phases.append(label), evaluate(*args, label=label)][1]
    )
    assert cli("name=mine", "resume=auto").status == 0
    assert phases == ["evaluation after training"]
    assert json.loads((folder / "report.json").read_text()) == report


def test_multirun_gives_every_job_its_own_directory(cli):
    found = cli("+exp=grpo", "seed=1,2", "eval.before=false", "eval.after=false", "--multirun")
    assert found.status == 0, found.err
    names = sorted(path.name for path in found.runs.iterdir() if path.is_dir())
    assert not (found.runs.parent / "multirun.yaml").exists()
    assert len(names) == 2 and names[0].startswith("grpo-tiny-s1") and names[1].startswith("grpo-tiny-s2")


def test_a_sweep_and_its_jobs_alone_have_the_same_names(cli, monkeypatch):
    names = []
    monkeypatch.setattr(train, "run", lambda cfg, folder: names.append(folder.name))
    chosen = ("model.seed=${seed}", "seed=3")
    for how in ((), ("--multirun",)):
        assert cli(*chosen, *how).status == 0
    assert names[0] == names[1] and "model.seed" not in names[0]


def test_default_names():
    choices = {"exp": "brpo", "scale": "tiny"}
    assert runs.default_name(choices, 3, ["+exp=brpo", "seed=3"]) == "brpo-tiny-s3"
    assert runs.default_name(choices, 0, ["+weight=[forks,thr]", "resume=auto"]) == "brpo-tiny-s0-+weight=_forks,thr_"
    assert runs.default_name(choices, 3, ["model.seed=${seed}"]) == "brpo-tiny-s3", "the seed says it already"
    assert runs.default_name(choices, 3, [r"model.seed=\${seed}"]) == "brpo-tiny-s3", "as a sweep hands it on"
    long = [runs.default_name(choices, 0, [f"data.path={'x' * 200}{i}"]) for i in (1, 2)]
    assert long[0] != long[1] and all(len(name) < 100 for name in long)
    assert "/" not in runs.default_name({"exp": "paper/brpo", "scale": "paper"}, 0, [])
    assert runs.default_name({"scale": "tiny"}, 0, ["+exp=[thr,brpo]"]) == "thr+brpo-tiny-s0"
    assert runs.default_name({"scale": "tiny"}, 0, ["+weight=forks"]) == "run-tiny-s0-+weight=forks"


def test_help_and_printed_configuration(cli):
    shown = cli("--help")
    assert shown.status == 0
    for word in ("+exp=grpo", "scale", "weight", "--multirun", "forking_tokens", "resume=auto"):
        assert word in shown.out
    choices = shown.out.partition("Choices of every group:")[2]
    assert "data: deepscaler" in choices and " _base" not in choices and "schema" not in choices
    printed = cli("+exp=grpo", "--cfg", "job", "--resolve")
    config = yaml.safe_load(printed.out)
    assert printed.status == 0 and config["data"]["train"]["world"]["noise"] == config["world"]["noise"]
    assert not printed.runs.exists()


def test_help_needs_no_torch():
    found = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert "scale: paper, small, tiny" in found.stdout


HELP = """
import sys
from rltoken import cli
print(cli.help_text("config"))
assert "torch" not in sys.modules
"""


def test_a_scale_never_beats_the_command_line(cli):
    config = yaml.safe_load(
        cli("+exp=grpo", "scale=paper", "model=smollm2", "data=gsm8k", "trainer.beta=0.5", "--cfg", "job").out
    )
    assert config["model"]["source"]["_target_"] == "rltoken.models.smollm2"
    assert config["trainer"]["beta"] == 0.5 and config["trainer"]["learning_rate"] == 1e-6


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
@pytest.mark.parametrize("hardware", [None, "auto", "cpu", "gpu"])
def test_every_scale_composes(cli, scale, hardware):
    chosen = [] if hardware is None else [f"hardware={hardware}"]
    found = cli("+exp=grpo", f"scale={scale}", *chosen, "model=tiny", "data=tiny", "--cfg", "job", "--resolve")
    config = yaml.safe_load(found.out)
    assert found.status == 0 and config["trainer"]["use_cpu"] is (
        hardware == "cpu" or (not hardware and scale != "paper")
    )
    assert (config["model"]["lora"] is not None) is (scale == "small")


def test_every_field_of_grpo_config_can_be_set():
    import dataclasses

    names = {field.name for field in dataclasses.fields(trainer_schema())}
    theirs = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert names == theirs - OWNED.keys() | OWN.keys()
    OmegaConf.structured(trainer_schema())


def test_evaluation_is_reproducible_and_leaves_random_states_alone(cache, monkeypatch):
    monkeypatch.setenv("RLTOKEN_CACHE", str(cache))
    folder = warm_start(world=World(), steps=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.train()
    template = encode_template(tokenizer, think_end="</think>")
    settings = Settings(
        samples=2, temperature=1.0, max_new_tokens=12, batch_size=5, seed=1, budgets=(2, 6), max_answer_tokens=3
    )
    torch.manual_seed(0)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    dataset = problems(4, split="eval")
    generator = TransformersGenerator(model, tokenizer, temperature=1.0, batch_size=settings.batch_size)
    one, two, other = (
        evaluate(generator, tokenizer, dataset, accuracy, template, replace(settings, seed=seed)) for seed in (1, 1, 2)
    )
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2]) and model.training
    pd.testing.assert_frame_equal(one, two)
    assert one["text"].tolist() != other["text"].tolist()
    assert len(one) == 8 and one["completion_tokens"].max() <= 12


def test_greedy_evaluation_does_not_depend_on_batches_or_the_tokenizers_padding_side(cache, monkeypatch):
    monkeypatch.setenv("RLTOKEN_CACHE", str(cache))
    folder = warm_start(world=World(), steps=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    dataset = problems(6, split="eval")
    assert len({len(example["prompt"][0]["content"]) for example in dataset}) > 1, "prompts of one length prove nothing"
    texts = []
    for side, batch_size in (("left", 1), ("right", 6)):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
        settings = Settings(samples=1, temperature=0.0, max_new_tokens=16, batch_size=batch_size, seed=0)
        generator = TransformersGenerator(model, tokenizer, temperature=0.0, batch_size=batch_size)
        table = evaluate(generator, tokenizer, dataset, accuracy, Template(None, ()), settings)
        texts.append(table["text"].tolist())
    assert texts[0] == texts[1]


def test_intervals():
    # mean 2, s = 1, t(0.975, 2) = 4.302653: half width 4.302653 / sqrt(3) = 2.484138
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3) and found.half_width == pytest.approx(2.484138, abs=1e-6)
    assert mean_interval([1.0]).half_width == float("inf")
    assert paired_interval([1.0, 2.0, 4.0], [0.0, 1.0, 3.0]).half_width == 0.0
    with pytest.raises(ValueError, match="zip"):
        paired_interval([1.0], [1.0, 2.0])


def test_intervals_are_clustered_by_problem():
    table = pd.DataFrame({"id": ["a", "a", "b", "b"], "correct": [1.0, 1.0, 0.0, 0.0]})
    # two problems with means 1 and 0: s = 0.707107, t(0.975, 1) = 12.706205
    assert clustered(table, "correct").half_width == pytest.approx(12.706205 * 0.707107 / 2**0.5, rel=1e-5)
    table = table.assign(thinking_tokens=[1, 2, 3, 4], completion_tokens=5, truncated=[True, False, False, False])
    table = table.assign(outcome=["correct", "correct", "timed_out", "wrong"]).assign(
        **{"correct@4": 0.0, "outcome@4": ["wrong", "malformed", "wrong", "wrong"]}
    )
    numbers = summary(table)
    assert numbers["accuracy"] == 0.5 and numbers["thinking_tokens"] == 2.5 and numbers["truncated"] == 0.25
    assert (numbers["problems"], numbers["samples"]) == (2, 4)
    assert numbers["outcomes"] == {"correct": 2, "timed_out": 1, "wrong": 1}
    assert numbers["forced_outcomes"] == {"wrong": 3, "malformed": 1}


def test_one_problem_has_no_interval_and_reports_stay_json(cli):
    found = cli("name=3", "eval.limit=1", "eval.before=false")
    assert found.status == 0, found.err
    report = json.loads((found.runs / "3/report.json").read_text(), parse_constant=pytest.fail)
    assert report["after"]["problems"] == 1 and report["after"]["accuracy_half_width"] is None
    again = cli("name=3", "eval.limit=1", "eval.before=false", "resume=auto")
    assert again.status == 0 and "is finished" in again.out


def test_metrics_are_json_and_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.6}\n{"step": 3, "rew')
    callback = MetricsFile(path)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    callback.on_train_begin(None, state, None)
    assert path.read_text() == '{"step": 1, "reward": 0.5}\n'
    state.global_step = 2
    callback.on_log(None, state, None, logs={"reward": float("nan"), "loss": 0.1})
    last = json.loads(path.read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert (last["step"], last["reward"], last["loss"]) == (2, None, 0.1)


def test_the_terminal_is_given_back_when_training_fails():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=3)
    with pytest.raises(RuntimeError, match="broken"), ProgressLine(console) as progress:
        progress.on_train_begin(None, state, None)
        raise RuntimeError("broken")
    assert stream.getvalue().endswith("\x1b[?25h"), "the cursor stays hidden"


def test_ctrl_c_says_how_to_go_on(cli, monkeypatch):
    monkeypatch.setattr(train, "checked", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    found = cli("+exp=grpo")
    assert found.status == 130 and "resume=auto" in found.err and "Traceback" not in found.err
