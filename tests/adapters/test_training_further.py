"""An adapter that is trained further: its reference is the adapter as it was given, also after a resume."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rltoken.adapters import attached
from rltoken.errors import UserError
from tests.adapters.conftest import KINDS, a_base, an_adapter

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


def effective(model):
    """The weights that a model with an adapter computes with."""
    merged = copy.deepcopy(model)
    if "ref" in merged.peft_config:
        merged.delete_adapter("ref")
    return merged.merge_and_unload().state_dict()


def naming_the_reference(seen):
    """A credit stage that changes nothing and keeps the reference's log-probabilities and the policy's old ones."""

    def stage(advantages, ref_logps, old_logps, mask):
        seen.append(((ref_logps * mask).clone(), (old_logps * mask).clone()))
        return advantages

    return {"credits": {"seeing": stage}}


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_reference_is_the_adapter_as_it_was_given(run, tiny, tmp_path, beta):
    seen = []
    result = run(naming_the_reference(seen), adapter=an_adapter(tiny[0], tmp_path / "given"), beta=beta)
    assert torch.allclose(seen[0][0], seen[0][1], atol=1e-5), "before the first step policy and reference are one"
    assert not torch.allclose(seen[-1][0], seen[-1][1], atol=1e-3), "later the policy has moved away from it"
    given = attached(a_base(tiny[0]), tmp_path / "given", tiny[0]).state_dict()
    kept = {name: value for name, value in result.weights.items() if ".ref." in name}
    assert kept and all(torch.equal(value, given[name.replace(".ref.", ".default.")]) for name, value in kept.items())
    assert not [
        name for name, value in result.trainer.model.named_parameters() if ".ref." in name and value.requires_grad
    ]
    if beta:
        assert result.metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and result.metrics[-2]["kl"] > 1e-4


def test_without_a_stage_that_asks_no_reference_is_kept(run, tiny, tmp_path):
    result = run({}, adapter=an_adapter(tiny[0], tmp_path / "given"), max_steps=1)
    assert set(result.trainer.model.peft_config) == {"default"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_weights_of_one_in_one_piece(run, tiny, tmp_path, kind):
    adapter = an_adapter(tiny[0], tmp_path / "given", **KINDS[kind])
    settings = {**SAVED, "beta": 0.1, "adapter": adapter}
    whole = run({}, output_dir=tmp_path / "run", **settings)
    checkpoint = tmp_path / "run/checkpoint-1"
    resumed = run({}, output_dir=tmp_path / "again", resume=str(checkpoint), **settings)
    assert whole.distance(resumed) == 0.0 and resumed.metrics[:-1] == whole.metrics[:-1]
    ours, loaded = (
        effective(whole.trainer.model),
        PeftModel.from_pretrained(a_base(tiny[0]), tmp_path / "run/checkpoint-3"),
    )
    assert all(torch.equal(value, ours[name]) for name, value in effective(loaded).items())
    base = a_base(tiny[0]).state_dict()
    assert all(torch.equal(value, base[name]) for name, value in loaded.unload().state_dict().items())


@pytest.mark.parametrize("given", [False, True], ids=["new", "given"])
def test_a_checkpoint_holds_the_adapter_and_no_model_or_reference(run, tiny, tmp_path, given):
    how = {"adapter": an_adapter(tiny[0], tmp_path / "given")} if given else {"lora": True}
    result = run({}, output_dir=tmp_path / "run", beta=0.1, **SAVED, **how)
    result.trainer.save_model(str(tmp_path / "run/final"))
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md", "training_args.bin"}
    assert {path.name for path in (tmp_path / "run/final").iterdir()} == adapter | tokenizer
    assert not any(".ref." in name for name in load_file(tmp_path / "run/final/adapter_model.safetensors"))
    names = {path.name for path in (tmp_path / "run/checkpoint-3").iterdir()}
    assert names > adapter | tokenizer and not names & {"ref", "model.safetensors", "config.json"}
    assert ("ref" in result.trainer.model.peft_config) is given, "saving takes the reference out for that time only"


def test_what_does_not_fit_its_base_is_refused(tiny, tmp_path):
    def refused(change, **settings):
        base = a_base(tiny[0])
        adapter = an_adapter(tiny[0], tmp_path / "given", **settings)
        change(base)
        with pytest.raises(UserError) as caught:
            attached(base, adapter, "elsewhere")
        return str(caught.value)

    def fewer_layers(base):
        del base.model.layers[-1]

    def wider(base):
        layer = base.model.layers[0].mlp
        layer.up_proj = torch.nn.Linear(layer.up_proj.in_features + 8, layer.up_proj.out_features, bias=False)

    def renamed(base):
        for layer in base.model.layers:
            layer.mlp.other = layer.mlp.up_proj
            del layer.mlp.up_proj

    told = refused(fewer_layers)
    assert told.startswith(f"model.adapter: {tmp_path / 'given'} does not fit elsewhere: it has more layers or fewer. ")
    assert f"It was trained on {tiny[0]}: take that" in told
    assert "its layers have other shapes" in refused(wider)
    assert "does not fit elsewhere: Target modules" in refused(renamed, target_modules=["up_proj"])
