"""Reductions that methods share: over groups, and over what a mask leaves."""

import math

import torch

from rltoken.ops import group_amax, group_amin, group_mean, group_std, group_sum, masked_mean
from tests.methods.worked import assert_close

NAN = torch.nan


def test_masked_mean():
    values, mask = torch.tensor([[1.0, 2.0, 100.0], [4.0, torch.nan, torch.inf]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert_close(masked_mean(values, mask, dim=1), [1.5, 4.0])
    assert_close(masked_mean(values, mask), 7 / 3)
    assert_close(masked_mean(values, mask * 0), 0.0)


def test_group_mean():
    rewards, group = torch.tensor([1.0, 0.0, torch.nan, 3.0]), torch.tensor([7, 7, 2, 2])
    assert_close(group_mean(rewards, group), [0.5, 0.5, 3.0, 3.0])


def test_group_reductions():
    values, group = torch.tensor([1.0, 3.0, NAN, 6.0, 5.0]), torch.tensor([4, 4, 4, 4, 9])
    among = torch.tensor([True, True, True, False, False])
    assert_close(group_sum(values, group), [10.0, 10, 10, 10, 5])
    assert_close(group_sum(values, group, among), [4.0, 4, 4, 4, 0])
    assert_close(group_std(values, group), [2.516611] * 4 + [0.0])
    assert_close(group_std(values, group, among, correction=0), [1.0] * 4 + [0.0])


def test_group_extremes_leave_out_what_they_are_told_to():
    values, group = torch.tensor([1.0, 5.0, torch.nan, 2.0, 7.0]), torch.tensor([3, 3, 3, 0, 0])
    assert group_amax(values, group).tolist() == [5.0, 5.0, 5.0, 7.0, 7.0]
    among = torch.tensor([True, False, True, False, False])
    assert group_amin(values, group, among).tolist() == [1.0, 1.0, 1.0, math.inf, math.inf]


def test_reductions_of_a_group_by_position():
    values = torch.tensor([[1.0, 2.0], [10.0, NAN], [5.0, 6.0]])
    among = torch.tensor([[True, True], [False, True], [True, True]])
    group = torch.tensor([1, 1, 0])
    assert_close(group_sum(values, group), [[11.0, 2.0], [11.0, 2.0], [5.0, 6.0]])
    assert_close(group_sum(values, group, among), [[1.0, 2.0], [1.0, 2.0], [5.0, 6.0]])
