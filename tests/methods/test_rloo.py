"""RLOO's credit, worked by hand."""

import torch

from rltoken.methods.rloo import rloo
from tests.methods.configured import assert_defaults, built
from tests.methods.worked import assert_close

NAN = torch.nan


def test_rloo_leaves_ungraded_rows_out_and_has_no_baseline_for_one_alone():
    rewards, group = torch.tensor([1.0, 0.0, NAN, 4.0, 7.0]), torch.tensor([0, 0, 0, 0, 1])
    assert_close(rloo(rewards, group), [1 - 4 / 2, 0 - 5 / 2, NAN, 4 - 1 / 2, 0.0])


def test_configurations_have_the_papers_settings():
    pipeline = built("+credit=rloo")
    (stage,) = pipeline["credits"]
    assert_defaults(stage, "method.credits.rloo", rloo)
