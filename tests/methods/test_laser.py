"""LASER, LASER-D and LASER-DE: literal numbers, the choice of targets, state and settings."""

import pytest
import torch

from rltoken.methods.laser import LaserD, difficulty, laser, repetitive
from tests.methods.configured import assert_refused, composed
from tests.methods.worked import CORRECT, GROUP, LENGTHS, REWARDS, assert_close, assert_same_future, grpo


def test_laser():
    shaped = laser(REWARDS, CORRECT, LENGTHS, target=2500)
    assert_close(shaped, [1.5, 1.0, -0.5, 1.5])
    assert_close(grpo(shaped), [0.660268, 0.132054, -1.452591, 0.660268])


def laser_with_target(target, **settings):
    """A LaserD whose targets were chosen and are not chosen anew."""
    stage = LaserD(**settings)
    stage.load_state_dict({**stage.state_dict(), "windows": 1, "targets": [target] * 3})
    return stage


def test_laser_de_and_d():
    texts = ["a b c d e f"] * 4
    shaped = laser_with_target(1500, gated=False)(REWARDS, CORRECT, GROUP, LENGTHS, texts)
    assert_close(shaped, [1.5, 1.0, 0.0, 1.0])
    assert_close(grpo(shaped), [0.993241, 0.198648, -1.390538, 0.198648])
    assert_close(laser_with_target(1500)(REWARDS, CORRECT, GROUP, LENGTHS, texts), [1.5, 1.0, -0.5, 1.0])
    repeating = ["a b c d " * 3] * 4
    shaped = laser_with_target(1500, gated=False)(REWARDS, CORRECT, GROUP, LENGTHS, repeating)
    assert_close(shaped, [1.5, 1.0, -0.5, 1.0])


def test_repetition_is_four_words_three_times():
    assert repetitive("wait let me see. x wait let me see. y wait let me see.")
    assert not repetitive("wait let me see. x wait let me see. y") and not repetitive("")


def test_difficulty_is_the_groups_accuracy_in_thirds():
    correct = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0]).bool()
    rewards = correct.float()
    rewards[11] = torch.nan  # of the last group two of two graded answers are correct
    assert difficulty(rewards, correct, torch.arange(12) // 3).tolist() == [2] * 3 + [1] * 3 + [0] * 3 + [2] * 3


def window_of(correct, lengths):
    """A group of eight for LaserD."""
    correct = torch.tensor(correct).bool()
    return correct.float(), correct, torch.zeros(8, dtype=torch.long), torch.tensor(lengths), [""] * 8


def test_laser_d_chooses_the_smallest_target_that_covers_enough():
    """Eight answers: easy needs 1/5 of them covered, medium 1/2, hard all."""
    lengths = [90, 110, 190, 210, 290, 310, 390, 400]
    stage = LaserD(lowest=100, highest=400, interval=100, every=2)
    stage(*window_of([1, 1, 1, 1, 1, 1, 0, 0], lengths))
    assert stage.targets == [400, 400, 200], "1 of 8 is below 1/5, 3 of 8 are not; nothing medium or hard was seen"
    stage(*window_of([1, 1, 1, 0, 0, 0, 0, 0], [1] * 8))
    assert stage.targets == [400, 400, 200], "targets stay for two windows"
    stage(*window_of([1, 0, 0, 0, 0, 0, 0, 0], [300] * 7 + [301]))
    assert stage.targets == [400, 100, 400], "the medium window was counted, the first one is forgotten"


def test_restored_state_has_the_same_future():
    assert_same_future(lambda: LaserD(lowest=50, highest=500, interval=50, every=3))


def test_another_grid_is_refused_on_resume():
    state = LaserD(lowest=100, highest=400, interval=100).state_dict()
    with pytest.raises(ValueError, match="another grid"):
        LaserD().load_state_dict(state)
    assert LaserD(lowest=10, highest=40, interval=10).load_state_dict(state) is None


@pytest.mark.parametrize(("name", "gated"), [("laser_d", True), ("laser_de", False)])
def test_configurations_have_the_papers_settings(name, gated):
    shape = composed("+shape=laser").method.shapes.laser
    assert (shape.target, shape.bonus, shape.wrong) == (8192, 0.5, -0.5)
    shape = composed(f"+shape={name}").method.shapes[name]
    assert (shape.lowest, shape.highest, shape.interval, shape.every, shape.gated) == (4096, 16384, 1024, 20, gated)


@pytest.mark.parametrize("setting", ["method.shapes.laser.wrong=1", "method.shapes.laser.target=0"])
def test_settings_out_of_range_are_refused(setting):
    assert_refused("+shape=laser", setting)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"interval": 0}, "interval"),
        ({"lowest": 5000, "highest": 4000}, "highest"),
        ({"bonus": "much"}, "bonus"),
        ({"gated": "yes"}, "gated"),
    ],
)
def test_settings_of_the_adaptive_form_are_refused_by_name(settings, name):
    with pytest.raises(ValueError) as refused:
        LaserD(**settings)
    assert str(refused.value).startswith(f"{name}: ")
