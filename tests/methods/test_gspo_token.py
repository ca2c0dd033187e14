"""GSPO-token: the value of the response's ratio, the gradient of the token."""

import math

import pytest
import torch

from rltoken.methods.gspo_token import gspo_token


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


def test_the_ratios_of_the_worked_sequences():
    """exp of the mean log-ratio: exp(.025) of two tokens, exp(.2) of three."""
    logps = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -1.0, -1.5]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    old = logps - torch.tensor([[0.25, -0.2, 9.0], [0.3, 0.0, 0.3]])
    ratio = torch.exp(logps - gspo_token(logps, old, mask))
    torch.testing.assert_close(ratio, torch.tensor([[1.025315] * 3, [1.221403] * 3]), rtol=0, atol=1e-6)
