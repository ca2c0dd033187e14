"""What a user can mend ends in one line that names the key and the fix, status 2, and no traceback."""

import json
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    "mistyped group choice": (lambda d: ["+exp=grop"], r"exp=grop: .*did you mean 'grpo'"),
    "wrong type": (lambda d: ["trainer.beta=high"], r"trainer\.beta: Value 'high' .*give a value of that type"),
    "no override": (lambda d: ["trainer.beta"], r"trainer\.beta: .*write key=value"),
    "missing value": (lambda d: ["model=hf"], r"model\.path: .*set model\.path="),
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
    "no such stage": (lambda d: stage("weights", "nothing"), r"configuration: .*my_stages\.nothing"),
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
    assert len(lines) == 1 and "Traceback" not in found.err + found.out
    assert re.match(f"error: {message}", lines[0]), lines[0]


def test_an_existing_run_directory_is_refused(cli):
    assert cli("name=mine", "eval.before=false", "eval.after=false").status == 0
    again = cli("name=mine")
    assert again.status == 2 and "error: name: runs/mine exists already" in again.err and "resume=auto" in again.err


def test_another_configuration_is_not_resumed(cli):
    assert cli("name=mine", "eval.before=false", "eval.after=false").status == 0
    (report,) = cli("name=mine").runs.glob("mine/report.json")
    report.unlink()
    other = cli("name=mine", "resume=auto", "trainer.beta=0.5", "eval.before=false", "eval.after=false")
    assert other.status == 2 and "error: " in other.err and "trainer.beta=0.0, not 0.5" in other.err


def test_a_try_that_never_began_does_not_stand_in_the_way(cli, tmp_path):
    wrong = cli("name=mine", "model=hf", f"model.path={tmp_path}/nowhere")
    assert wrong.status == 2 and (wrong.runs / "mine/traceback.txt").exists()
    assert cli("name=mine", "eval.before=false", "eval.after=false").status == 0
