"""What a user can mend ends in one line that names the key and the fix, status 2, and no traceback."""

import importlib.util
import json
import re

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rltoken import config, runs
from rltoken.errors import UserError

PROBLEMS = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i), "id": str(i)} for i in range(8)]
STAGES = '''
"""Stages of a user."""

def negative(mask):
    return mask * -1.0

def negative_live(entropy):
    return -entropy

def unknown_signal(entropi):
    return entropi

def cannot_be_had(logps):
    return logps

def raises(mask):
    raise RuntimeError("disk on fire")

def forgets(mask):
    pass
'''


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def model_without(folder, *, chat_template):
    """A model whose tokenizer knows a few words only: no end of thinking, and a chat template on demand."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = "{{ messages[0]['content'] }}" if chat_template else None
    fast.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, eos_token_id=1
        )
    ).save_pretrained(folder)
    return folder


def stage(slot, function):
    return [f"+method.{slot}.mine={{_target_: my_stages.{function}, _partial_: true}}"]


def hf(folder):
    return ["model=hf", f"model.path={folder}"]


def jsonl(path):
    return ["data=jsonl", f"data.path={path}", f"data.eval_path={path}", "reward=math"]


# name -> (overrides from the test's folder, what the line says, key first)
REFUSED = {
    "mistyped key": (lambda d: ["trainer.bet=0.1"], r"trainer\.bet: .*did you mean 'trainer\.beta'"),
    "mistyped key of a stage": (
        lambda d: ["+weight=forks", "method.weights.forks.rh=0.1"],
        r"method\.weights\.forks\.rh: .*did you mean 'method\.weights\.forks\.rho'",
    ),
    "mistyped added key": (lambda d: ["+modle.path=x"], r"modle: .*did you mean 'model'"),
    "mistyped group": (lambda d: ["+weigth=forks"], r"weigth: .*did you mean 'weight'"),
    "mistyped key beside a plus": (lambda d: ["+eval.smaples=3"], r"eval\.smaples: .*did you mean 'samples'"),
    "mistyped name of a stage": (
        lambda d: ["+weight=forks", "method.weights.fork.rho=0.1"],
        r"method\.weights\.fork\.rho: .*did you mean 'method\.weights\.forks\.rho'",
    ),
    "mistyped key of the model": (lambda d: ["+model.dtpye=float32"], r"model\.dtpye: .*did you mean 'dtype'"),
    "mistyped key of the template": (lambda d: ["+model.forced.haeder=x"], r"model\.forced\.haeder: .*'header'"),
    "mistyped key of the data": (lambda d: ["+data.max_promt_tokens=9"], r"data\.max_promt_tokens: .*'max_prompt_tok"),
    "choice made twice": (lambda d: ["+rows=forced_answer"] * 2, r"rows: .*chosen twice; .*'\+rows=\[a,b\]'"),
    "sweep of a key": (lambda d: ["seed=0,1"], r"seed: 0,1 .*add --multirun .*seed=\[0,1\]"),
    "sweep of a group": (
        lambda d: ["+exp=grpo,forced_answer"], r"exp: .*add --multirun .*\+exp=\[grpo,forced_answer\]",
    ),
    "sweep of a range": (lambda d: ["seed=range(3)"], r"seed: range\(3\) .*add --multirun for a run of each\."),
    "key of a method that is swept": (
        lambda d: ["+exp=laser,kimi_length", "method.shapes.laser.target=9", "--multirun"],
        r"method\.shapes\.laser\.target: .*comes with \+exp=laser,kimi_length, write \+\+method\.shapes\.las",
    ),
    "mistyped key beside a sweep": (
        lambda d: ["+shape=[laser,dler]", "seed=0,1", "trainer.bet=9", "--multirun"],
        r"trainer\.bet: there is no such key \(did you mean 'trainer\.beta'\?\)\. ",
    ),
    "one name for a sweep": (
        lambda d: ["name=mine", "seed=0,1", "--multirun"], r"name: 2 jobs .*runs/mine; leave name out.*'x-\$\{seed\}'",
    ),
    "one name for some jobs of a sweep": (
        lambda d: ["name=mine-${seed}", "seed=0,1", "trainer.beta=0,0.1,1", "--multirun"], r"name: 3 jobs .*/mine-0; ",
    ),
    "forgotten plus": (lambda d: ["exp=grpo"], r"exp: .*takes a '\+': \+exp="),
    "superfluous plus": (lambda d: ["+model=hf"], r"model: .*write model=hf without a '\+'"),
    "dashes": (lambda d: ["--exp=grpo"], r"--exp=grpo: .*without dashes: \+exp=grpo"),
    "mistyped choice in a list": (lambda d: ["+weight=[forks,frks]"], r"weight=frks: .*did you mean 'forks'"),
    "choice of a folder that is not there": (lambda d: ["+exp=paper/grpo"], r"exp=paper/grpo: .*'exp' has: .*grpo"),
    "choice that others build on": (lambda d: ["eval=_benchmark"], r"eval=_benchmark: .*other choices build on"),
    "such a choice in a sweep": (lambda d: ["data=tiny,_base", "--multirun"], r"data=_base: .* build on"),
    "too hot an evaluation": (lambda d: ["eval.temperature=inf"], r"eval\.temperature: inf .*to a number from 0"),
    "rollouts too hot": (lambda d: ["trainer.temperature=inf"], r"trainer\.temperature: inf .*above 0"),
    "group set to null": (lambda d: ["scale=null"], r"scale: .*choose one of: paper, small, tiny"),
    "group left out": (lambda d: ["~rollout"], r"rollout: .*remove '~rollout'"),
    "field left out": (lambda d: ["~trainer.beta"], r"trainer\.beta: .*set trainer\.beta="),
    "field that another key decides": (lambda d: ["trainer.seed=1"], r"trainer\.seed: .*set seed="),
    "reference to nothing": (lambda d: ["data.train.n=${foo}"], r"data\.train\.n: it refers to \$\{foo\}"),
    "open bracket": (lambda d: ["eval.limit=[1"], r"eval\.limit: .*brackets closed"),
    "wrong type of a switch": (lambda d: ["trainer.use_cpu=maybe"], r"trainer\.use_cpu: .*not a valid bool"),
    "wrong type outside trainer": (lambda d: ["eval.samples=many"], r"eval\.samples: Value 'many' .*of that type"),
    "wrong type of seed": (lambda d: ["seed=abc"], r"seed: 'abc' .*set seed="),
    "no such on_change": (lambda d: ["on_change=maybe"], r"on_change: 'maybe' is unknown; use 'refuse' or 'accept'"),
    "wrong type of resume": (lambda d: ["resume=true"], r"resume: True .*set resume=auto"),
    "no method": (lambda d: ["method=null"], r"method: .*set method=\{\}"),
    "no problem to evaluate": (lambda d: ["eval.limit=0"], r"eval\.limit: 0 .*set it to 1 or more"),
    "a difference of a text": (lambda d: ["rollout.max_logp_difference=low"], r"rollout\.max_logp_difference: 'low' "),
    "a negative difference": (lambda d: ["rollout.max_logp_difference=-1"], r"rollout\.max_logp_difference: -1 .*0 or"),
    "empty packs": (lambda d: ["rollout.pack_tokens=0"], r"rollout\.pack_tokens: 0 .*set it to 1 or more"),
    "unknown normaliser": (lambda d: ["rollout.normaliser=x"], r"rollout\.normaliser: .*thinking, all"),
    "negative coefficient": (lambda d: ["trainer.beta=-1"], r"trainer\.beta: -1\.0 .*set it to 0 or more"),
    "greedy rollouts": (lambda d: ["trainer.temperature=0"], r"trainer\.temperature: .*above 0"),
    "unknown optimizer": (lambda d: ["trainer.optim=adamw_troch"], r"trainer\.optim: .*did you mean 'adamw_torch'"),
    "optimizer of a library that is missing": (
        lambda d: ["trainer.optim=lomo"], r"trainer\.optim: lomo .*lomo.optim.*set trainer\.optim=adamw_torch",
    ),
    "unknown tracker": (lambda d: ["trainer.report_to=wnadb"], r"trainer\.report_to: .*did you mean 'wandb'"),
    "weights of rewards": (lambda d: ["reward.weights=[1,2]"], r"reward\.weights: 2 weights for 1 .*one for each"),
    "truncation masked beside added rows": (
        lambda d: ["trainer.mask_truncated_completions=true", "+rows=forced_answer"],
        r"trainer\.mask_truncated_completions: .*set it to false",
    ),
    "mistyped group choice": (lambda d: ["+exp=grop"], r"exp=grop: .*did you mean 'grpo'"),
    "wrong type": (lambda d: ["trainer.beta=high"], r"trainer\.beta: Value 'high' .*give a value of that type"),
    "no override": (lambda d: ["trainer.beta"], r"trainer\.beta: .*write key=value"),
    "missing value": (lambda d: ["model=hf"], r"model\.path: .*set model\.path="),
    "missing path of the teacher": (
        lambda d: ["+exp=kdrl", "teacher=hf"], r"teacher\.path: it has no value yet; set teacher\.path=",
    ),
    "method without a teacher": (lambda d: ["+aux=kdrl"], r"teacher: method\.aux\.kdrl needs one; choose teacher=hf "),
    "teacher left out": (lambda d: ["~teacher"], r"teacher: it cannot be left out; remove '~teacher'"),
    "unknown model path": (lambda d: hf(d / "nowhere"), r"model\.path: there is no folder .*Set model\.path"),
    "no answer column": (
        lambda d: jsonl(write(d / "p.jsonl", [{"problem": "1 + 1?", "solutions": "2"}])),
        r"data\.columns\.answer: .*no column .*Set data\.columns\.answer=solutions",
    ),
    "gold answers no grader can parse": (
        lambda d: jsonl(write(d / "p.jsonl", [row | {"answer": "see the long proof below"} for row in PROBLEMS])),
        r"data\.columns\.answer: 8 of 8 gold answers .*cannot be read by the grader.*Set data\.columns\.answer",
    ),
    "no such file": (lambda d: jsonl(d / "none.jsonl"), r"data\.path: there is no file .*Set data\.path"),
    "group split over ranks": (
        lambda d: ["trainer.num_generations=3"], r"trainer\.num_generations: .*split .*multiple of num_generations",
    ),
    "group of one": (lambda d: ["trainer.num_generations=1"], r"trainer\.num_generations: .*set it to 2 or more"),
    "no end-of-thinking token": (
        lambda d: hf(model_without(d / "model", chat_template=True)), r"model\.think_end: '</think>'.*think_end=null",
    ),
    "no chat template": (
        lambda d: hf(model_without(d / "model", chat_template=False)), r"model\.path: .*no chat template.*Set model",
    ),
    "negative weight": (lambda d: stage("weights", "negative"), r"method\.weights\.mine: a weight is negative.*return"),
    "negative live weight": (lambda d: stage("weights", "negative_live"), r"method\.weights\.mine: .*is negative"),
    "stage that returns nothing": (
        lambda d: stage("weights", "forgets"), r"method\.weights\.mine: the stage returned None, .*return one value",
    ),
    "setting out of its range": (
        lambda d: ["+weight=forks", "method.weights.forks.rho=3"],
        r"method\.weights\.forks\.rho: 3 is not possible; set it to a number above 0 and up to 1\.",
    ),
    "unknown attention": (
        lambda d: ["model.attn_implementation=magic"], r"model\.attn_implementation: 'magic' .*sdpa or eager",
    ),
    "unknown split of the tiny world": (
        lambda d: ["data.train.split=foo"], r"data: there is no split 'foo'\. Set data\.train\.split=train",
    ),
    "unknown signal": (
        lambda d: stage("weights", "unknown_signal"), r"method\.weights\.mine: .*'entropi' .*did you mean 'entropy'",
    ),
    "signal that cannot be had": (
        lambda d: stage("credits", "cannot_be_had"), r"method\.credits\.mine: .*'logps' cannot be had in the slot",
    ),
    "sequence-level ratios with a token stage": (
        lambda d: ["+weight=forks", "trainer.importance_sampling_level=sequence", "trainer.loss_type=grpo"],
        r"trainer\.importance_sampling_level: .*set it to 'token'",
    ),
    "user stage that raises": (
        lambda d: stage("weights", "raises"), r"method\.weights\.mine: .*RuntimeError: disk on fire.*leave it out",
    ),
    "no such stage": (
        lambda d: stage("weights", "nothing"), r"method\.weights\.mine: my_stages\.nothing .*Correct _target_",
    ),
    "unknown slot": (lambda d: ["+method.weight.x=1"], r"method\.weight: .*did you mean 'weights'"),
    "seed for all siblings": (
        lambda d: ["trainer.generation_kwargs={seed: 1}"], r"trainer\.generation_kwargs\.seed: .*remove it",
    ),
    "unknown loss type": (lambda d: ["trainer.loss_type=grop"], r"trainer\.loss_type: .*did you mean 'grpo'"),
    "mistyped adapter setting": (
        lambda d: ["+lora=default", "+model.lora.lora_alhpa=4"], r"model\.lora\.lora_alhpa: .*model\.lora\.lora_alpha",
    ),
    "no such checkpoint": (lambda d: ["resume=nowhere"], r"resume: nowhere is no checkpoint; set resume=auto"),
    "prompts too long": (lambda d: ["+data.max_prompt_tokens=3"], r"data\.max_prompt_tokens: .*exceed 3 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_names_the_key_and_the_fix(cli, tmp_path, monkeypatch, name):
    overrides, message = REFUSED[name]
    (tmp_path / "my_stages.py").write_text(STAGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = cli("eval.before=false", *overrides(tmp_path))
    lines = [line for line in found.err.splitlines() if line.startswith("error: ")]
    assert found.status == 2, found.err
    shown = [line for line in found.err.splitlines() if line and not line.startswith("warm start of the tiny model")]
    assert shown == lines and len(lines) == 1, found.err
    assert "Traceback" not in found.out
    assert re.match(f"error: {message}", lines[0]), lines[0]


def test_an_existing_run_directory_is_refused(cli):
    assert cli("name=mine", "eval.before=false", "eval.after=false").status == 0
    again = cli("name=mine")
    assert again.status == 2 and "error: name: runs/mine exists already" in again.err and "resume=auto" in again.err
    assert not (again.runs / "mine/traceback.txt").exists(), "a finished run was written into"


def test_another_configuration_is_not_resumed(cli):
    assert cli("name=mine", "eval.before=false", "eval.after=false").status == 0
    (report,) = cli("name=mine").runs.glob("mine/report.json")
    report.unlink()
    other = cli("name=mine", "resume=auto", "trainer.beta=0.5", "eval.before=false", "eval.after=false")
    assert (
        other.status == 2
        and "error: " in other.err
        and "mine does not fit: trainer.beta was 0.0 and is 0.5;" in other.err
    )


def test_a_finished_run_is_not_taken_for_one_of_other_settings(cli):
    quick = ("name=mine", "eval.before=false", "eval.after=false", "resume=auto")
    assert cli(*quick).status == 0
    other = cli(*quick, "trainer.beta=0.5")
    assert other.status == 2 and "does not fit: trainer.beta was 0.0 and is 0.5; go" in other.err
    assert "is finished" not in other.out and "is finished" in cli(*quick).out


def test_changed_settings_are_accepted_on_demand(cli):
    quick = ("name=mine", "eval.before=false", "eval.after=false", "resume=auto")
    assert cli(*quick).status == 0
    longer = cli(*quick, "trainer.max_steps=3", "on_change=accept")
    assert longer.status == 0, longer.err
    assert "mine: trainer.max_steps was 2 and is 3. Accepted: from here on" in longer.out
    run = longer.runs / "mine"
    assert [line["step"] for line in map(json.loads, (run / "metrics.jsonl").open())] == [1, 2, 3]
    assert "max_steps: 2" in (run / "config.0.yaml").read_text() and (run / "report.0.json").exists()
    assert "max_steps: 3" in (run / "config.yaml").read_text()
    assert json.loads((run / "report.json").read_text())["steps"] == 3
    again = cli(*quick, "trainer.max_steps=3")
    assert again.status == 0 and "is finished" in again.out


def test_a_method_is_asked_for(cli):
    found = cli(exp=None)
    assert found.status == 2 and not found.runs.exists()
    assert found.err.startswith("error: method: nothing chosen; add +exp=grpo (plain GRPO) or another; --help")
    assert cli("+weight=forks", "eval.before=false", "eval.after=false", exp=None).status == 0


@pytest.mark.parametrize(
    "overrides",
    [("model=hf", "model.path=./nowhere"), ("data=jsonl", "data.path=none.jsonl"), ("data.train.n=0",)],
    ids=["model", "file", "number"],
)
def test_what_cannot_be_loaded_leaves_no_run_directory(cli, overrides):
    found = cli("name=mine", *overrides)
    assert found.status == 2 and not (found.runs / "mine").exists()


def test_a_try_that_failed_before_its_first_step_does_not_stand_in_the_way(cli, tmp_path, monkeypatch):
    (tmp_path / "my_stages.py").write_text(STAGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    wrong = cli("name=mine", *stage("weights", "raises"))
    folder = wrong.runs / "mine"
    assert wrong.status == 2 and "disk on fire" in (folder / "traceback.txt").read_text()
    assert (folder / "evaluation_before.parquet").exists()
    right = cli("name=mine", "eval.before=false", "eval.after=false")
    assert right.status == 0, right.err
    assert not (folder / "traceback.txt").exists() and not (folder / "evaluation_before.parquet").exists()


@pytest.mark.parametrize("kept", ["checkpoint-1", "metrics.jsonl", "final", "report.json"])
def test_a_failed_run_that_trained_is_kept(tmp_path, kept):
    cfg = OmegaConf.create({"resume": None})
    runs.open_run(tmp_path, cfg, ["train"])
    (tmp_path / "traceback.txt").touch()
    (tmp_path / kept).mkdir()
    with pytest.raises(UserError, match="exists already"):
        runs.open_run(tmp_path, cfg, ["train"])
    runs.discard(tmp_path)
    assert (tmp_path / kept).exists() and (tmp_path / "config.yaml").exists()


def test_a_run_of_which_nothing_came_leaves_nothing(tmp_path):
    run = tmp_path / "run"
    runs.open_run(run, OmegaConf.create({"resume": None}), ["train"])
    (run / "completions").mkdir()  # TRL makes it with the trainer
    (run / "traceback_1.txt").touch()
    runs.discard(run)
    assert not run.exists()


def test_a_folder_of_something_else_is_kept(tmp_path):
    for name in ("completions", "traceback.txt"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="exists already"):
        runs.open_run(tmp_path, OmegaConf.create({"resume": None}), ["train"])


SETTINGS_OUT_OF_RANGE = {
    "+weight=forks_microbatch": ["weights.forks_microbatch.rho=0"],
    "+shape=length_regularised": ["shapes.length_regularised.weight=1", "shapes.length_regularised.longest=0"],
    "+rows=forced_answer": ["rows.forced_answer.shortest=-1", "rows.forced_answer.max_new_tokens=0.5"],
    "+rows=dynamic_sampling": ["rows.dynamic_sampling.max_rounds=0"],
    "+bounds=clip_range": ["bounds.clip_range.low=-0.2", "bounds.clip_range.high=null"],
    "+credit=entropy_advantage": ["credits.entropy_advantage.kappa=1", "credits.entropy_advantage.alpha=-1"],
    "+aux=entropy_bonus": ["aux.entropy_bonus.coef=high"],
    "+control=length_schedule": ["controls.length_schedule.over=2", "controls.length_schedule.start=0"],
    "+prompt=budget": ["prompts.budget.budgets=[]", "prompts.budget.budgets=[0,8]", "prompts.budget.template=think"],
    "+prompt=tldr_style": ["prompts.tldr_style.levels=[]", "prompts.tldr_style.levels=[brief]"],
    "+prompt=hbpo": ["prompts.hbpo.budgets=[]", "prompts.hbpo.template=hurry"],
    "+prompt=l1": ["prompts.l1.ask=often", "prompts.l1.least=0"],
    "+control=hapo_entropy": ["controls.hapo_entropy.tau=-1", "controls.hapo_entropy.form=papr"],
    "+weight=hapo_entropy": ["weights.hapo_entropy.beta=2", "weights.hapo_entropy.sign=positive"],
    "+bounds=hapo_entropy": ["bounds.hapo_entropy.alpha=-1", "bounds.hapo_entropy.sign=positive"],
    "+credit=hapo_entropy": ["credits.hapo_entropy.fallback_at=0"],
    "+control=think_prune": ["controls.think_prune.stages=[40]", "controls.think_prune.stages=[[10,20]]"],
    "+control=think_prune +prompt=think_prune": ["prompts.think_prune.template=hurry"],
    "+shape=ada_grpo": [
        *(f"shapes.ada_grpo.{wrong}" for wrong in ("strip=maybe", "diversity=maybe", "tags={short:a,long:ab}")),
        "shapes.ada_grpo.structures={verse:a}",
    ],
    "+shape=arora_zanette": ["shapes.arora_zanette.alpha=2"],
    "+shape=dler": ["shapes.dler.factor=2"],
    "+shape=fast_math_r1": ["shapes.fast_math_r1.unit=words", "shapes.fast_math_r1.longest=-1"],
    "+shape=grpo_lead": ["shapes.grpo_lead.wrong=1", "shapes.grpo_lead.longer_than=-1"],
    "+shape=hapo_history": ["shapes.hapo_history.floor=1", "shapes.hapo_history.weight=-1"],
    "+shape=hawkeye": ["shapes.hawkeye.share=-1", "shapes.hawkeye.unit=percent"],
    "+shape=hbpo": ["shapes.hbpo.form=papr", "shapes.hbpo.longest=0"],
    "+shape=kimi_length": ["shapes.kimi_length.weight=-1"],
    "+shape=l1_exact": ["shapes.l1_exact.alpha=-1", "shapes.l1_exact.gated=maybe"],
    "+shape=l1_max": ["shapes.l1_max.reading=papr", "shapes.l1_max.delta=2"],
    "+shape=laser": ["shapes.laser.wrong=1", "shapes.laser.target=0"],
    "+shape=laser_d": ["shapes.laser_d.interval=0", "shapes.laser_d.highest=1000"],
    "+shape=laser_de": ["shapes.laser_de.every=0", "shapes.laser_de.gated=maybe"],
    "+shape=o1_pruner_style": ["shapes.o1_pruner_style.least=1", "shapes.o1_pruner_style.gated=maybe"],
    "+shape=optima": ["shapes.optima.fewest=-1", "shapes.optima.most=0"],
    "+shape=shorter_better": ["shapes.shorter_better.alpha=0", "shapes.shorter_better.beta=-1"],
    "+shape=think_prune": ["shapes.think_prune.limit=1.5"],
    "+shape=tldr_style": ["shapes.tldr_style.short=-1", "shapes.tldr_style.longest=0"],
    "+credit=dler": ["credits.dler.boost=-1"],
    "+credit=grpo_lead": ["credits.grpo_lead.midpoint=2", "credits.grpo_lead.steepness=-1"],
    "+shape=hbpo +credit=hbpo": ["credits.hbpo.form=papr", "credits.hbpo.beta=0"],
}


@pytest.mark.parametrize("group", SETTINGS_OUT_OF_RANGE)
def test_settings_of_shipped_stages_are_checked_before_anything_loads(cli, group):
    for setting in SETTINGS_OUT_OF_RANGE[group]:
        found = cli(*group.split(), f"method.{setting}")
        key = setting.partition("=")[0]
        assert found.status == 2 and found.err.startswith(f"error: method.{key}: "), found.err
        assert found.err.count("\n") == 1 and not found.runs.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("override", "message"),
    [("hardware=gpu", r"trainer\.bf16: .*set hardware=auto"), ("trainer.fp16=true", r"trainer\.fp16: .*needs a GPU")],
)
def test_hardware_that_is_not_there_is_refused(cli, override, message):
    found = cli(override)
    assert found.status == 2 and re.match(f"error: {message}", found.err) and not found.runs.exists()


def test_what_is_not_installed_is_refused_before_a_model_loads(cli, monkeypatch):
    monkeypatch.setattr(config, "_installed", lambda module: False)
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: [])
    with pytest.raises(UserError, match=r"^trainer\.use_vllm: .*not installed; run: pip install"):
        config.check_vllm({"use_vllm": True, "vllm_mode": "server"}, gpu=True)
    for key, value in (("use_liger_kernel", "true"), ("report_to", "wandb")):
        found = cli(f"trainer.{key}={value}")
        assert found.status == 2 and re.match(rf"error: trainer\.{key}: .*not installed; run: pip install", found.err)
        assert not found.runs.exists()


@pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("vllm") is not None, reason="this machine has a GPU, or vLLM"
)
@pytest.mark.parametrize("rollout", ["vllm_colocate", "vllm_server"])
def test_vllm_on_a_cpu_that_is_not_there_is_refused_with_its_set_up(cli, rollout):
    found = cli(f"rollout={rollout}")
    assert found.status == 2 and re.match(r"error: trainer\.use_vllm: .*scripts/setup_vllm_cpu\.sh", found.err)
    assert found.err.count("\n") == 1 and not found.runs.exists()


def test_what_split_weights_cannot_do_is_refused_before_a_model_is_loaded(cli, monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    found = cli("hardware=auto", "trainer.sync_ref_model=true", "trainer.beta=0.1")
    assert found.status == 2 and found.err.startswith("error: trainer.sync_ref_model: a checkpoint would hold one")
    assert not found.runs.exists()


def test_sharding_that_the_configuration_asks_for_is_refused_on_cpus(cli):
    found = cli("hardware=cpu", "trainer.fsdp=full_shard")
    assert found.status == 2 and found.err.startswith("error: trainer.use_cpu: accelerate splits no model over CPUs")
