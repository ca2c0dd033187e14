"""GTPO and GRPO-S: literal numbers, the gradient of the mean ratio, and settings."""

import pytest
import torch

from rltoken.methods.gtpo_entropy import by_entropy, grpo_s, gtpo, normalised, own_share, sequence_ratio
from tests.methods.configured import assert_refused
from tests.methods.worked import assert_close

NAN = torch.nan
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


def test_gtpo_pays_a_position_base_and_bonus_for_each_correct_response_there():
    """(1 + .1) d_t, with d = 2, 2 and 1: at the paper's settings rewards are not conserved."""
    shaped = by_entropy(CORRECT.float(), CORRECT, ENTROPY, ALIVE > 0, GROUP, **PAPER)
    assert_close((shaped * ALIVE)[CORRECT].sum(0), [1.1 * 2, 1.1 * 2, 1.1])


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
    group, entropy = torch.arange(8) // 4, torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
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


def test_tokens_of_a_group_are_normalised_together():
    """1, 2, and 2 alone: mean 5 / 3, unbiased variance 1 / 3."""
    among = torch.tensor([[True, True], [False, True]])
    found = normalised(torch.tensor([[1.0, 2.0], [9.0, 2.0]]), among, torch.tensor([1, 1]))
    assert_close(found, [[-0.666667 / 0.57755, 0.333333 / 0.57755], [0.0, 0.333333 / 0.57755]])


@pytest.mark.parametrize(
    ("choice", "setting"),
    [
        ("+credit=gtpo_entropy", "method.credits.gtpo_entropy.pools=two"),
        ("+credit=gtpo_entropy", "method.credits.gtpo_entropy.bonus=-1"),
        ("+credit=grpo_s", "method.credits.grpo_s.base=-1"),
    ],
)
def test_settings_out_of_range_are_refused(choice, setting):
    assert_refused(choice, setting)
