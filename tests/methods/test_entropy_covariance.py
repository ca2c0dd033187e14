"""Clip-Cov and KL-Cov: literal numbers, gradients and settings."""

import pytest
import torch

from rltoken.methods.entropy_covariance import clip_cov, covariance, high_covariance, kl_cov, number, unclipped
from tests.methods.configured import assert_refused
from tests.methods.worked import assert_close

ADVANTAGES = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]])
OLD_LOGPS = torch.tensor([[-0.5, -1.0, -1.5, -1.0], [-1.0, -0.5, -4.5, -2.0]])
MASK = torch.ones(2, 4, dtype=torch.long)


def rng():
    return torch.Generator().manual_seed(0)


def test_covariance_by_hand():
    """The mean advantage is 0, the mean log-probability -12 / 8 = -1.5."""
    assert_close(covariance(ADVANTAGES, OLD_LOGPS, MASK), [[1.0, 0.5, 0.0, 0.5], [-0.5, -1.0, 3.0, 0.5]])
    # without the last token: means 1/7 and -10/7
    cut = MASK.clone()
    cut[1, 3] = 0
    assert_close(covariance(ADVANTAGES, OLD_LOGPS, cut)[1, 2], (-8 / 7) * (-4.5 + 10 / 7))


def test_kl_cov_selects_and_penalises():
    """The specification gives the results only: token 6, loss -.183194. Its ratio was solved for from that."""
    marked = high_covariance(ADVANTAGES, OLD_LOGPS, MASK, share=0.125)
    assert marked.flatten().tolist() == [0, 0, 0, 0, 0, 0, 1, 0]
    ratio = torch.tensor([[1.1, 1.0, 1.4, 1.0], [0.9, 0.5, 0.759965, 0.6]])
    penalty = kl_cov(OLD_LOGPS + ratio.log(), OLD_LOGPS, marked)
    assert_close(penalty[1, 2], 0.274483)
    assert int((penalty != 0).sum()) == 1
    assert_close((-ADVANTAGES * ratio + penalty).mean(), -0.183194)
    assert_close(kl_cov(OLD_LOGPS + ratio.log(), OLD_LOGPS, marked, beta=0.5)[1, 2], 0.274483 / 2)


def test_kl_cov_has_no_gradient_where_nothing_moved():
    logps = OLD_LOGPS.clone().requires_grad_()
    kl_cov(logps, OLD_LOGPS, torch.ones_like(OLD_LOGPS)).sum().backward()
    assert logps.grad.abs().max() == 0


def test_kl_cov_takes_rounding_for_nothing():
    logps = torch.tensor([[1e-6, -1e-6, 1e-3, -1e-3]], requires_grad=True)
    kl_cov(logps, torch.zeros(1, 4), torch.ones(1, 4), beta=2.0).sum().backward()
    assert logps.grad.tolist() == [[0.0, 0.0, 2.0, -2.0]]


def test_clip_cov_leaves_out_a_candidate():
    """Of covariances 1, .5, 0, .5, -.5, -1, 3, .5 one lies between .75 and 2; -.0475 is the specification's."""
    weights = clip_cov(ADVANTAGES, OLD_LOGPS, MASK, rng(), share=0.125, lower=0.75, upper=2.0)
    assert weights.flatten().tolist() == [0, 1, 1, 1, 1, 1, 1, 1]
    ratio = torch.tensor([[1.7, 0.9, 1.2, 1.0], [1.0, 0.52, 0.2, 1.0]])
    assert_close((-ADVANTAGES * ratio * weights).mean(), -0.0475)


def test_the_bounds_of_clip_cov_are_not_between_them():
    """Of the covariances three are .5 and one is 1."""
    assert clip_cov(ADVANTAGES, OLD_LOGPS, MASK, rng(), share=1.0, lower=0.5, upper=1.0).min() == 1


def test_clip_cov_draws_no_more_than_its_share():
    between = {"lower": 0.25, "upper": 5.0}  # five candidates
    for share, dropped in ((0.0, 0), (2e-4, 1), (0.25, 2), (0.5, 4), (1.0, 5)):
        weights = clip_cov(ADVANTAGES, OLD_LOGPS, MASK, rng(), share=share, **between)
        assert int((weights == 0).sum()) == dropped
    drawn = {
        tuple(clip_cov(ADVANTAGES, OLD_LOGPS, MASK, torch.Generator().manual_seed(seed), **between).flatten().tolist())
        for seed in range(40)
    }
    assert len(drawn) == 5, "each candidate is drawn by some seed"


def test_shares_of_nothing():
    assert [number(share, MASK) for share in (0.0, 1e-9, 0.25, 1.0)] == [0, 1, 2, 8]
    assert number(0.5, torch.zeros(2, 2)) == 0
    assert high_covariance(ADVANTAGES, OLD_LOGPS, MASK, share=0.0).sum() == 0
    assert clip_cov(ADVANTAGES, OLD_LOGPS, MASK * 0, rng()).min() == 1


def test_no_ratio_leaves_the_bounds():
    low, high = unclipped()
    assert torch.tensor([1e-30, 1.0, 1e30]).clamp(1 - low, 1 + high).tolist() == pytest.approx([1e-30, 1.0, 1e30])


@pytest.mark.parametrize(
    ("choice", "setting"),
    [
        ("+weight=clip_cov", "method.weights.clip_cov.share=1.5"),
        ("+weight=clip_cov", "method.weights.clip_cov.share=-0.1"),
        ("+weight=clip_cov", "method.weights.clip_cov.upper=.inf"),
        ("+mark=high_covariance", "method.marks.high_covariance.share=many"),
        ("+exp=kl_cov", "method.aux.kl_cov.beta=-1"),
    ],
)
def test_settings_out_of_range_are_refused(choice, setting):
    assert_refused(choice, setting)
