"""Adapters on the command line: trained, trained further, resumed, evaluated, merged, and each refusal."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from rltoken.merge import merge

KEPT = {}
LEARNING = ("+aux=entropy_bonus", "trainer.learning_rate=0.01", "trainer.warmup_steps=0")
"""What moves the weights of a model that gets nothing right."""
OF_TINY = ("model=hf", 'model.forced.ellipsis=""', 'model.forced.header=""')
"""A model of the embedded world by its path: its tokenizer has no words for what other models are forced with."""


@pytest.fixture
def first(cli, tmp_path_factory):
    """The directory of a finished run that trained a new adapter, made once for all tests."""
    if not KEPT:
        found = cli("+lora=rslora", "model.lora.r=4", "name=first", *LEARNING)
        assert found.status == 0, found.err
        KEPT["run"] = tmp_path_factory.mktemp("adapters") / "first"
        shutil.copytree(found.runs / "first", KEPT["run"])
    return KEPT["run"]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


@pytest.mark.smoke
def test_an_adapter_is_trained_further_and_goes_on_after_a_resume(cli, first):
    further = (f"model.adapter={first}", "trainer.beta=0.1", *LEARNING)
    whole = cli(*further, "name=whole")
    assert whole.status == 0, whole.err
    report = json.loads((whole.runs / "whole/report.json").read_text())
    assert report["before"] == json.loads((first / "report.json").read_text())["after"], "it begins as the given one"
    assert OmegaConf.load(whole.runs / "whole/config.yaml").model.adapter == str(first / "final")
    assert not same(first / "final", whole.runs / "whole/final")
    metrics = [json.loads(line) for line in (whole.runs / "whole/metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    shutil.copytree(whole.runs / "whole", whole.runs / "stopped")
    for name in ("checkpoint-2", "final"):
        shutil.rmtree(whole.runs / "stopped" / name)
    (whole.runs / "stopped/report.json").unlink()
    resumed = cli(*further, "name=stopped", "resume=auto")
    assert resumed.status == 0, resumed.err
    assert same(whole.runs / "whole/final", resumed.runs / "stopped/final")
    assert json.loads((resumed.runs / "stopped/report.json").read_text())["after"] == report["after"]


@pytest.mark.smoke
def test_a_stage_may_name_the_reference_of_a_given_adapter(cli, first, tmp_path, monkeypatch):
    (tmp_path / "stage.py").write_text("def credit(advantages, ref_logps):\n    return advantages + ref_logps.mean()\n")
    monkeypatch.syspath_prepend(tmp_path)
    stage = "+method.credits.mine={_target_: stage.credit, _partial_: true}"
    found = cli(f"model.adapter={first}/checkpoint-1", stage)
    assert found.status == 0, found.err


def test_runs_adapters_and_merged_models_evaluate_alike(cli, first, tmp_path):
    report = json.loads((first / "report.json").read_text())
    found = cli.evaluate(f"runs=[{first}]", "out=run")
    assert found.status == 0, found.err
    assert json.loads((found.cwd / "run/metrics.json").read_text())["models"]["first"] == report["after"]
    shutil.copytree(first / "final", tmp_path / "adapter")
    merge(str(first), str(tmp_path / "merged"))
    settings = ("data.eval.n=4", "eval.samples=1", "eval.max_new_tokens=24", "rollout.max_thinking_tokens=16")
    found = cli.evaluate("models=[adapter,merged]", *settings, "out=both")
    assert found.status == 0, found.err
    models = json.loads((found.cwd / "both/metrics.json").read_text())["models"]
    assert models["adapter"] == models["merged"] == report["after"]


def test_the_base_may_have_moved(cli, first, tmp_path, caplog):
    adapter = tmp_path / "adapter"
    shutil.copytree(first / "final", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    shutil.copytree(config["base_model_name_or_path"], tmp_path / "base")
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for found, key in ((cli("model.adapter=adapter"), "model.adapter"), (cli.evaluate("models=[adapter]"), "models")):
        assert found.status == 2 and not found.runs.exists()
        told = f"error: {key}: adapter was trained on {tmp_path / 'gone'}, which cannot be had; put it back"
        assert told in found.err
    found = cli("model.adapter=adapter", "model.path=base", *OF_TINY, "name=moved")
    assert found.status == 0 and "is put on base, which should be a copy of that" in caplog.text, found.err
    config = json.loads((found.runs / "moved/final/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base", "what is trained from here names the base that is there"


def test_model_hf_takes_the_base_that_the_adapter_names(cli, first):
    found = cli(f"model.adapter={first}", *OF_TINY, "name=hf")
    assert found.status == 0, found.err
    base = json.loads((first / "final/adapter_config.json").read_text())["base_model_name_or_path"]
    assert OmegaConf.load(found.runs / "hf/config.yaml").model.path == base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("+lora=default", "model.adapter={run}"), "model.lora: model.adapter is trained further as it is; leave out"),
        (("model.adapter=nowhere",), "model.adapter: nowhere is no folder with adapter_config.json"),
        (("model.adapter={base}",), "is a whole model and no adapter: there is nothing to put on a base"),
        (("model=hf", "model.path={run}/final"), "final is an adapter; set model.adapter={run}/final to train it"),
        (("+lora=qlora",), "model.quantization: it needs a GPU, and trainer.use_cpu is true; set model.quantization"),
        (("model.quantization={{load_in_4bit: true}}",), "quantised weights cannot be trained, an adapter on them can"),
        (("+lora=qlora", "+model.quantization.load_in_2bit=true"), "model.quantization.load_in_2bit: transformers."),
    ],
)
def test_mistakes_end_in_one_line(cli, first, arguments, message):
    base = json.loads((first / "final/adapter_config.json").read_text())["base_model_name_or_path"]
    found = cli(*(argument.format(run=first, base=base) for argument in arguments))
    assert found.status == 2 and message.format(run=first) in found.err, found.err
    assert len(found.err.strip().splitlines()) == 1 and not list(found.runs.glob("*"))


@pytest.mark.parametrize(
    ("cuda", "bitsandbytes", "message"),
    [
        (False, True, "it needs a GPU, and this machine has none"),
        (True, False, "bitsandbytes is not installed; run: pip"),
    ],
)
def test_the_machine_must_have_what_quantisation_needs(cuda, bitsandbytes, message, monkeypatch):
    from rltoken import adapters

    cfg = OmegaConf.create({"model": {"quantization": {"load_in_4bit": True}}, "trainer": {"use_cpu": False}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: bitsandbytes or None)
    with pytest.raises(ValueError, match=rf"^model\.quantization: {message}"):
        adapters.check_quantization(cfg)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: True)
    adapters.check_quantization(cfg)
