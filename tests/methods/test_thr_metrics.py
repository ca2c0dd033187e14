"""What THR and NTHR log of a window: how much has a score, and how much of that is left out or spared."""

import pytest
import torch

from rltoken.methods.thr import nthr, thr
from rltoken.types import Head


@pytest.fixture
def window():
    """Three responses and two under a head of zeros, seven tokens; by hand in test_thr.py.

    Their scores are 1.25 and -2.5, 3.75, 1.25 and -1.25; 2 and 1. The third and the fifth response are wrong.
    """
    hidden = torch.tensor([[[1.0], [2.0]], [[3.0], [9.0]], [[1.0], [1.0]], [[2.0], [9.0]], [[1.0], [9.0]]])
    ids = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 1], [1, 1]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0], [1, 0]])
    correct = torch.tensor([True, True, False, True, False])
    group = torch.tensor([4, 4, 4, 2, 2])
    return [hidden, torch.full((5, 2), 0.5).log(), ids, mask, Head(torch.zeros(2, 1), None, 0.7), correct,
            correct.float(), group]  # fmt: skip


def test_thr_logs_what_it_scores_and_zeroes(window):
    """Thresholds of 1.5625 and 2: only 2.5 and 3.75 are above them, in absolute value."""
    _, metrics = thr(*window, tau_mode="mean")
    assert metrics == pytest.approx({"thr/scored": 1.0, "thr/zeroed": 5 / 7})


def test_a_cap_shows_in_what_is_scored(window):
    """Of the first group's five tokens three have a score, and both of the other group's."""
    weights, metrics = thr(*window, max_tokens=3, tau_mode="none")
    assert metrics == pytest.approx({"thr/scored": 5 / 7, "thr/zeroed": 0.0})
    assert ((weights != 1) & (window[3] > 0)).sum() == 5
    window[3][2:] = 0
    window[3][3:, 0] = 1
    _, metrics = thr(*window, max_tokens=3, tau_mode="mean")
    assert metrics["thr/scored"] == 1.0, "three tokens are no more than the cap"


def test_nthr_logs_what_it_spares(window):
    """Summed, the wrong responses' scores are 1 and -1, and 1; the means of the correct ones -0.5 and 3, and 2."""
    _, metrics = nthr(*window)
    assert metrics == pytest.approx({"nthr/scored": 1.0, "nthr/damped": 1 / 7})


def test_without_a_contrast_nothing_is_scored(window):
    window[5], window[6] = torch.ones(5, dtype=torch.bool), torch.ones(5)
    for method, name in ((thr, "thr/scored"), (nthr, "nthr/scored")):
        weights, metrics = method(*window)
        assert metrics == {name: 0.0} and (weights == 1).all()
