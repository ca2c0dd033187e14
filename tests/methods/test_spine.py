"""SPINE: the worked example, both normalisers, what each term is at the edge of its definition."""

import functools
import math

import pytest
import torch

from rltoken.errors import UserError
from rltoken.methods.spine import (
    band_loss,
    band_thresholds,
    entropy_band,
    masked_kl,
    mixed_groups,
    random_tokens,
    reference_band,
    spine_forks,
)
from rltoken.pipeline import build

ENTROPY = torch.tensor([[0.1, 0.9, 0.2, 2.0, 0.3, 0.6, 0.15, 1.2, 0.05, 1.6]], dtype=torch.float64)
MASK = torch.ones(1, 10, dtype=torch.long)
ONE = torch.zeros(1, dtype=torch.long)
FORKS = [[0, 1, 0, 1, 0, 1, 0, 1, 0, 1]]


def assert_close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-6, atol=1e-9)


def test_half_of_ten_tokens_are_forks():
    assert_close(spine_forks(ENTROPY, MASK, ONE, rho=0.5, normaliser="all"), [[float(m) for m in FORKS[0]]])
    assert_close(spine_forks(ENTROPY, MASK, ONE, rho=0.5), [[2.0 * m for m in FORKS[0]]])


def test_the_band_of_the_worked_example():
    """Forks .6 .9 1.2 1.6 2.0: lo = .6 + .4 * .3, hi the median; .12 below it, .4 + .8 above it, five forks."""
    entropy = ENTROPY.clone().requires_grad_()
    forks = torch.tensor(FORKS).bool()
    thresholds = band_thresholds(entropy.detach(), forks, 0.1, 0.5)
    assert_close(torch.cat(thresholds), [[0.72], [1.2]])
    loss = band_loss(entropy, forks, thresholds, above=1.0, below=1.0).sum() / 5
    assert_close(loss, 0.264)
    loss.backward()
    assert_close(entropy.grad, [[0, 0, 0, 0.2, 0, -0.2, 0, 0, 0, 0.2]])


@pytest.mark.parametrize(("normaliser", "core", "band"), [("forks", -1.03, 0.264), ("all", -0.515, 0.132)])
def test_both_normalisers(normaliser, core, band):
    """Ratios at the forks have the mean 1.03, the advantage is 1; the divisor of the loss is that of all ten tokens."""
    weight = spine_forks(ENTROPY, MASK, ONE, rho=0.5, normaliser=normaliser)
    ratio = torch.full_like(ENTROPY, 7.0)
    ratio[0, 1::2] = torch.tensor([1.0, 1.1, 0.95, 1.05, 1.05], dtype=torch.float64)
    assert_close(-(weight * ratio).sum() / 10, core)
    loss, metrics = entropy_band(ENTROPY, MASK, weight, coef=1.0)
    assert_close(loss.sum() / 10, band)
    assert metrics == pytest.approx({"spine/fork_entropy": 1.26, "spine/above": 0.4, "spine/below": 0.2})


def test_the_sides_of_the_band_have_their_weights():
    weight = spine_forks(ENTROPY, MASK, ONE, rho=0.5, normaliser="all")
    assert_close(entropy_band(ENTROPY, MASK, weight, coef=1.0, above=0.0)[0].sum(), 0.12)
    assert_close(entropy_band(ENTROPY, MASK, weight, coef=0.5, below=0.0)[0].sum(), 0.6)


def test_frozen_thresholds_are_those_of_the_reference():
    """The reference has half of every entropy: the band is .36 to .6, and every fork but that of .6 lies above it."""
    weight = spine_forks(ENTROPY, MASK, ONE, rho=0.5, normaliser="all")
    loss, metrics = reference_band(ENTROPY, ENTROPY / 2, MASK, weight, coef=1.0)
    assert_close(loss[0, 1::2], [0.3, 1.4, 0.0, 0.6, 1.0])
    assert metrics["spine/above"] == pytest.approx(0.8) and metrics["spine/below"] == 0.0
    satisfied, _ = reference_band(ENTROPY, ENTROPY, MASK, weight, coef=1.0, low=0.0, high=1.0)
    assert not satisfied.any()


def test_a_fifth_of_each_response_or_of_the_group():
    """Seven and three tokens: 1.4 rounds to one, .6 to one; of all ten two, both in the first response."""
    entropy = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.4], [0.3, 0.1, 0.2, 9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    group = torch.tensor([3, 3])
    response = spine_forks(entropy, mask, group, normaliser="all")
    assert response.nonzero().tolist() == [[0, 0], [1, 0]]
    together = spine_forks(entropy, mask, group, scope="group", normaliser="all")
    assert together.nonzero().tolist() == [[0, 0], [0, 1]]
    assert spine_forks(entropy, mask, torch.tensor([3, 4]), scope="group").tolist() == (5 * response).tolist()


def test_a_share_is_rounded_to_the_nearest_number_and_halves_to_even():
    """A fifth of 8 is 1.6, hence two; a quarter of 10 is 2.5, hence two."""
    for rho, tokens, forks in ((0.2, 8, 2), (0.25, 10, 2)):
        assert int(spine_forks(ENTROPY[:, :tokens], MASK[:, :tokens], ONE, rho=rho, normaliser="all").sum()) == forks


def test_random_tokens_are_as_many_and_uniform():
    mask = torch.tensor([[1] * 10, [1] * 3 + [0] * 7, [1] + [0] * 9, [0] * 10])
    rng = torch.Generator().manual_seed(0)
    draws = torch.stack([random_tokens(mask, rng, normaliser="all") for _ in range(2000)])
    assert draws.sum(2).unique(dim=0).tolist() == [[2, 1, 1, 0]]
    # of ten tokens each is one of two in a fifth of the draws; the standard error is .009
    torch.testing.assert_close(draws[:, 0].mean(0), torch.full((10,), 0.2), rtol=0, atol=0.04)
    torch.testing.assert_close(draws[:, 1, :3].mean(0), torch.full((3,), 1 / 3), rtol=0, atol=0.05)


def test_random_tokens_are_scaled_to_a_mean_over_them():
    kept = random_tokens(MASK, torch.Generator().manual_seed(0), rho=0.2)
    assert sorted(kept[0].tolist()) == [0] * 8 + [5, 5]


def test_groups_of_one_mind_are_skipped():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, math.nan, 1.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert mixed_groups(rewards, group).tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


def test_the_kl_of_kept_tokens():
    """k3 of a log-ratio of ln 2 is 2 - ln 2 - 1 = .306853, its derivative by the log-probability 1 - 2."""
    logps = torch.tensor([[-1.0, -1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    ref_logps = torch.full((1, 3), -1.0 + math.log(2), dtype=torch.float64)
    weight = torch.tensor([[3.0, 0.0, 1.0]], dtype=torch.float64)
    loss, metrics = masked_kl(logps, ref_logps, torch.tensor([[1, 1, 0]]), weight, coef=0.5)
    assert_close(loss, [[1.5 * 0.30685281944, 0.0, 0.0]])
    assert metrics["spine/kl"] == pytest.approx(0.30685281944)
    loss.sum().backward()
    assert_close(logps.grad, [[-1.5, 0.0, 0.0]])


def test_without_a_fork_there_is_nothing_to_log():
    nothing = torch.zeros_like(ENTROPY)
    loss, metrics = entropy_band(ENTROPY, MASK, nothing)
    assert not loss.any() and metrics == {}


@pytest.mark.parametrize(
    ("slot", "stage", "settings", "message"),
    [
        ("weights", spine_forks, {"rho": 0.0}, r"method\.weights\.s\.rho: 0\.0"),
        ("weights", spine_forks, {"scope": "window"}, r"method\.weights\.s\.scope: there is no 'window'"),
        ("aux", entropy_band, {"low": 0.6}, r"method\.aux\.s\.high: 0\.5 is not possible; .* from 0\.6"),
        ("aux", entropy_band, {"high": 1.1}, r"method\.aux\.s\.high: 1\.1"),
        ("aux", reference_band, {"coef": -1.0}, r"method\.aux\.s\.coef: -1\.0"),
        ("aux", masked_kl, {"coef": -1.0}, r"method\.aux\.s\.coef: -1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(slot, stage, settings, message):
    with pytest.raises(UserError, match=message):
        build({slot: {"s": functools.partial(stage, **settings)}})
