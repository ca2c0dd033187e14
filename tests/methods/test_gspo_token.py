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
