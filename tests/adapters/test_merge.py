"""`python -m rltoken.merge`: what it writes computes what base and adapter compute, and what it refuses."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from rltoken.adapters import attached
from rltoken.merge import main, merge
from tests.adapters.conftest import KINDS, a_base, an_adapter
from tests.resume.test_faults import limited

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def greedy(model):
    """Token ids and logits of greedy decoding."""
    found = model.eval().generate(
        PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_new_tokens=12, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_answers_as_base_and_adapter(tiny, tmp_path, kind):
    adapter = an_adapter(tiny[0], tmp_path / "adapter", **KINDS[kind])
    merge(adapter, str(tmp_path / "out"))
    tokens, logits = greedy(attached(a_base(tiny[0]), adapter, tiny[0]))
    merged_tokens, merged_logits = greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(tokens, merged_tokens) and torch.allclose(logits, merged_logits, atol=1e-4)
    assert not torch.equal(tokens, greedy(a_base(tiny[0]))[0]), "the adapter makes a difference here"


def test_what_is_written(tiny, tmp_path, capfd):
    adapter = an_adapter(tiny[0], tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    main([adapter, str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert capfd.readouterr().out == f"merged {adapter} into {tiny[0]}: {tmp_path / 'out'}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}, "the scratch folder is gone"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and type(model) is type(a_base(tiny[0]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny[1].chat_template and tokenizer.get_vocab() == tiny[1].get_vocab()


def test_the_dtype_is_the_bases_and_rounded_once(tiny, tmp_path):
    a_base(tiny[0]).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = an_adapter(tmp_path / "base", tmp_path / "adapter", use_dora=True)
    merge(adapter, str(tmp_path / "exact"), dtype="float32")
    merge(adapter, str(tmp_path / "rounded"))
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("exact", "rounded")
    )
    assert all(torch.equal(value.to(torch.bfloat16), rounded[name]) for name, value in exact.items())


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied(tmp_path, tiny, tied):
    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, head_dim=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny[1].save_pretrained(tmp_path / "base")
    merge(an_adapter(tmp_path / "base", tmp_path / "adapter"), str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert torch.equal(model.lm_head.weight, a_base(tmp_path / "base").lm_head.weight)
    ends = an_adapter(tmp_path / "base", tmp_path / "ends", target_modules=["lm_head", "q_proj"])
    if tied:
        with pytest.raises(ValueError, match=r"^RUN_OR_ADAPTER: .*ends changes the embeddings or the head"):
            merge(ends, str(tmp_path / "other"))
    else:
        merge(ends, str(tmp_path / "other"))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
        expected = greedy(attached(a_base(tmp_path / "base"), ends, "base"))[1]
        assert torch.allclose(greedy(model)[1], expected, atol=1e-4)


def taken(tmp_path, tiny):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    return [an_adapter(tiny[0], tmp_path / "adapter"), "out"]


def without_weights(tmp_path, tiny):
    (Path(an_adapter(tiny[0], tmp_path / "adapter")) / "adapter_model.safetensors").unlink()
    return ["adapter", "out"]


def full_run(tmp_path, tiny):
    shutil.copytree(tiny[0], tmp_path / "run/final")
    return ["run", "out"]


def unfinished(tmp_path, tiny):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("seed: 0\n")
    return ["run", "out"]


def base_gone(tmp_path, tiny):
    shutil.copytree(tiny[0], tmp_path / "base")
    an_adapter(tmp_path / "base", tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    return ["adapter", "out"]


def of_another_shape(tmp_path, tiny):
    config = json.loads((Path(tiny[0]) / "config.json").read_text())
    Qwen3ForCausalLM(Qwen3Config(**config | {"intermediate_size": 40})).save_pretrained(tmp_path / "other")
    an_adapter(tiny[0], tmp_path / "adapter")
    return ["adapter", "out", "--base", "other"]


def quantised(tmp_path, tiny):
    shutil.copytree(tiny[0], tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    an_adapter(tiny[0], tmp_path / "adapter")
    return ["adapter", "out", "--base", "other"]


REFUSED = {
    "taken": (taken, "OUT: out exists and is not an empty folder; choose another"),
    "nowhere": (lambda *_: ["nowhere", "out"], "RUN_OR_ADAPTER: nowhere is no folder with adapter_config.json"),
    "no weights": (without_weights, "RUN_OR_ADAPTER: adapter has no adapter_model.safetensors"),
    "full run": (
        full_run,
        "RUN_OR_ADAPTER: run/final is a whole model and no adapter: there is nothing to put",
    ),
    "unfinished": (unfinished, "RUN_OR_ADAPTER: the run run has no final adapter yet; name a checkpoint"),
    "base gone": (base_gone, "which cannot be had; give its place as --base FOLDER_OR_HUB_ID"),
    "no such base": (
        lambda folder, tiny: [an_adapter(tiny[0], folder / "adapter"), "out", "--base", "./nowhere"],
        "--base: there is no folder ./nowhere. Set --base to a model folder",
    ),
    "other shape": (of_another_shape, "RUN_OR_ADAPTER: adapter does not fit other: its layers have other shapes"),
    "quantised": (quantised, "--base: other is stored quantised, and a merge into such weights loses"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_end_in_one_line_and_write_nothing(tiny, tmp_path, monkeypatch, capfd, name):
    made, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    arguments = made(tmp_path, tiny)
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        main(arguments)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert left.value.code == 2 and len(told) == 1 and message in told[0], told
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_told_and_leaves_nothing(tiny, tmp_path, capfd):
    arguments = [an_adapter(tiny[0], tmp_path / "adapter"), str(tmp_path / "out")]
    with limited(resource.RLIMIT_FSIZE, 100_000), pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2 and f"error: OUT: {tmp_path / 'out'} cannot be written (" in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_an_adapter_of_a_quantised_run_is_merged_with_a_note(tiny, tmp_path, capfd):
    an_adapter(tiny[0], tmp_path / "run/final")
    for quantization, noted in (("null", False), ("{load_in_4bit: true}", True)):
        (tmp_path / "run/config.yaml").write_text(f"model: {{quantization: {quantization}}}\n")
        capfd.readouterr()
        merge(str(tmp_path / "run"), str(tmp_path / f"out-{noted}"))
        assert ("note: the adapter was trained on a quantised base" in capfd.readouterr().out) is noted


KILLED = """
import os, signal
from transformers import PreTrainedTokenizerBase
from rltoken.merge import main

PreTrainedTokenizerBase.save_pretrained = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
main({arguments!r})
"""


def test_a_merge_that_is_killed_leaves_no_half_model_and_can_be_repeated(tiny, tmp_path):
    arguments = [an_adapter(tiny[0], tmp_path / "adapter"), str(tmp_path / "out")]
    killed = [sys.executable, "-c", KILLED.format(arguments=arguments)]
    assert subprocess.run(killed, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300).returncode == -9
    assert (tmp_path / ".out.merging/model.safetensors").exists() and not (tmp_path / "out").exists()
    main(arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    told = capsys.readouterr().out
    assert left.value.code == 0 and "RUN_OR_ADAPTER OUT" in told and "--base" in told and "float32" in told
