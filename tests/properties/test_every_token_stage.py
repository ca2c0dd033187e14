"""What every mark, bound, weight, ratio and auxiliary loss in conf/ must keep; the stages are those of the folders."""

import functools
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from rltoken.config import register_schemas
from rltoken.pipeline import build
from rltoken.signals import rows_of
from rltoken.types import LIVE, Head, Progress

CONF = Path(__file__).resolve().parents[2] / "conf"
SLOTS = {"mark": "marks", "bounds": "bounds", "weight": "weights", "ratio": "ratios", "aux": "aux"}
STAGES = sorted(f"{path.parent.name}/{path.stem}" for group in SLOTS for path in CONF.glob(f"{group}/*.yaml"))
BESIDE = {"aux/kl_cov": "+mark=high_covariance", "aux/self_reward": "+mark=class_balance"}
SETTINGS = {
    "mark/high_covariance": ("share=0.2",),
    "weight/clip_cov": ("share=1.0", "lower=0.0"),
    "weight/thr": ("p=-0.5",),
    "aux/self_reward": ("reference=-3.0", "scale=1.0"),
}
"""Large enough to do something on these windows; clip_cov leaves out all candidates, so that it draws nothing."""
DRAWN = {"weight/random_tokens", "weight/forks_random"}
"""Draws row by row, so that the order of rows is part of what it draws."""
OF_EQUALS = {"mark/high_covariance"}
"""Takes the first of equal tokens."""
CASES = ("random", "all correct", "all wrong", "one success", "equal entropies", "nothing moved", "no advantage")
ROWS, GROUP, TOKENS, WIDTH, VOCABULARY = 12, 4, 8, 5, 11
GARBAGE = 1e3


@functools.cache
def section(name):
    """The composed `method` of a stage alone."""
    group, _, stage = name.partition("/")
    own = [f"method.{SLOTS[group]}.{stage}.{setting}" for setting in SETTINGS.get(name, ())]
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        beside = [BESIDE[name]] if name in BESIDE else []
        return compose("config", overrides=[f"+{group}={stage}", *beside, *own]).method


def made(name):
    """The stage."""
    (stage,) = build(instantiate(section(name), _convert_="object"))[SLOTS[name.partition("/")[0]]]
    return stage


def run(name, signals):
    """The tensors that the stage makes of a window, after its `observe` has seen it."""
    stage = made(name)
    if stage.observer:
        signals = {**signals, stage.observed: stage.observer.run(signals)}
    found = stage.run({**signals, "rng": torch.Generator().manual_seed(3)})
    found = found if isinstance(found, tuple) else (found,)
    return [torch.as_tensor(value, dtype=torch.double) for value in found if not isinstance(value, dict)]


def window(seed, case="random", fewest=2):
    """Signals in double precision of three groups whose log-probabilities come from a head, as in a real window."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    head, hidden = Head(normal(VOCABULARY, WIDTH), None, 1.0), normal(ROWS, TOKENS, WIDTH)
    logits = (hidden @ head.weight.T).log_softmax(-1)
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    old_logps, old_entropy = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logits.exp() * logits).sum(-1)
    if case == "equal entropies":
        old_entropy = torch.full_like(old_entropy, 0.7)
    logps = old_logps + (0.0 if case == "nothing moved" else 0.3) * normal(ROWS, TOKENS)
    correct = torch.rand(ROWS, generator=generator) < 0.5
    if case in ("all correct", "all wrong"):
        correct = torch.full_like(correct, case == "all correct")
    if case == "one success":
        correct = torch.arange(ROWS) % GROUP == 1
    lengths = torch.randint(fewest, TOKENS + 1, (ROWS, 1), generator=generator)
    return {
        "ids": ids,
        "mask": (torch.arange(TOKENS) < lengths).long(),
        "head": head,
        "old_hidden": hidden,
        "old_logps": old_logps,
        "old_entropy": old_entropy,
        "logps": logps,
        "entropy": old_entropy if case == "equal entropies" else (old_entropy + 0.1 * normal(ROWS, TOKENS)).abs(),
        "ratio": (logps - old_logps).exp(),
        "eps_low": torch.full_like(logps, 0.2),
        "eps_high": torch.full_like(logps, 0.28),
        "weight": (normal(ROWS, TOKENS) > 0).double(),
        "ref_logps": old_logps + 0.1 * normal(ROWS, TOKENS),
        "ref_entropy": (old_entropy + 0.1 * normal(ROWS, TOKENS)).abs(),
        "teacher_logps": old_logps + 0.5 * normal(ROWS, TOKENS),
        "advantages": torch.zeros_like(logps) if case == "no advantage" else normal(ROWS, 1).expand(ROWS, TOKENS),
        "high_covariance": (normal(ROWS, TOKENS) > 0).double(),
        "appended": -3 + normal(ROWS),
        "class_balance": normal(ROWS).abs(),
        "truncated": torch.rand(ROWS, generator=generator) < 0.3,
        "correct": correct,
        "rewards": correct.double(),
        "group": torch.arange(ROWS) // GROUP,
        "progress": Progress(30, 100),
    }


def token_signals(signals):
    """The names of those that have a value per token."""
    return [name for name, value in signals.items() if isinstance(value, Tensor) and value.dim() > 1]


def on_trained(tensors, mask):
    """What of [B], [B, T] or single numbers belongs to trained tokens."""
    return [value[:, : mask.size(1)][mask > 0] if value.dim() == 2 else value for value in tensors]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


EACH = given(seed=st.integers(0, 10_000), case=st.sampled_from(CASES))


@pytest.mark.parametrize("name", STAGES)
@EACH
@settings(max_examples=4, deadline=None)
def test_masked_tokens_and_padding_never_matter(name, seed, case):
    signals = window(seed, case)
    mask, dirty = signals["mask"], dict(signals)
    for key in token_signals(signals):
        kept = (mask > 0).view(ROWS, TOKENS, *[1] * (signals[key].dim() - 2))
        other = 1 if key == "ids" else GARBAGE
        value = signals[key] if key == "mask" else torch.where(kept, signals[key], other).to(signals[key].dtype)
        columns = (0, 0) * (value.dim() - 2)
        dirty[key] = pad(value, (*columns, 0, 3), value=0 if key in ("mask", "ids") else GARBAGE)
    assert_same(on_trained(run(name, dirty), mask), on_trained(run(name, signals), mask))


@pytest.mark.parametrize("name", [name for name in STAGES if name not in DRAWN])
@EACH
@settings(max_examples=4, deadline=None)
def test_the_order_of_rows_does_not_matter(name, seed, case):
    assume(name not in OF_EQUALS or case != "no advantage")
    signals = window(seed, case)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
    found, expected = run(name, rows_of(signals, order)), run(name, signals)
    moved = [value[order] if value.dim() else value for value in expected]
    assert_same(on_trained(found, signals["mask"][order]), on_trained(moved, signals["mask"][order]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", STAGES)
def test_degenerate_windows_stay_finite_and_weights_are_not_negative(name, case):
    for seed in range(3):
        signals = window(seed, case, fewest=1)
        for value in on_trained(run(name, signals), signals["mask"]):
            assert value.isfinite().all() or name == "bounds/unclipped"
            assert not name.startswith(("weight", "bounds", "mark")) or (value >= 0).all()


@pytest.mark.parametrize("name", [name for name in STAGES if not name.startswith("ratio")])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=4, deadline=None)
def test_gradients_flow_through_auxiliary_losses_alone(name, seed):
    """Weights, marks and bounds carry none; a loss has none at masked tokens, nor through weights and ratios."""
    signals, leaves = window(seed), {}
    for key, value in signals.items():
        if key in LIVE:
            leaves[key] = signals[key] = value.clone().requires_grad_()
    tensors = on_trained(run(name, signals), signals["mask"])
    if not name.startswith("aux"):
        assert not any(value.requires_grad for value in tensors)
        return
    grads = torch.autograd.grad(tensors[0].sum(), list(leaves.values()), allow_unused=True)
    flowing = {key: grad for key, grad in zip(leaves, grads, strict=True) if grad is not None and grad.any()}
    assert flowing and flowing.keys() <= {"logps", "entropy", "appended"}
    for grad in flowing.values():
        assert grad.isfinite().all() and (grad.dim() == 1 or not grad[signals["mask"] == 0].any())
