"""KDRL: the worked example, what the gradient of each estimator is, and the settings that are refused."""

import functools
import itertools
import math

import pytest
import torch

from rltoken.errors import UserError
from rltoken.methods.kdrl import Distillation, coefficient, distilled_advantage, divergence, token_weights
from rltoken.pipeline import build
from rltoken.types import Progress
from tests.methods.configured import sections

R = torch.tensor([[-0.2, 0.6, 0.0], [-0.1, 2.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
LOGPS = torch.full_like(R, -1.0)
TEACHER = LOGPS + R
CORRECT = torch.tensor([True, False])
GROUP = torch.tensor([0, 0])
START = Progress(0, 100)
GOLDEN = {  # of the five tokens, and their mean
    "k1": ([[0.2, -0.6, 0.0], [0.1, -2.0]], -0.46),
    "k2": ([[0.02, 0.18, 0.0], [0.005, 2.0]], 0.441),
    "k3": ([[0.018731, 0.222119, 0.0], [0.004837, 4.389056]], 0.926949),
}


def assert_close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=0, atol=tolerance)


def loss_of(stage, logps=LOGPS, teacher=TEACHER, mask=MASK, ratio=None, progress=START):
    """The stage's loss and metrics of the worked example's window, seen once."""
    observed = stage.observe(teacher, mask, CORRECT, GROUP)
    return stage(logps, teacher, torch.ones_like(logps) if ratio is None else ratio, mask, observed, progress)


@pytest.mark.parametrize("estimator", GOLDEN)
def test_the_worked_example(estimator):
    (first, second), mean = GOLDEN[estimator]
    loss, metrics = loss_of(Distillation(beta=1.0, estimator=estimator, importance="live"))
    assert_close(loss[0], first)
    assert_close(loss[1], [*second, 0.0])
    assert_close(loss.sum() / MASK.sum(), mean)
    assert metrics == pytest.approx({"kdrl/beta": 1.0, "kdrl/kept": 1.0, "kdrl/reverse_kl": -0.46})


@pytest.mark.parametrize(
    ("masking", "normaliser", "expected"),
    [
        ("none", "all", 0.441),
        ("none", "kept", 0.441),
        ("response", "kept", 1.0025),
        ("response", "all", 0.401),
        ("group", "kept", 0.0),
        ("group", "all", 0.0),
    ],
)
def test_reward_guided_masks_with_both_normalisers(masking, normaliser, expected):
    """The second response is wrong, and its group has a correct one; the loss is divided by all five tokens."""
    loss, metrics = loss_of(Distillation(beta=1.0, masking=masking, normaliser=normaliser))
    assert_close(loss.sum() / 5, expected)
    assert metrics["kdrl/kept"] == pytest.approx({"none": 1.0, "response": 0.4, "group": 0.0}[masking])
    assert ("kdrl/reverse_kl" in metrics) == (masking != "group")


def test_a_group_without_a_correct_response_is_distilled_whole():
    group = torch.tensor([0, 0, 1, 1])
    correct = torch.tensor([True, False, False, False])
    weights = token_weights(torch.zeros(4, 2), torch.ones(4, 2), correct, group, "group", "kept")
    assert weights.tolist() == [[0, 0], [0, 0], [2, 2], [2, 2]]


@pytest.mark.parametrize(("step", "expected"), [(0, 0.005), (40, 0.003), (80, 0.001), (200, 0.001)])
def test_the_coefficient_falls_to_its_floor(step, expected):
    settings = {"beta": 0.005, "delta": 5e-5, "beta_min": 0.001}
    assert coefficient(step, **settings) == pytest.approx(expected)
    loss, metrics = loss_of(Distillation(**settings), progress=Progress(step, 280))
    assert_close(loss[1, 1], 2 * expected)
    assert metrics["kdrl/beta"] == pytest.approx(expected)
    nothing = torch.zeros_like(R)
    found = distilled_advantage(nothing, LOGPS, TEACHER, MASK, CORRECT, GROUP, Progress(step, 280), **settings)
    assert_close(found, (expected * R).tolist())


def test_the_advantage_gains_the_log_ratio():
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    found = functools.partial(distilled_advantage, advantages, LOGPS, TEACHER, MASK, CORRECT, GROUP, START, beta=0.5)
    assert_close(found(), [[0.9, 1.3, 1.0], [-1.05, 0.0, -1.0]])
    assert_close(found(masking="response"), [[1.0, 1.0, 1.0], [-1.05, 0.0, -1.0]])
    assert_close(found(masking="response", normaliser="kept"), [[1.0, 1.0, 1.0], [-1.125, 1.5, -1.0]])
    assert_close(found(clip=0.4), [[0.9, 1.2, 1.0], [-1.05, -0.8, -1.0]])
    assert_close(found(clip=0.15), [[0.925, 1.075, 1.0], [-1.05, -0.925, -1.0]])


@pytest.mark.parametrize("unknown", [math.nan, -math.inf])
def test_tokens_that_the_teacher_does_not_know_are_left_out(unknown):
    teacher = TEACHER.clone()
    teacher[1, 1] = unknown
    logps = LOGPS.clone().requires_grad_()
    loss, metrics = loss_of(Distillation(beta=1.0, normaliser="kept"), logps, teacher)
    assert_close(loss, [[0.025, 0.225, 0.0], [0.00625, 0.0, 0.0]])
    loss.sum().backward()
    assert_close(logps.grad, [[0.25, -0.75, 0.0], [0.125, 0.0, 0.0]])
    assert metrics["kdrl/kept"] == pytest.approx(0.8)
    found = distilled_advantage(torch.zeros_like(R), LOGPS, teacher, MASK, CORRECT, GROUP, START, beta=1.0)
    assert_close(found, [[-0.2, 0.6, 0.0], [-0.1, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("estimator", "far", "slopes"),
    [("k1", [3.0, -3.0], [-1, -1]), ("k2", [4.0, 4.0], [-2, 2]), ("k3", None, [math.exp(-2) - 1, math.exp(2) - 1])],
)
def test_beyond_the_clip_the_loss_is_a_straight_line(estimator, far, slopes):
    """Of -3 and 3 with a clip of 2: k2 is 2 + 2 * 1; the slope stays that at -2 and 2."""
    log_ratio = torch.tensor([-3.0, 3.0], dtype=torch.float64, requires_grad=True)
    value = divergence(log_ratio, estimator, clip=2.0)
    if far:
        assert_close(value.detach(), far)
    value.sum().backward()
    assert_close(log_ratio.grad, slopes)


# What each estimator's gradient is, in expectation, by enumeration of a vocabulary of five

LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.0, -0.4], dtype=torch.float64)
OLD = torch.tensor([0.1, -0.7, 0.5, 0.6, -0.9], dtype=torch.float64).log_softmax(0)
OTHER = torch.tensor([-0.5, 0.4, 1.1, -0.2, 0.7], dtype=torch.float64).log_softmax(0)


def reverse_kl(logps):
    return (logps.exp() * (logps - OTHER)).sum()


def forward_kl(logps):
    return (OTHER.exp() * (OTHER - logps)).sum()


def gradient(objective):
    """Of a number made of the policy's log-probabilities [V], by its logits."""
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(objective(logits.log_softmax(0)), logits)[0]


def expected_loss(logps, sampled, **settings):
    """The stage's loss in expectation over a token of the policy that sampled: five rows of one token each."""
    rows = logps.unsqueeze(1)
    stage = Distillation(beta=1.0, **settings)
    mask = torch.ones(5, 1, dtype=torch.long)
    observed = torch.ones(5, 1, dtype=torch.float64)
    ratio = (rows - sampled.unsqueeze(1)).exp()
    loss, _ = stage(rows, OTHER.unsqueeze(1), ratio, mask, observed, START)
    return (sampled.exp() * loss.squeeze(1)).sum()


def bias_of_live_k2(logps):
    """E[w R^2 / 2 s]: what differentiating the weight adds to k2."""
    return (logps.exp() * (OTHER - logps).detach().square() / 2).sum()


MEANS = {
    ("k2", "none"): reverse_kl,
    ("k3", "none"): forward_kl,
    ("k2", "detached"): reverse_kl,
    ("k3", "detached"): forward_kl,
    ("k1", "live"): reverse_kl,
    ("k2", "live"): lambda logps: reverse_kl(logps) + bias_of_live_k2(logps),
    ("k3", "live"): reverse_kl,
}


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize(("estimator", "importance"), MEANS)
def test_what_each_gradient_is(estimator, importance, off_policy):
    sampled = OLD if off_policy else LOGITS.log_softmax(0)
    found = gradient(lambda logps: expected_loss(logps, sampled, estimator=estimator, importance=importance))
    expected = gradient(MEANS[estimator, importance])
    if importance == "none" and off_policy:
        assert (found - expected).abs().max() > 1e-3, "without the weight it holds on-policy only"
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_k1_without_a_live_weight_teaches_nothing():
    """Which is why it is refused: in expectation its gradient is that of a constant."""

    def expected(logps):
        return (sampled.exp() * divergence(OTHER - logps, "k1", clip=10.0) * weight(logps)).sum()

    sampled, weight = LOGITS.log_softmax(0), torch.ones_like
    torch.testing.assert_close(gradient(expected), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    sampled, weight = OLD, lambda logps: (logps - OLD).exp().detach()
    torch.testing.assert_close(gradient(expected), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_two_divergences_and_the_bias_can_be_told_apart():
    gradients = [gradient(objective) for objective in (reverse_kl, forward_kl, MEANS["k2", "live"])]
    for one, other in itertools.combinations([*gradients, torch.zeros(5)], 2):
        assert (one - other).abs().max() > 1e-2


def test_the_advantage_has_the_gradient_of_k2_on_policy():
    """TRL's surrogate, not clipped at a ratio of 1, in expectation over a token of the policy."""

    sampled = LOGITS.log_softmax(0)

    def surrogate(logps):
        rows = sampled.unsqueeze(1)
        mask, correct = torch.ones(5, 1), torch.zeros(5, dtype=torch.bool)
        advantages = distilled_advantage(
            torch.zeros_like(rows), rows, OTHER.unsqueeze(1), mask, correct, torch.arange(5), START, beta=1.0
        )
        return -(sampled.exp() * (logps - sampled).exp() * advantages.squeeze(1)).sum()

    torch.testing.assert_close(gradient(surrogate), gradient(reverse_kl), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("slot", "settings", "message"),
    [
        ("aux", {"beta": -1.0}, r"beta: -1\.0"),
        ("aux", {"beta": 0.1, "beta_min": 0.2}, r"beta_min: 0\.2 is not possible; .* from 0 and up to 0\.1"),
        ("aux", {"estimator": "k4"}, r"estimator: there is no 'k4'"),
        ("aux", {"importance": "all"}, r"importance: there is no 'all'"),
        ("aux", {"estimator": "k1"}, r"importance: detached leaves k1 without a gradient .*; set it to live"),
        ("aux", {"estimator": "k1", "importance": "none"}, r"importance: none leaves k1 without a gradient"),
        ("aux", {"clip": 0.0}, r"clip: 0\.0"),
        ("credits", {"delta": -1.0}, r"delta: -1\.0"),
        ("credits", {"masking": "token"}, r"masking: there is no 'token'"),
        ("credits", {"normaliser": "mean"}, r"normaliser: there is no 'mean'"),
    ],
)
def test_settings_out_of_range_are_refused(slot, settings, message):
    with pytest.raises((UserError, ValueError), match=message):
        build(
            {
                slot: {
                    "s": Distillation(**settings)
                    if slot == "aux"
                    else functools.partial(distilled_advantage, **settings)
                }
            }
        )


def test_distillation_is_kdrl_without_rewards():
    kdrl, control = sections("kdrl"), sections("kdrl/distillation")
    assert control["trainer"].pop("reward_weights") == [0.0] and kdrl["trainer"].pop("reward_weights") is None
    assert control == kdrl
