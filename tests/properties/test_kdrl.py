"""KDRL's loss and advantage: masked tokens, padding and the order of rows never matter; where the gradient flows."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltoken.methods.kdrl import Distillation, distilled_advantage
from rltoken.pipeline import build
from rltoken.signals import rows_of
from rltoken.types import Progress

MASKINGS = ("none", "response", "group")
LOSSES = {
    f"{estimator} {importance} {masking}": Distillation(
        beta=1.0, estimator=estimator, importance=importance, masking=masking, normaliser="kept"
    )
    for estimator, importance, masking in zip(
        ("k2", "k3", "k2", "k3", "k1", "k2", "k3"),
        ("none",) * 2 + ("detached",) * 2 + ("live",) * 3,
        (*MASKINGS, *MASKINGS, "none"),
        strict=True,
    )
}
CREDITS = {
    f"advantage {masking}": functools.partial(distilled_advantage, beta=1.0, masking=masking, normaliser="kept")
    for masking in MASKINGS
}
CASES = [("aux", call) for call in LOSSES.values()] + [("credits", call) for call in CREDITS.values()]
EVERY = pytest.mark.parametrize(("slot", "call"), CASES, ids=[*LOSSES, *CREDITS])
TOKENS = ("logps", "old_logps", "teacher_logps", "ratio", "advantages")
EACH = given(seed=st.integers(0, 10_000))


def window(seed, groups=2, size=3, tokens=6):
    """Random signals, some rows without a trained token, some tokens that the teacher does not know."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size
    lengths = torch.randint(0, tokens + 1, (rows,), generator=generator)

    def normal():
        return torch.randn(rows, tokens, generator=generator)

    known = torch.rand(rows, tokens, generator=generator) < 0.9
    return {
        "mask": (torch.arange(tokens) < lengths[:, None]).long(),
        "group": torch.arange(rows) // size,
        "correct": torch.rand(rows, generator=generator) < 0.3,
        "logps": -normal().abs(),
        "old_logps": -normal().abs(),
        "teacher_logps": (-normal().abs()).masked_fill(~known, torch.nan),
        "ratio": normal().exp(),
        "advantages": normal(),
    }


def result(slot, call, signals):
    """What the stage returns on trained tokens, with what it observes of the window."""
    (stage,) = build({slot: {"s": call}})[slot]
    signals = signals | {"progress": Progress(0, 10)}
    if stage.observer:
        signals[stage.observed] = stage.observer.run(signals).masked_fill(signals["mask"] == 0, 0.0)
    found = stage.run(signals)
    return (found[0] if isinstance(found, tuple) else found) * (signals["mask"] > 0)


@EVERY
@EACH
@settings(max_examples=20, deadline=None)
def test_masked_tokens_never_matter(slot, call, seed):
    signals = window(seed)
    mask = signals["mask"].bool()
    garbage = {name: signals[name].masked_fill(~mask, 1e6) for name in TOKENS}
    assert torch.equal(result(slot, call, signals), result(slot, call, signals | garbage))


@EVERY
@EACH
@settings(max_examples=20, deadline=None)
def test_padding_never_matters(slot, call, seed):
    signals = window(seed)
    padded = {
        name: torch.nn.functional.pad(value, (0, 3)) if value.dim() == 2 else value for name, value in signals.items()
    }
    found = result(slot, call, padded)
    assert torch.equal(found[:, :6], result(slot, call, signals)) and not found[:, 6:].any()


@EVERY
@EACH
@settings(max_examples=20, deadline=None)
def test_permuting_rows_permutes_results(slot, call, seed):
    signals = window(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    shuffled = dict(rows_of(signals, order))
    torch.testing.assert_close(result(slot, call, shuffled), result(slot, call, signals)[order])


@EVERY
@EACH
@settings(max_examples=20, deadline=None)
def test_degenerate_windows_stay_finite(slot, call, seed):
    signals = window(seed)
    nothing = {"mask": torch.zeros_like(signals["mask"])}
    unknown = {"teacher_logps": torch.full_like(signals["logps"], torch.nan)}
    far = {"teacher_logps": torch.full_like(signals["logps"], -1e4)}
    alike = {"teacher_logps": signals["logps"], "old_logps": signals["logps"]}
    everyone = {"correct": torch.ones_like(signals["correct"])}
    nobody = {"correct": torch.zeros_like(signals["correct"])}
    for changes in (nothing, unknown, far, alike, everyone, nobody, nothing | unknown):
        assert result(slot, call, signals | changes).isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@EACH
@settings(max_examples=20, deadline=None)
def test_the_gradient_flows_through_the_policy_on_kept_tokens_only(name, seed):
    """And through the ratio where it is live; not even a masked token that is not a number spoils it."""
    signals = window(seed)
    call = LOSSES[name]
    observed = call.observe(*(signals[key] for key in ("teacher_logps", "mask", "correct", "group")))
    kept = observed > 0
    for key in TOKENS:
        signals[key] = signals[key].masked_fill(signals["mask"] == 0, torch.nan).requires_grad_()
    loss, _ = call(*(signals[key] for key in ("logps", "teacher_logps", "ratio", "mask")), observed, Progress(0, 10))
    loss.sum().backward()
    grad = signals["logps"].grad
    assert grad is not None and not grad[~kept].any() and grad.isfinite().all()
    live = signals["ratio"].grad
    assert (live is not None) == (call.importance == "live")
    assert live is None or (not live[~kept].any() and live.isfinite().all())
    assert signals["teacher_logps"].grad is None
