"""HAPO, history-aware: literal numbers, state and settings."""

import pytest
import torch

from rltoken.methods.hapo_history import HapoHistory
from tests.methods.configured import composed
from tests.methods.worked import CORRECT, GROUP, REWARDS, assert_close, assert_same_future


def test_hapo_history():
    stage = HapoHistory(gated=False)
    rewards, correct = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([True, True, False])
    group, prompts = torch.zeros(3, dtype=torch.long), ["a", "a", "a"]
    assert_close(stage(rewards, correct, group, prompts, torch.tensor([100, 300, 7])), [1.0, 1.0, 0.0])
    # against 100: cos(pi/4) for 50, cos(3 pi/4) for 150, cut at -0.7, cos(pi) for 200 and more
    assert_close(stage(rewards, correct, group, prompts, torch.tensor([50, 150, 900])), [1.707107, 0.3, -1.0])
    assert stage.state_dict() == {"a": 50}
    # against 50, a short wrong answer gains nothing; b has no history
    assert_close(stage(rewards, correct, group, ["a", "b", "a"], torch.tensor([50, 150, 10])), [1.0, 1.0, 0.0])
    assert stage.state_dict() == {"a": 50, "b": 150}


def test_hapo_history_gated_leaves_wrong_answers_alone():
    stage = HapoHistory()
    stage.load_state_dict({"a": 100})
    shaped = stage(REWARDS, CORRECT, GROUP, ["a"] * 4, torch.tensor([100, 150, 400, 50]))
    assert_close(shaped, [1.0, 0.3, 0.0, 1.707107])


def test_restored_state_has_the_same_future():
    assert_same_future(lambda: HapoHistory(gated=False))


def test_configurations_have_the_papers_settings():
    shape = composed("+shape=hapo_history").method.shapes.hapo_history
    assert (shape.weight, shape.floor) == (1.0, -0.7)


@pytest.mark.parametrize(("name", "value"), [("floor", 0.5), ("weight", -1)])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError) as refused:
        HapoHistory(**{name: value})
    assert str(refused.value).startswith(f"{name}: ")
