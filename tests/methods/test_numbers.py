"""Literal numbers, worked by hand or transcribed from the methods' specifications."""

import math

import pytest
import torch

from rltoken.methods.budget_prompt import budget_prompt
from rltoken.methods.clip_range import clip_range
from rltoken.methods.dynamic_sampling import flat_groups
from rltoken.methods.entropy_advantage import entropy_advantage
from rltoken.methods.entropy_bonus import entropy_bonus
from rltoken.methods.forced_answer import group_centred
from rltoken.methods.forking_tokens import forks, forks_microbatch
from rltoken.methods.gspo_token import gspo_token
from rltoken.methods.length_regularised import length_regularised
from rltoken.methods.length_schedule import length_schedule
from rltoken.ops import group_mean, masked_mean, quantile
from rltoken.types import Progress


def assert_close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_forks_keep_the_top_share():
    entropy = torch.tensor([[0.1, 2.0, 0.2, 0.3], [0.9, 1.5, 0.4, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    # seven trained tokens; the 0.8 quantile of .1 .2 .3 .4 .9 1.5 2.0 stands at rank 4.8: 0.9 + 0.8 * 0.6 = 1.38
    assert_close(quantile(entropy[mask.bool()], 0.8), 1.38)
    assert_close(forks(entropy, mask, rho=0.2), [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    assert_close(forks_microbatch(entropy, mask, rho=0.2), [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])


def test_forks_shrink_the_loss_since_the_divisor_counts_all_tokens():
    kept = forks(torch.tensor([[0.1, 2.0, 0.2, 0.3, 0.9, 1.5, 0.4]]), torch.ones(1, 7, dtype=torch.long), rho=0.2)
    assert_close(-(kept * 1.0).sum() / 7, -2 / 7)


def test_gspo_token_value_and_gradient():
    """Two tokens, log-ratios 0 and -0.1, advantages 2 and 0: the gradient is [.9512, 0], GSPO's .4756 twice."""
    old = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    logps = torch.tensor([[-1.0, -2.1]], dtype=torch.float64, requires_grad=True)
    mask, advantages = torch.ones(1, 2), torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    replaced = gspo_token(logps, old, mask).detach()
    ratio = torch.exp(logps - replaced)
    assert ratio[0].tolist() == pytest.approx([math.exp(-0.05)] * 2)
    (ratio * advantages).mean().backward()
    assert logps.grad[0].tolist() == pytest.approx([0.951229, 0.0], abs=1e-6)


def test_entropy_advantage_never_turns_the_sign():
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.0]])
    entropy = torch.tensor([[0.5, 5.0, 0.9, 5.0, 5.0]])
    assert_close(entropy_advantage(advantages, entropy, alpha=0.4, kappa=2.0), [[1.2, 1.5, -0.64, -0.5, 0.0]])
    with pytest.raises(ValueError, match="kappa"):
        entropy_advantage(advantages, entropy, kappa=1.0)


def test_length_regularised():
    rewards, lengths = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 32, 640, 5])
    assert_close(length_regularised(rewards, lengths, weight=0.4, longest=64), [1.0, 0.8, 0.6, 0.0])
    ungated = length_regularised(rewards, lengths, weight=0.4, longest=64, gated=False)
    assert_close(ungated, [1.0, 0.8, 0.6, -0.03125])


def test_length_schedule_is_linear_then_constant():
    lengths = [
        length_schedule(Progress(step, 10), start=100, end=50, over=0.5)["max_completion_length"]
        for step in (0, 1, 5, 9)
    ]
    assert lengths == [100, 90, 50, 50]


def test_clip_range_and_entropy_bonus():
    assert clip_range(low=0.1, high=0.3) == (0.1, 0.3)
    assert_close(entropy_bonus(torch.tensor([[1.0, 2.0]]), coef=0.5), [[-0.5, -1.0]])


def test_budget_prompt_gives_one_budget_to_a_group():
    inputs = [{"prompt": [{"role": "user", "content": f"q{i // 2}"}], "answer": "1"} for i in range(6)]
    group = torch.arange(6) // 2
    changed = budget_prompt(inputs, group, torch.Generator().manual_seed(0), budgets=[8, 16], template=" <{budget}>")
    budgets = [example["budget"] for example in changed]
    assert budgets[0::2] == budgets[1::2] and set(budgets) <= {8, 16}
    assert changed[0]["prompt"][-1]["content"] == f"q0 <{budgets[0]}>"
    assert inputs[0]["prompt"][-1]["content"] == "q0", "the data set's own rows stay as they are"


def test_flat_groups():
    nan = torch.nan
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, nan, nan, nan, 1.0])
    assert flat_groups(rewards, 2) == [0, 2, 3]


def test_group_centred_and_group_mean():
    rewards, group = torch.tensor([1.0, 0.0, torch.nan, 3.0]), torch.tensor([7, 7, 2, 2])
    assert_close(group_mean(rewards, group), [0.5, 0.5, 3.0, 3.0])
    assert_close(group_centred(rewards[:2], group[:2]), [0.5, -0.5])


def test_masked_mean():
    values, mask = torch.tensor([[1.0, 2.0, 100.0], [4.0, torch.nan, torch.inf]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert_close(masked_mean(values, mask, dim=1), [1.5, 4.0])
    assert_close(masked_mean(values, mask), 7 / 3)
    assert_close(masked_mean(values, mask * 0), 0.0)
