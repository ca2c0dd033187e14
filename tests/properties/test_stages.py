"""What every stage of the frame must keep: masked tokens never matter, nor does order; all stays finite."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rltoken import ops
from rltoken.methods.entropy_advantage import entropy_advantage
from rltoken.methods.entropy_bonus import entropy_bonus
from rltoken.methods.entropy_covariance import clip_cov, high_covariance
from rltoken.methods.forced_answer import group_centred
from rltoken.methods.forking_tokens import forks, forks_microbatch
from rltoken.methods.gspo_token import gspo_token
from rltoken.methods.gtpo_entropy import own_share, sequence_ratio
from rltoken.methods.length_regularised import length_regularised
from rltoken.ops import group_mean, masked_mean, quantile
from rltoken.pipeline import build
from rltoken.rollout import packs
from rltoken.signals import rows_of

TOKEN_STAGES = {
    "forks": ("weights", forks),
    "forks_microbatch": ("weights", forks_microbatch),
    "gspo_token": ("ratios", gspo_token),
    "entropy_advantage": ("credits", entropy_advantage),
    "entropy_bonus": ("aux", entropy_bonus),
    "high_covariance": ("marks", functools.partial(high_covariance, share=0.2)),
    "clip_cov": ("weights", functools.partial(clip_cov, share=1.0, lower=0.1)),
    "sequence_ratio": ("ratios", sequence_ratio),
    "own_share": ("weights", own_share),
}
ROW_STAGES = {"length_regularised": length_regularised, "group_centred": group_centred}


def window(seed, groups=2, size=3, tokens=5):
    """Random signals of a window with at least one trained token per row."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)

    def normal():
        return torch.randn(rows, tokens, generator=generator)

    return {
        "mask": (torch.arange(tokens) < lengths[:, None]).long(),
        "entropy": normal().abs(),
        "old_entropy": normal().abs(),
        "logps": -normal().abs(),
        "old_logps": -normal().abs(),
        "ratio": normal().exp(),
        "rng": torch.Generator().manual_seed(seed),
        "advantages": normal(),
        "rewards": torch.randint(0, 2, (rows,), generator=generator).float(),
        "thinking_lengths": lengths,
        "group": torch.arange(rows) // size,
    }


def stage(name):
    slot, call = TOKEN_STAGES[name]
    return build({slot: {name: call}})[slot][0]


@pytest.mark.parametrize("name", TOKEN_STAGES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_masked_tokens_never_matter(name, seed):
    signals = window(seed)
    mask = signals["mask"].bool()
    garbage = dict(signals)
    for key in ("entropy", "old_entropy", "logps", "old_logps", "ratio", "advantages"):
        garbage[key] = torch.where(mask, signals[key], torch.full_like(signals[key], 1e6))
    clean, dirty = stage(name).run(signals), stage(name).run(garbage)
    assert torch.equal(clean[mask], dirty[mask])


@pytest.mark.parametrize("name", TOKEN_STAGES)
@given(seed=st.integers(0, 10_000), padding=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_padding_never_matters(name, seed, padding):
    signals = window(seed)
    padded = {
        key: torch.nn.functional.pad(value, (0, padding)) if isinstance(value, Tensor) and value.dim() == 2 else value
        for key, value in signals.items()
    }
    columns = signals["mask"].size(1)
    mask = signals["mask"].bool()
    torch.testing.assert_close(stage(name).run(padded)[:, :columns][mask], stage(name).run(signals)[mask])


@pytest.mark.parametrize("name", [*TOKEN_STAGES, *ROW_STAGES])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_permuting_rows_permutes_results(name, seed):
    signals = window(seed)
    order = torch.randperm(signals["mask"].size(0), generator=torch.Generator().manual_seed(seed))
    shuffled = rows_of(signals, order)
    if name in TOKEN_STAGES:
        run = stage(name).run
    else:
        run = build({"credits": {name: functools.partial(ROW_STAGES[name], **_kinds(name))}})["credits"][0].run
    torch.testing.assert_close(run(shuffled), run(signals)[order])


def _kinds(name):
    return {"kinds": ("thinking",)} if name == "group_centred" else {}


@pytest.mark.parametrize("value", [0.0, 1.0])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_all_equal_rewards_stay_finite(value, seed):
    signals = window(seed)
    rewards = torch.full_like(signals["rewards"], value)
    assert length_regularised(rewards, signals["thinking_lengths"]).isfinite().all()
    assert torch.equal(group_centred(rewards, signals["group"]), torch.zeros_like(rewards))


@given(seed=st.integers(0, 10_000), weight=st.floats(0, 0.99), longest=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_a_shaped_wrong_answer_never_beats_a_correct_one(seed, weight, longest):
    signals = window(seed)
    shaped = length_regularised(signals["rewards"], signals["thinking_lengths"], weight=weight, longest=longest)
    right, wrong = shaped[signals["rewards"] == 1], shaped[signals["rewards"] == 0]
    assert not right.numel() or not wrong.numel() or right.min() > wrong.max()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_entropy_as_a_weight_carries_no_gradient(seed):
    signals = window(seed)
    entropy = signals["entropy"].requires_grad_()
    assert not forks_microbatch(entropy, signals["mask"]).requires_grad
    assert (forks_microbatch(entropy, signals["mask"]) >= 0).all()


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), q=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_sorted_quantile_is_torchs(values, q):
    tensor = torch.tensor(values, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "QUANTILE_LIMIT", 0)
        torch.testing.assert_close(quantile(tensor, q), torch.quantile(tensor, q), rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_reductions_ignore_what_is_masked(seed):
    signals = window(seed)
    mask = signals["mask"]
    values = torch.where(mask.bool(), signals["logps"], torch.full_like(signals["logps"], torch.nan))
    assert masked_mean(values, mask, dim=1).isfinite().all() and masked_mean(values, mask).isfinite()
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        reduced = packs.reduce_loss(values, mask, loss_type, max_length=9, window_tokens=mask.sum())
        clean = packs.reduce_loss(signals["logps"], mask, loss_type, max_length=9, window_tokens=mask.sum())
        assert torch.equal(reduced, clean)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_group_means_are_constant_within_a_group(seed):
    signals = window(seed)
    means = group_mean(signals["rewards"], signals["group"]).view(-1, 3)
    torch.testing.assert_close(means, signals["rewards"].view(-1, 3).mean(1, keepdim=True).expand(-1, 3))


@given(rows=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1), pack_tokens=st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_packs_cover_all_rows_once_and_hold_what_they_may(rows, pack_tokens):
    prompts, completions = map(list, zip(*rows, strict=True))
    inputs = {
        "prompt_mask": (torch.arange(30) >= 30 - torch.tensor(prompts)[:, None]).long(),
        "completion_mask": (torch.arange(60) < torch.tensor(completions)[:, None]).long(),
    }
    inputs |= {"prompt_ids": inputs["prompt_mask"], "completion_ids": inputs["completion_mask"]}
    cuts = packs.boundaries(prompts, completions, pack_tokens)
    assert [i for start, end in cuts for i in range(start, end)] == list(range(len(rows)))
    for start, end in cuts:
        pack = packs.take(inputs, torch.arange(start, end))
        size = pack["prompt_ids"].numel() + pack["completion_ids"].numel()
        assert size <= pack_tokens or end - start == 1
        assert pack["prompt_mask"].sum(1).tolist() == prompts[start:end]
        assert pack["completion_mask"].sum(1).tolist() == completions[start:end]
