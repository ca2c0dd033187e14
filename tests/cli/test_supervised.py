"""Two stages from one command: the second starts from the first one's model, and each goes on exactly where it was."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from rltoken.data import load_traces
from rltoken.errors import UserError
from rltoken.methods.ada_grpo import TAGS
from rltoken.preemption import EXIT_CODE
from rltoken.resume import newest_whole, read_manifest, verify
from rltoken.supervised import encoded
from rltoken.tiny import World, build_tokenizer, traces, warm_start
from tests.resume.phases import PHASES, at_call, logged, send, started
from tests.resume.test_preempted_processes import TWO

STEPS = 3
RUN = (
    "+exp=ada_grpo", "name=x", f"sft.trainer.max_steps={STEPS}", "sft.trainer.save_steps=100", "data.traces.n=40",
    "sft.trainer.per_device_train_batch_size=8", "sft.trainer.logging_steps=2", "eval.before=false", "eval.after=false",
    "trainer.save_steps=100", "trainer.learning_rate=0.01", "trainer.warmup_steps=0",
    "reward.funcs.accuracy._target_=tests.resume.phases.parity",
)  # fmt: skip


TAGGED = World(tagged=True, min_operations=1, max_operations=3, noise=0.1)
"""That of +exp=ada_grpo."""


def weights(run, stage=""):
    return (run / stage / "final/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def expected(whole, cli):
    """The run directory of a run in one piece."""
    run = whole / "x"
    if not run.exists():
        found = cli(*RUN, f"runs_dir={whole}")
        assert found.status == 0, found.err
    return run


def test_reinforcement_begins_with_the_model_of_the_supervised_stage(cli, cache):
    settings = ("trainer.learning_rate=0", "trainer.save_steps=1", "trainer.max_steps=1")
    found = cli(*RUN, *settings)
    assert found.status == 0, found.err
    run = found.runs / "x"
    assert weights(run) == weights(run, "sft")
    start = load_file(warm_start(world=TAGGED, steps=2, cache_dir=cache) + "/model.safetensors")
    taught = load_file(run / "sft/final/model.safetensors")
    assert max((start[name] - taught[name]).abs().max().item() for name in taught) > 1e-5
    assert newest_whole(run / "sft", (run / "run_id.txt").read_text().strip()) == (run / "sft/checkpoint-3", [])
    assert [line["step"] for line in logged(run / "sft")] == [2] and "reward" in logged(run)[0]


@pytest.mark.parametrize(
    ("phase", "count", "kept"),
    [
        ("backward", 2, "in the supervised stage at step 2 of 3, saved in runs/x/sft/checkpoint-2"),
        ("backward", STEPS + 1, "at step 1 of 2, saved in runs/x/checkpoint-1"),
        ("loading", 2, "in the supervised stage at step 3 of 3, saved in runs/x/sft/checkpoint-3"),
    ],
)
def test_a_run_that_is_stopped_in_either_stage_goes_on_exactly(cli, expected, monkeypatch, phase, count, kept):
    with monkeypatch.context() as patch:
        at_call(patch, PHASES[phase], count, send)
        left = cli(*RUN)
    run = left.runs / "x"
    assert left.status == EXIT_CODE, left.err
    assert left.err.splitlines()[-1] == f"stopped by SIGTERM {kept}; the same command with resume=auto goes on"
    before = (run / "sft/final").stat().st_mtime_ns if (run / "sft/final").exists() else None
    resumed = cli(*RUN, "resume=auto")
    assert resumed.status == 0, resumed.err
    assert before in (None, (run / "sft/final").stat().st_mtime_ns), "a finished stage is not repeated"
    for stage in ("sft", ""):
        assert weights(run, stage) == weights(expected, stage)
        assert logged(run / stage) == logged(expected / stage)


def test_a_kill_between_the_last_step_and_its_model_costs_nothing(cli, expected):
    shutil.copytree(expected, (runs := expected.parent / "runs") / "x")
    for name in ("checkpoint-2", "final", "report.json", "metrics.jsonl", "sft/final"):
        path = runs / "x" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (runs / "x/sft/final.partial").mkdir()
    resumed = cli(*RUN, "resume=auto", f"runs_dir={runs}")
    assert resumed.status == 0, resumed.err
    assert weights(runs / "x") == weights(expected) and weights(runs / "x", "sft") == weights(expected, "sft")
    assert not (runs / "x/sft/final.partial").exists()


def test_a_broken_checkpoint_of_the_stage_is_skipped(cli, expected, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, PHASES["backward"], 3, lambda: [][0])
        assert cli(*RUN, "sft.trainer.save_steps=1").status == 1
    resumed = cli(*RUN, "sft.trainer.save_steps=1", "resume=auto")
    run = resumed.runs / "x"
    assert resumed.status == 0, resumed.err
    assert weights(run, "sft") == weights(expected, "sft") and verify(run / "sft/checkpoint-3") is None


def test_an_adapter_goes_through_both_stages_or_is_merged_between_them(cli):
    one = cli(*RUN, "+lora=attention", "trainer.learning_rate=0", "trainer.beta=0.01")
    assert one.status == 0, one.err
    run = one.runs / "x"
    first, last = (load_file(run / stage / "final/adapter_model.safetensors") for stage in ("sft", ""))
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    kl = [line["kl"] for line in logged(run)]
    assert max(map(abs, kl)) < 1e-6, "the reference is the adapter as the first stage left it"
    evaluated = cli.evaluate("runs=[runs/x]", "eval.samples=1")
    assert evaluated.status == 0, evaluated.err
    merged = cli(*RUN, "+lora=attention", "sft.merge=true", "name=y")
    assert merged.status == 0, merged.err
    assert (merged.runs / "y/sft/final/model.safetensors").exists() and (merged.runs / "y/final/config.json").exists()
    assert not (merged.runs / "y/final/adapter_config.json").exists()


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(tmp_path, cache):
    """A batch of 8 traces on one rank, and of 4 on each of two, which hold the same traces."""
    common = ("name=x", "sft=tiny", "sft.trainer.max_steps=3", "data.traces.n=40", "eval.before=false")
    common += ("eval.after=false", "sft.trainer.optim=sgd", "sft.trainer.learning_rate=0.5")
    finals = []
    for ranks, launcher in ((1, ()), (2, TWO)):
        size = f"sft.trainer.per_device_train_batch_size={8 // ranks}"
        done = started(tmp_path / str(ranks), cache, (*common, size), launcher=launcher)
        assert done.returncode == 0, done.stderr
        run = tmp_path / str(ranks) / "runs/x"
        assert read_manifest(run / "sft/checkpoint-3")["processes"] == ranks
        finals.append(load_file(run / "sft/final/model.safetensors"))
    start = load_file(warm_start(steps=2, cache_dir=cache) + "/model.safetensors")
    assert max((finals[0][name] - finals[1][name]).abs().max().item() for name in start) < 1e-5
    assert max((finals[0][name] - start[name]).abs().max().item() for name in start) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("sft.trainer.learning_rate=-1",), "sft.trainer.learning_rate: -1.0 is not possible; set it to 0 or more."),
        (("sft.trainer.eval_strategy=steps",), "sft.trainer.eval_strategy: "),
        (("sft.trainer.loss=x",), "sft.trainer.loss: there is no such key"),
        (("sft.merge=true",), "sft.merge: all weights are trained"),
        (("resume=runs/x/sft/checkpoint-1",), "resume: runs/x/sft/checkpoint-1 is one of the supervised stage"),
        (("resume=runs/y/checkpoint-1",), "resume: the supervised stage in runs/x/sft is not finished"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_loads(cli, settings, message):
    found = cli(*RUN, *settings)
    assert found.status == 2 and found.err.startswith(f"error: {message}"), found.err
    assert found.err.count("\n") == 1 and not found.runs.exists()


def test_traces_that_are_missing_leave_no_run_behind(cli):
    found = cli(*RUN, "sft.traces={_target_:rltoken.data.load_traces,path:null,columns:{}}")
    assert found.status == 2 and found.err.startswith("error: data.traces_path: there are no traces."), found.err
    assert not found.runs.exists() or not list(found.runs.iterdir())


# Tokens and files


def test_completions_are_learnt_in_the_tokens_that_sampling_gives_and_sees():
    tokenizer, rows = build_tokenizer(World(tagged=True)), traces(6, world=World(tagged=True))
    made = encoded(rows, tokenizer)
    assert made.column_names == ["input_ids", "completion_mask"]
    for example, row in zip(rows, made, strict=True):
        prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, return_dict=False)
        completion = [*tokenizer.encode(example["completion"]), tokenizer.eos_token_id]
        assert row["input_ids"] == prompt + completion
        assert row["completion_mask"] == [0] * len(prompt) + [1] * len(completion)


def test_thinking_that_the_template_opens_is_not_opened_twice():
    tokenizer = build_tokenizer(World())
    prompt = [{"role": "user", "content": "S 5 A +3"}]
    rows = Dataset.from_list([{"prompt": prompt, "completion": text} for text in ("<think>\nso 1 </think> 1", "so 1")])
    first, second = (tokenizer.decode(row["input_ids"]) for row in encoded(rows, tokenizer))
    assert first == "S 5 A +3 = <think> so 1 </think> 1 <eos>" and second == "S 5 A +3 = <think> so 1 <eos>"


COLUMNS = {"prompt": ["problem"], "completion": ["solution"], "answer": "answer", "format": "format"}


def stored(tmp_path, *rows):
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_traces_of_a_file_are_taken_as_they_are(tmp_path, caplog):
    path = stored(tmp_path, {"problem": "2+2?", "solution": "<think>4</think> 4"}, {"problem": "3?", "solution": " "})
    rows = load_traces(path=path, columns=COLUMNS, template="Solve: {problem}")
    assert rows.to_list() == [
        {"prompt": [{"content": "Solve: 2+2?", "role": "user"}], "completion": "<think>4</think> 4"}
    ]
    assert "dropped 1 of 2 rows" in caplog.text


def test_a_format_puts_its_tags_around_a_trace(tmp_path):
    rows = [{"problem": "2+2?", "solution": "2 and 2", "answer": 4, "format": form} for form in TAGS]
    found = load_traces(path=stored(tmp_path, *rows), columns=COLUMNS, formats=TAGS)
    assert list(found["format"]) == list(TAGS)
    assert found["completion"][0] == "<ANSWER>\n4\n</ANSWER>"
    assert found["completion"][1] == "<COT>\n2 and 2\n</COT>\n<ANSWER>\n4\n</ANSWER>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "a"}, r"data\.traces\.columns\.completion: .*no column 'solution'; it has: problem"),
        ({"problem": "a", "solution": "b", "format": "short"}, r"data\.traces\.columns\.answer: "),
        ({"problem": "a", "solution": "b", "answer": "c", "format": "verse"}, r"holds the format 'verse'.*direct"),
        ({"problem": "", "solution": "b"}, r"data\.traces_path: .*no row with a problem and a completion"),
    ],
)
def test_files_without_what_is_needed_are_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_traces(path=stored(tmp_path, row), columns=COLUMNS, formats=TAGS)
    with pytest.raises(UserError, match=r"data\.traces_path: there is no file"):
        load_traces(path=str(tmp_path / "none.jsonl"), columns=COLUMNS)


@pytest.mark.parametrize("sft", ["traces", "levels"])
def test_messages_name_the_setting_that_holds_the_file(cli, tmp_path, sft):
    found = cli("+exp=tldr_style", f"sft={sft}", f"sft.traces.path={tmp_path / 'none.jsonl'}")
    assert found.status == 2 and "\nerror: sft.traces.path: there is no file" in f"\n{found.err}", found.err
    found = cli("+exp=tldr_style", f"sft={sft}", f"sft.traces.path={stored(tmp_path, {'question': 'a'})}")
    assert found.status == 2 and "\nerror: sft.traces.columns.prompt: " in f"\n{found.err}", found.err
