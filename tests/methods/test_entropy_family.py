"""Clip-Cov, KL-Cov, GTPO and GRPO-S: literal numbers, gradients, and what is refused."""

import functools

import pytest
import torch

from rltoken.errors import UserError
from rltoken.methods.entropy_covariance import clip_cov, covariance, high_covariance, kl_cov, number, unclipped
from rltoken.methods.gtpo_entropy import by_entropy, grpo_s, gtpo, normalised, own_share, sequence_ratio
from rltoken.ops import group_sum
from rltoken.pipeline import build

ADVANTAGES = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]])
OLD_LOGPS = torch.tensor([[-0.5, -1.0, -1.5, -1.0], [-1.0, -0.5, -4.5, -2.0]])
MASK = torch.ones(2, 4, dtype=torch.long)
NAN = torch.nan


def assert_close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-5, atol=2e-6)


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


CORRECT, GROUP = torch.tensor([True, True, False]), torch.tensor([3, 3, 3])
ENTROPY = torch.tensor([[0.38, 1.52, 0.3], [1.52, 0.38, 9.0], [0.7, 0.2, 9.0]])
ALIVE = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]])
PAPER = {"base": 1.0, "bonus": 0.1}


def test_gtpo_token_rewards():
    """Entropies 1 to 4 at both first positions: 1 + .1 * 2 * .2 and .8. They were solved for from the results."""
    shaped = by_entropy(CORRECT.float(), CORRECT, ENTROPY, ALIVE > 0, GROUP, **PAPER)
    assert_close(shaped[0], [1.04, 1.16, 1.1])
    assert_close(shaped[1, :2], [1.16, 1.04])
    assert_close(shaped[2, :2], [-1.1, -1.1])


def test_gtpo_punishes_certain_tokens_of_wrong_responses_more():
    """Entropies .2 and .6: 1 / H is 5 and 1.67, so that the parts are 1.5 and .5 of the mean."""
    entropy, wrong = torch.tensor([[0.2], [0.6]]), torch.tensor([False, False])
    shaped = by_entropy(wrong.float(), wrong, entropy, torch.ones(2, 1) > 0, GROUP[:2], **PAPER)
    assert_close(shaped, [[-1.15], [-1.05]])


def test_grpo_s_rewards():
    """Mean entropies 2.2 / 3 and .95; the specification's numbers."""
    mean = torch.tensor([[2.2 / 3], [0.95], [0.45]])
    shaped = by_entropy(CORRECT.float(), CORRECT, mean, torch.ones(3, 1) > 0, GROUP, **PAPER)
    assert_close(shaped, [[1.087129], [1.112871], [-1.1]])


def test_gtpo_in_one_pool_and_in_two():
    rewards = CORRECT.float()
    one = gtpo(rewards, CORRECT, ENTROPY, ALIVE, GROUP)
    # 1.04, 1.16, 1.1, 1.16, 1.04, -1.1, -1.1: mean 3.3 / 7, unbiased variance 6.928686 / 6, so std 1.074607
    assert_close(one[0], [0.528999, 0.640647, 0.584823])
    assert_close(one[2, :2], [-1.462058, -1.462058])
    assert one[1, 2] == one[2, 2] == 0
    two = gtpo(rewards, CORRECT, ENTROPY, ALIVE, GROUP, pools="by_outcome")
    # correct ones alone: mean 1.1, deviations of .06 on four of five, so std .06; and a single wrong one has none
    assert_close(two[0], [-0.06 / 0.0602, 0.06 / 0.0602, 0.0])
    assert two[2].abs().max() == 0


def test_grpo_s_advantages():
    """Of 1.087129, 1.112871 and -1.1 the mean is .366667 and the unbiased deviation 1.270236."""
    assert_close(grpo_s(CORRECT.float(), CORRECT, ENTROPY, ALIVE, GROUP), [0.567103, 0.587365, -1.154468])


def test_without_a_bonus_they_are_grpo():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    group, entropy = torch.arange(8) // 4, torch.rand(8, 5, generator=rng())
    grouped = rewards.view(2, 4)
    expected = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    settings = rewards, rewards > 0, entropy, torch.ones(8, 5), group
    torch.testing.assert_close(grpo_s(*settings, bonus=0.0), expected)
    # the pool of tokens has more degrees of freedom: 20 - 1 of 20 against 4 - 1 of 4
    tokens = gtpo(*settings, bonus=0.0)
    torch.testing.assert_close(tokens, (expected * (0.75 / 0.95) ** -0.5).unsqueeze(1).expand(8, 5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_flat_group_trains_nothing(value):
    rewards = torch.tensor([value, value, value])
    for credit in (gtpo, grpo_s):
        assert credit(rewards, rewards > 0, ENTROPY, ALIVE, GROUP).abs().max() == 0


def test_ungraded_rows_count_nowhere():
    rewards = torch.tensor([1.0, 1.0, 0.0, NAN])
    more = [rewards, rewards > 0, torch.cat([ENTROPY, ENTROPY[:1]]), torch.cat([ALIVE, ALIVE[:1]]), GROUP[:1].expand(4)]
    for credit in (gtpo, grpo_s):
        found = credit(*more)
        assert found[3].abs().max() == 0
        torch.testing.assert_close(found[:3], credit(*(value[:3] for value in more)))


def test_grpo_s_has_the_gradient_of_the_arithmetic_mean_of_the_ratios():
    old = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -1.0, -2.0]], dtype=torch.double)
    moved = old + torch.tensor([[0.2, -0.1, 0.4], [-0.3, 0.1, 7.0]], dtype=torch.double)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages = torch.tensor([[1.5], [-0.5]], dtype=torch.double)

    def gradient(loss):
        logps = moved.clone().requires_grad_()
        loss(logps).backward()
        return logps.grad

    def definition(logps):
        ratio = (((logps - old).exp() * mask).sum(1) / mask.sum(1)).unsqueeze(1)
        return (ratio * advantages).mean()

    def composed(logps):
        replaced, ratio = sequence_ratio(logps, old, mask).detach(), (logps - old).exp()
        value = (logps - replaced).exp()
        torch.testing.assert_close(value[0], ratio[0].mean().expand(3))  # what is clipped
        term = value * advantages * own_share(ratio, mask)
        return ((term * mask).sum(1) / mask.sum(1)).mean()

    torch.testing.assert_close(gradient(composed), gradient(definition))


def test_reductions_of_a_group_by_position():
    values = torch.tensor([[1.0, 2.0], [10.0, NAN], [5.0, 6.0]])
    among = torch.tensor([[True, True], [False, True], [True, True]])
    group = torch.tensor([1, 1, 0])
    assert_close(group_sum(values, group), [[11.0, 2.0], [11.0, 2.0], [5.0, 6.0]])
    assert_close(group_sum(values, group, among), [[1.0, 2.0], [1.0, 2.0], [5.0, 6.0]])
    # 1, 2, and 2 alone: mean 5 / 3, unbiased variance 1 / 3
    found = normalised(torch.tensor([[1.0, 2.0], [9.0, 2.0]]), among[:2], group[:2])
    assert_close(found, [[-0.666667 / 0.57755, 0.333333 / 0.57755], [0.0, 0.333333 / 0.57755]])


@pytest.mark.parametrize(
    ("slot", "stage", "setting"),
    [
        ("weights", clip_cov, {"share": 1.5}),
        ("weights", clip_cov, {"share": -0.1}),
        ("weights", clip_cov, {"upper": float("inf")}),
        ("marks", high_covariance, {"share": "many"}),
        ("aux", kl_cov, {"beta": -1}),
        ("credits", gtpo, {"pools": "two"}),
        ("credits", gtpo, {"bonus": -1}),
        ("credits", grpo_s, {"base": -1}),
    ],
)
def test_a_wrong_value_gets_one_error_that_names_its_key(slot, stage, setting):
    (name,) = setting
    marks = {"marks": {"high_covariance": high_covariance}} if slot == "aux" else {}
    with pytest.raises(UserError) as refused:
        build({**marks, slot: {"mine": functools.partial(stage, **setting)}})
    assert str(refused.value).startswith(f"method.{slot}.mine.{name}:")
