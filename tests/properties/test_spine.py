"""SPINE's stages: masked tokens, padding and the order of rows never matter; gradients flow where they should."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltoken.methods.spine import (
    entropy_band,
    masked_kl,
    mixed_groups,
    random_tokens,
    reference_band,
    spine_forks,
)
from rltoken.pipeline import build
from rltoken.signals import rows_of

WEIGHTS = {
    "response": functools.partial(spine_forks, rho=0.4),
    "group": functools.partial(spine_forks, rho=0.4, scope="group"),
    "all": functools.partial(spine_forks, rho=0.4, normaliser="all"),
    "random": functools.partial(random_tokens, rho=0.4),
    "mixed": mixed_groups,
}
LOSSES = {"kl": masked_kl, "live": entropy_band, "frozen": reference_band}
TOKENS = ("old_entropy", "entropy", "ref_entropy", "logps", "ref_logps", "weight")
EACH = given(seed=st.integers(0, 10_000))


def window(seed, groups=2, size=3, tokens=6):
    """Random signals, some rows without a trained token."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size
    lengths = torch.randint(0, tokens + 1, (rows,), generator=generator)

    def normal():
        return torch.randn(rows, tokens, generator=generator)

    return {
        "mask": (torch.arange(tokens) < lengths[:, None]).long(),
        "group": torch.arange(rows) // size,
        "rewards": torch.randint(0, 2, (rows,), generator=generator).float(),
        "old_entropy": normal().abs(),
        "entropy": normal().abs(),
        "ref_entropy": normal().abs(),
        "logps": -normal().abs(),
        "ref_logps": -normal().abs(),
        "weight": torch.randint(0, 3, (rows, tokens), generator=generator).float(),
    }


def result(slot, call, signals, seed=0):
    """What the stage returns, without metrics, on trained tokens; [B] as it is."""
    (stage,) = build({slot: {"s": call}})[slot]
    found = stage.run(signals | {"rng": torch.Generator().manual_seed(seed)})
    found = found[0] if isinstance(found, tuple) else found
    return found * (signals["mask"] > 0) if found.dim() == 2 else found


CASES = [("weights", call) for call in WEIGHTS.values()] + [("aux", call) for call in LOSSES.values()]
EVERY = pytest.mark.parametrize(("slot", "call"), CASES, ids=[*WEIGHTS, *LOSSES])


@EVERY
@EACH
@settings(max_examples=30, deadline=None)
def test_masked_tokens_never_matter(slot, call, seed):
    signals = window(seed)
    mask = signals["mask"].bool()
    garbage = {name: signals[name].masked_fill(~mask, 1e6) for name in TOKENS}
    assert torch.equal(result(slot, call, signals), result(slot, call, signals | garbage))


@EVERY
@EACH
@settings(max_examples=30, deadline=None)
def test_padding_never_matters(slot, call, seed):
    signals = window(seed)
    padded = {
        name: torch.nn.functional.pad(value, (0, 3)) if value.dim() == 2 else value for name, value in signals.items()
    }
    found, expected = result(slot, call, padded), result(slot, call, signals)
    assert torch.equal(found[:, :6] if found.dim() == 2 else found, expected)


@pytest.mark.parametrize(
    ("slot", "call"),
    [case for case in CASES if case[1] is not WEIGHTS["random"]],
    ids=[name for name in [*WEIGHTS, *LOSSES] if name != "random"],
)
@EACH
@settings(max_examples=30, deadline=None)
def test_permuting_rows_permutes_results(slot, call, seed):
    signals = window(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    shuffled = dict(rows_of(signals, order))
    torch.testing.assert_close(result(slot, call, shuffled), result(slot, call, signals)[order])


@EVERY
@EACH
@settings(max_examples=30, deadline=None)
def test_degenerate_windows_stay_finite_and_are_not_negative(slot, call, seed):
    signals = window(seed)
    flat = {name: torch.zeros_like(signals[name]) for name in TOKENS}
    nothing = {"mask": torch.zeros_like(signals["mask"])}
    for changes in (
        flat,
        nothing,
        flat | nothing,
        {"rewards": torch.ones(6)},
        {"rewards": torch.full((6,), torch.nan)},
    ):
        found = result(slot, call, signals | changes)
        assert found.isfinite().all() and (found >= 0).all()


@pytest.mark.parametrize("name", LOSSES)
@EACH
@settings(max_examples=30, deadline=None)
def test_the_gradient_flows_through_the_live_signal_on_kept_tokens_only(name, seed):
    """Not through the weights, the reference or the quantiles, and not even where a masked token is not a number."""
    signals, live = window(seed), "logps" if name == "kl" else "entropy"
    kept = (signals["mask"] > 0) & (signals["weight"] > 0)
    for key in TOKENS:
        signals[key] = signals[key].masked_fill(signals["mask"] == 0, torch.nan).requires_grad_()
    (stage,) = build({"aux": {"s": LOSSES[name]}})["aux"]
    values, _ = stage.run(signals)
    torch.where(kept, values, 0.0).sum().backward()
    grad = signals[live].grad
    assert grad is not None and not grad[~kept].any() and grad.isfinite().all()
    assert all(signals[key].grad is None for key in TOKENS if key != live)


@EACH
@settings(max_examples=30, deadline=None)
def test_the_gradient_of_the_band_is_its_sign(seed):
    """+weight above the band, -weight below it, 0 inside: what the quantiles would add is not there."""
    signals = window(seed)
    entropy = signals["entropy"].clone().requires_grad_()
    loss, _ = entropy_band(entropy, signals["mask"], signals["weight"], coef=1.0)
    loss.sum().backward()
    kept = (signals["mask"] > 0) & (signals["weight"] > 0)
    expected = torch.zeros_like(entropy)
    for row in range(6):
        own = signals["entropy"][row][kept[row]]
        if len(own):
            low, high = own.quantile(0.1), own.quantile(0.5)
            side = (signals["entropy"][row] > high).float() - (signals["entropy"][row] < low).float()
            expected[row] = side * signals["weight"][row] * kept[row]
    torch.testing.assert_close(entropy.grad, expected)
