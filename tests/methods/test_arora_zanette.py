"""Arora and Zanette's reward: literal numbers, before and after their credit."""

import torch

from rltoken.methods.arora_zanette import arora_zanette
from rltoken.methods.rloo import rloo
from tests.methods.configured import assert_defaults, assert_refused, built
from tests.methods.worked import CORRECT, GROUP, LENGTHS, REWARDS, assert_close

NONE_CUT = torch.zeros(4, dtype=torch.bool)


def test_arora_zanette_and_rloo():
    shaped = arora_zanette(REWARDS, CORRECT, LENGTHS, NONE_CUT, GROUP, alpha=0.2)
    assert_close(shaped, [0.954579, 0.845421, 0.0, 0.9])
    assert_close(rloo(shaped, GROUP), [0.372773, 0.227227, -0.9, 0.3])


def test_arora_zanette_of_a_single_success_and_of_a_cut_one():
    correct, cut = torch.tensor([True, False, True, False]), torch.tensor([False, False, True, True])
    assert_close(arora_zanette(correct.float(), correct, LENGTHS, cut, GROUP, alpha=0.2), [0.9, 0.0, 0.0, 0.0])


def test_configurations_have_the_papers_settings():
    pipeline = built("+shape=arora_zanette")
    (stage,) = pipeline["shapes"]
    assert_defaults(stage, "method.shapes.arora_zanette", arora_zanette)


def test_a_setting_out_of_range_is_refused():
    assert_refused("+shape=arora_zanette", "method.shapes.arora_zanette.alpha=1.5")
