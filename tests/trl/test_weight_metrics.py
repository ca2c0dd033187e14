"""A weight stage may return metrics beside its weights: they are logged, and training is that of the weights alone."""

import pytest
import torch

from rltoken.errors import UserError


def of_window(old_logps, mask):
    return 0.5 * mask, {"window/half": 0.5}


def of_forward(logps, mask):
    return 2.0 * mask, {"forward/tokens": float(mask.sum())}


def test_metrics_of_weights_are_logged_and_change_nothing(run):
    found = run({"weights": {"window": of_window, "forward": of_forward}}, per_device_train_batch_size=8)
    plain = run(
        {"weights": {"window": lambda old_logps, mask: 0.5 * mask, "forward": lambda logps, mask: 2.0 * mask}},
        per_device_train_batch_size=8,
    )
    assert found.distance(plain) == 0.0
    steps = [line for line in found.metrics if "loss" in line]
    assert len(steps) == 4
    for line in steps:
        assert line["window/half"] == 0.5 and 8 <= line["forward/tokens"] <= 8 * 12


@pytest.mark.parametrize("stage", [lambda mask: 1.0, lambda mask: (torch.ones(()), {"one": 1.0})])
def test_one_number_may_stand_for_every_token(run, stage):
    assert run({"weights": {"one": stage}}).distance(run()) == 0.0


def test_two_tensors_are_no_weights_with_metrics(run):
    with pytest.raises(UserError, match=r"method\.weights\.two: the stage returned 2 values where 1 are needed"):
        run({"weights": {"two": lambda mask: (mask, mask)}})
