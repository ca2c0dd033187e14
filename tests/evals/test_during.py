"""Evaluation during training: training never notices, a resumed run has the same record, and what is refused."""

import contextlib
import io
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from rich.console import Console
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState
from transformers.integrations.integration_utils import rewrite_logs

from rltoken.callbacks import ProgressLine
from rltoken.errors import UserError
from rltoken.evals import during
from rltoken.evals.metrics import summary
from rltoken.evaluate import WHEN
from rltoken.types import Template
from tests.cli.conftest import cache, cli  # noqa: F401  (fixtures)
from tests.resume.phases import PHASES, at_call, logged

EVERY_STEP = ("trainer.eval_strategy=steps", "trainer.eval_steps=1")
BEST = ("trainer.load_best_model_at_end=true",)
ONLY_BETWEEN = ("eval.before=false", "eval.after=false")
MIDDLE_OF_A_WINDOW = (
    "trainer.steps_per_generation=2", "trainer.gradient_accumulation_steps=1", "trainer.max_steps=4",
    "trainer.logging_steps=2", "trainer.save_steps=4",
)  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """Thirty easy problems under the name of aime24."""
    folder = tmp_path / "files"
    folder.mkdir()
    rows = [{"problem": f"{number} + 1?", "answer": str(number + 1)} for number in range(30)]
    (folder / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def weights(run):
    return AutoModelForCausalLM.from_pretrained(run / "final").state_dict()


def states(run, step):
    """The random states in a checkpoint, as something that compares."""
    found = torch.load(run / f"checkpoint-{step}/rng_state.pth", weights_only=False)
    return repr({name: getattr(state, "tolist", lambda state=state: state)() for name, state in found.items()})


@pytest.mark.parametrize(
    ("settings", "steps"),
    [(("+exp=forced_answer",), 2), (("+exp=grpo", *MIDDLE_OF_A_WINDOW), 4)],
    ids=["rows stages", "in the middle of windows"],
)
def test_training_never_notices(cli, files, settings, steps):  # noqa: F811
    plain = cli(*settings, *ONLY_BETWEEN, "name=plain")
    assert plain.status == 0, plain.err
    asked = (
        *EVERY_STEP, "eval.during.benchmarks=[own,aime24]", f"eval.during.files={files}", "eval.during.samples=2",
        "eval.during.limit=3", "eval.during.budgets=[4,16]",
    )  # fmt: skip
    found = cli(*settings, *ONLY_BETWEEN, *asked, "name=between")
    assert found.status == 0, found.err
    expected, run = plain.runs / "plain", found.runs / "between"
    assert all(torch.equal(value, weights(expected)[name]) for name, value in weights(run).items())
    assert states(run, steps) == states(expected, steps)
    lines = logged(run)
    assert [line for line in lines if "reward" in line] == logged(expected)
    evaluated = [line for line in lines if "eval/own/accuracy" in line]
    assert [line["step"] for line in evaluated] == list(range(1, steps + 1))
    for step, line in enumerate(evaluated, 1):
        for name, problems in (("own", 3), ("aime24", 3)):
            table = pd.read_parquet(run / f"evaluations/{name}/step-{step:06d}.parquet")
            assert (table["id"].nunique(), len(table)) == (problems, 2 * problems)
            kept = json.loads((run / f"evaluations/{name}/step-{step:06d}.json").read_text())
            assert kept == json.loads(json.dumps(summary(table)))
            assert line[f"eval/{name}/accuracy"] == kept["accuracy"]
            assert line[f"eval/{name}/correct@16"] == kept["budget_accuracy"][1]
            assert {f"eval/{name}/{key}" for key in ("pass@2", "maj@2", "anytime_accuracy", "e3")} <= line.keys()
    assert f"step {steps}/{steps}, aime24: accuracy 0" in found.err
    state = json.loads((run / f"checkpoint-{steps}/trainer_state.json").read_text())
    sent = next(line for line in state["log_history"] if "eval_aime24/accuracy" in line)
    assert "eval/aime24/accuracy" in rewrite_logs(sent), "what trackers show"


def record(run):
    """The log, and the bytes of what evaluations during training have left."""
    kept = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("evaluations/*/*"))}
    return logged(run), kept


@pytest.mark.parametrize(
    ("phase", "count"),
    [(PHASES["generation"], 4), ("rltoken.evals.during.shards.written", 6)],
    ids=["after an evaluation", "between the files of one"],
)
def test_a_killed_run_has_the_same_record(cli, monkeypatch, phase, count):  # noqa: F811
    settings = (*EVERY_STEP, *ONLY_BETWEEN, "trainer.max_steps=4", "trainer.save_steps=2", "trainer.eval_on_start=true")
    whole = cli(*settings, "name=x", "runs_dir=whole")
    assert whole.status == 0, whole.err
    expected = whole.cwd / "whole/x"

    def die():
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        at_call(patch, phase, count, die)
        assert cli(*settings, "name=x").status == 1
    run = whole.runs / "x"
    assert not (run / "final").exists()
    (run / "evaluations/own/step-000009.json").write_text("{}")
    resumed = cli(*settings, "name=x", "resume=auto")
    assert resumed.status == 0, resumed.err
    assert record(run) == record(expected)
    assert [line["step"] for line in logged(run) if "eval/own/accuracy" in line] == [0, 1, 2, 3, 4]
    assert all(torch.equal(value, weights(expected)[name]) for name, value in weights(run).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("eval.during.benchmarks=[aime24]",), "eval.during.benchmarks: nothing says when to evaluate them; add"),
        (("trainer.eval_strategy=steps",), "trainer.eval_steps: it has no value"),
        ((*EVERY_STEP, "eval.during.benchmarks=[aime23]"), "there is no 'aime23' (did you mean 'aime2"),
        ((*EVERY_STEP, "eval.during.benchmarks=[default]"), "eval.during.benchmarks: there is no 'default'"),
        ((*EVERY_STEP, "eval.during.benchmarks=[]"), "eval.during.benchmarks: [] names none"),
        ((*EVERY_STEP, "eval.during.benchmarks=[own,own]"), "names one twice; name each once"),
        ((*EVERY_STEP, "eval.during.benchmarks=aime24"), "eval.during.benchmarks: "),
        (
            (*EVERY_STEP, "eval.during.benchmarks=[aime25]", "eval.during.files={files}"),
            "has no aime25.jsonl, nor .json nor .parquet; put it there",
        ),
        (
            (*EVERY_STEP, "eval.during.benchmarks=[aime25]"),
            "aime25 cannot be had: math-ai/aime25 [test] cannot be loaded",
        ),
        ((*EVERY_STEP, "eval.during.budgets=[8,500]"), "eval.during.budgets: a budget of 500 tokens is more"),
        ((*EVERY_STEP, "eval.during.budgets=[0]"), "eval.during.budgets: "),
        ((*EVERY_STEP, "eval.during.samples=0"), "eval.during.samples: 0 is not possible"),
        ((*EVERY_STEP, "eval.during.sample=2"), "did you mean 'eval.during.samples'"),
        ((*EVERY_STEP, "+eval.during.sample=2"), "eval.during.sample: there is no such key"),
        ((*EVERY_STEP, "trainer.eval_steps=-1"), "trainer.eval_steps: -1.0 is not possible; set it above 0"),
        ((*EVERY_STEP, *BEST, "trainer.metric_for_best_model=aime25/accuracy"), "not every evaluation measures aime"),
        ((*EVERY_STEP, *BEST, "trainer.metric_for_best_model=own/acuracy"), "(did you mean 'own/accuracy'?)"),
        ((*EVERY_STEP, *BEST, "trainer.metric_for_best_model=own/thinking_tokens_correct"), "not every evaluation"),
        ((*EVERY_STEP, *BEST), "trainer.metric_for_best_model: it has no value; set BENCHMARK/METRIC, as own/"),
        ((*EVERY_STEP, "trainer.num_generations_eval=2"), "it follows from eval.during.samples"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(cli, files, settings, message):  # noqa: F811
    found = cli(*(item.format(files=files) for item in settings))
    assert found.status == 2 and message in found.err, found.err
    assert found.err.splitlines()[-1].startswith("error: ") and found.err.count("error: ") == 1, found.err
    assert not found.runs.exists() or not any(found.runs.iterdir())


@pytest.mark.parametrize(
    ("changed", "measured", "not_always"),
    [
        ({"samples": 1, "budgets": [0.5, 1.0]}, {"accuracy", "correct@8", "anytime_accuracy"}, {"pass@2", "maj@2"}),
        ({"samples": 4, "budgets": None}, {"pass@2", "maj@4"}, {"correct@8", "thinking_tokens_correct"}),
        ({"samples": 1, "budgets": None, "limit": 1}, {"accuracy"}, {"accuracy_half_width"}),
    ],
)
def test_what_every_evaluation_measures(changed, measured, not_always):
    section = {"limit": None} | changed
    cfg = OmegaConf.create({"eval": section, "rollout": {"max_thinking_tokens": 16}, "reward": {"classes": "some"}})
    found = set(during.always_measured(cfg))
    assert measured <= found and not not_always & found


def test_a_set_of_another_size_is_refused(cli, files):  # noqa: F811
    (files / "aime24.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    found = cli(*EVERY_STEP, "eval.during.benchmarks=[aime24]", f"eval.during.files={files}")
    assert found.status == 2 and "aime24 cannot be had: aime24 has 30 problems, and 1 were found; put" in found.err


def test_what_comes_out_is_told_in_a_line_for_each_benchmark():
    out = io.StringIO()
    line = ProgressLine(Console(file=out, width=200))
    found = {"eval_own/accuracy": 0.5, "eval_own/thinking_tokens": 12.0, "eval_aime24/accuracy": 0.25, "eval_x/e3": 1.0}
    state = TrainerState(global_step=20, max_steps=60, is_world_process_zero=True)
    line.on_evaluate(None, state, TrainerControl(), found)
    assert out.getvalue().splitlines() == [
        "step 20/60, own: accuracy 0.5, thinking tokens 12",
        "step 20/60, aime24: accuracy 0.25",
    ]


def test_runs_that_were_evaluated_differently_meanwhile_can_be_compared():
    assert WHEN.fullmatch("eval.during.limit") and not WHEN.fullmatch("eval.limit")


def test_a_completion_that_the_engine_has_no_room_for_is_refused_before_training():
    tokenizer = SimpleNamespace(apply_chat_template=lambda prompts, **_: {"input_ids": [[1] * 7, [1] * 20]})
    cfg = OmegaConf.create({"trainer": {"vllm_max_model_length": 64}, "eval": {"max_new_tokens": 44, "budgets": None}})
    problems = Dataset.from_dict({"prompt": ["a", "b"]})
    during._refuse_too_long("aime24", problems, cfg, tokenizer)
    cfg.eval.max_new_tokens = 45
    with pytest.raises(UserError, match=r"^eval\.during\.max_new_tokens: .*aime24 vLLM has room for 44 tokens"):
        during._refuse_too_long("aime24", problems, cfg, tokenizer)


@pytest.mark.parametrize(("budget", "refused"), [(28, False), (29, True)])
def test_a_forced_answer_that_the_engine_has_no_room_for_is_refused_before_training(monkeypatch, budget, refused):
    tokenizer = SimpleNamespace(apply_chat_template=lambda prompts, **_: {"input_ids": [[1] * 20]})
    monkeypatch.setattr(during.parts, "template", lambda model, tokenizer: Template(7, cut=(5, 7, 6, 6)))
    section = {"max_new_tokens": 44, "budgets": [8, budget], "max_answer_tokens": 12}
    cfg = OmegaConf.create(
        {"trainer": {"vllm_max_model_length": 64}, "eval": section, "model": {}, "rollout": {"max_thinking_tokens": 44}}
    )
    told = rf"^eval\.during\.budgets: .*aime24 vLLM has room for 44 tokens, and not for 45, thinking cut at {budget}"
    with pytest.raises(UserError, match=told) if refused else contextlib.nullcontext():
        during._refuse_too_long("aime24", Dataset.from_dict({"prompt": ["a"]}), cfg, tokenizer)
