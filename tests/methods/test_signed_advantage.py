"""Literal numbers of the signed advantage, and what it may not do."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rltoken.errors import UserError
from rltoken.methods.signed_advantage import signed_advantage
from rltoken.pipeline import build

# A group of three with rewards 1, 1, 0, less their mean: the example of THR's specification
ADVANTAGES = torch.tensor([[0.5, 0.5], [0.5, 0.0], [-1.0, -1.0]])


def test_each_sign_has_its_factor():
    torch.testing.assert_close(
        signed_advantage(ADVANTAGES, positive=1.1, negative=0.9),
        torch.tensor([[0.55, 0.55], [0.55, 0.0], [-0.9, -0.9]]),
    )
    # the paper's lambda
    torch.testing.assert_close(signed_advantage(ADVANTAGES), torch.tensor([[0.05, 0.05], [0.05, 0.0], [-1.0, -1.0]]))


def test_what_has_no_advantage_still_has_none():
    assert signed_advantage(torch.tensor([[torch.nan, 0.0]])).isnan().tolist() == [[True, False]]


@given(
    values=st.lists(st.floats(-10, 10, width=32, allow_subnormal=False), min_size=1, max_size=8),
    positive=st.floats(0.1, 2),
    negative=st.floats(0.1, 2),
)
def test_no_sign_turns_and_equal_factors_scale(values, positive, negative):
    advantages = torch.tensor([values])
    assert torch.equal(signed_advantage(advantages, positive=positive, negative=negative).sign(), advantages.sign())
    both = signed_advantage(advantages, positive=positive, negative=positive)
    torch.testing.assert_close(both, positive * advantages)


def test_a_factor_below_zero_is_refused():
    with pytest.raises(UserError, match=r"method\.credits\.s\.negative: -1\.0 is not possible; .* from 0"):
        build({"credits": {"s": functools.partial(signed_advantage, negative=-1.0)}})
