"""Fingerprints of weights: alike for fused, reordered and padded copies, different for the smallest step."""

import pytest
import torch

from rltoken.rollout import fingerprint


def weights(seed=0, dtype=torch.float32):
    """Two layers with projections of 64 x 64, a head and a norm."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 1) for part in "qkv"]
    return {
        name: (0.02 * torch.randn(64, 64, generator=generator)).to(dtype) for name in [*names, "lm_head.weight"]
    } | {"model.norm.weight": torch.ones(64, dtype=dtype)}


def fused(found):
    """What vLLM makes of them: one projection a layer, a vocabulary padded with zeros, another order."""
    made = {"lm_head.weight": torch.cat([found["lm_head.weight"], torch.zeros(13, 64)])}
    for i in (1, 0):
        parts = [found[f"model.layers.{i}.self_attn.{part}_proj.weight"] for part in "vqk"]
        made[f"model.layers.{i}.self_attn.qkv_proj.weight"] = torch.cat(parts)
    return made | {"model.norm.weight": found["model.norm.weight"]}


def of(found):
    return fingerprint.of_model(found.items())


def test_sums():
    found = of(
        {"layers.3.a": torch.tensor([1.0, -2.0]), "x.layers.3.b": torch.tensor([[4.0]]), "c": torch.tensor([0.5])}
    )
    assert found == {"layer 3": [3.0, 7.0, 21.0], fingerprint.OUTSIDE: [0.5, 0.5, 0.25]}


def test_fused_padded_and_reordered_weights_are_the_same():
    assert fingerprint.difference(of(weights()), of(fused(weights()))) is None


@pytest.mark.parametrize(
    ("name", "part"), [("model.layers.1.self_attn.k_proj.weight", "layer 1"), ("lm_head.weight", fingerprint.OUTSIDE)]
)
@pytest.mark.parametrize("step", [1e-6, 1e-4])
def test_one_tensor_that_is_a_step_behind_is_named(name, part, step):
    ahead, behind = weights(), fused(weights())
    ahead[name] += step * torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).sign()
    assert fingerprint.difference(of(ahead), of(behind)) == part


def test_a_part_that_is_missing_and_a_number_that_is_none_are_differences():
    short = {name: value for name, value in weights().items() if "layers.1" not in name}
    assert fingerprint.difference(of(weights()), of(short)) == "layer 1"
    broken = weights()
    broken["lm_head.weight"][0, 0] = float("nan")
    assert fingerprint.difference(of(broken), of(broken)) == fingerprint.OUTSIDE


def test_rounded_weights_equal_those_that_were_sent_rounded_and_no_others():
    sent = {}
    handed = dict(fingerprint.noted(weights().items(), sent, torch.bfloat16))
    assert all(torch.equal(handed[name], value) for name, value in weights().items()), "handed on as they are"
    rounded = {name: value.to(torch.bfloat16) for name, value in weights().items()}
    assert fingerprint.difference(sent, of(rounded)) is None
    assert fingerprint.difference(of(weights()), of(rounded)) is not None


def test_quantised_weights_have_none():
    assert of(weights() | {"model.layers.0.mlp.weight": torch.zeros(4, dtype=torch.uint8)}) is None


def test_many_chunks(monkeypatch):
    whole = of(weights())
    monkeypatch.setattr(fingerprint, "_CHUNK", 100)
    assert fingerprint.difference(whole, of(weights())) is None
