"""CAMPO's numbers: penalties and advantages in both readings, stages by step and by saturation, what is refused."""

import inspect
import math

import pytest
import torch

from rltoken.methods.campo import StagedLength, saturated, without_loops
from rltoken.types import LastWindow, Progress
from tests.methods.configured import assert_refused, built

LOOPS = [  # tokens, the paper's share, the released code's
    ([1, 2, 3, 4, 5, 6], 0.0, 0.0),
    ([1, 2, 3, 4, 9, 9], 0.333333, 0.333333),
    ([1, 2, 7, 8, 7, 8, 7, 8, 7, 8], 0.8, 0.8),
    ([1, 2, 3, 4, 5, 6, 6, 6, 6, 6], 0.5, 0.4),
    ([1, 2, 3, 4, 7, 8, 7, 8, 7, 8], 0.6, 0.6),
    ([1, 2, 3, 1, 2, 3, 1, 2, 3], 1.0, 1.0),
    ([5, 5, 5, 5, 1, 2], 0.0, 0.0),
]
CORRECT = torch.tensor([1.0, 0.0, 0.0, 1.0])
IDS = [[1, 2, 3, 4], [1, 2, 7, 8, 7, 8, 7, 8, 7, 8], [1, 2, 3], [3, 2, 1]]
"""A group of which the second completion ends in a loop, four fifths of it."""
CUT = torch.tensor([False, True, False, False])
PLAIN = [0.866024, -0.866024, -0.866024, 0.866024]
ADVANTAGES = {
    "paper": [0.802954, -1.261785, -0.344123, 0.802954],
    "code": [0.864067, -0.946359, -0.781775, 0.864067],
}


def assert_close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=2e-6, equal_nan=True)


def standardised(rewards):
    """Advantages with the authors' epsilon."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def windows(stage, lengths, start=0):
    """The longest completions that a control sets, one window and one step after the other."""
    seen = [None, *lengths]
    return [
        stage(Progress(start + step, 10_000), None if n is None else LastWindow(n, 0.0, 0.0))["max_completion_length"]
        for step, n in enumerate(seen)
    ]


@pytest.mark.parametrize(("ids", "paper", "code"), LOOPS)
def test_a_loop_costs_its_share_or_by_the_code_a_constant(ids, paper, code):
    one, cut = torch.ones(1), torch.tensor([True])
    shaped, metrics = without_loops(one, [ids], cut)
    assert_close(shaped, [1 - paper])
    assert metrics == {"campo/looping": float(paper > 0), "campo/loop_share": pytest.approx(paper, abs=1e-6)}
    shaped, metrics = without_loops(one, [ids], cut, reading="code")
    assert_close(shaped, [0.9 if code else 1.0])
    assert metrics["campo/loop_share"] == pytest.approx(code, abs=1e-6)


def test_advantages_without_the_penalty():
    assert_close(standardised(CORRECT), PLAIN)


@pytest.mark.parametrize("reading", ADVANTAGES)
def test_advantages_in_both_readings(reading):
    shaped, _ = without_loops(CORRECT, IDS, CUT, reading=reading)
    assert_close(standardised(shaped), ADVANTAGES[reading])


def test_by_the_code_only_what_was_cut_pays_and_by_the_paper_whatever_loops():
    nobody = torch.zeros(4, dtype=torch.bool)
    assert_close(without_loops(CORRECT, IDS, nobody, reading="code")[0], [1.0, 0.0, 0.0, 1.0])
    assert_close(without_loops(CORRECT, IDS, nobody)[0], [1.0, -0.8, 0.0, 1.0])
    assert_close(without_loops(CORRECT, IDS, CUT, reading="code", penalty=0.3)[0], [1.0, -0.3, 0.0, 1.0])
    assert_close(without_loops(CORRECT, IDS, CUT, min_repeats=5)[0], [1.0, 0.0, 0.0, 1.0])


def test_what_was_not_graded_stays_so():
    assert_close(without_loops(torch.tensor([math.nan]), [[1, 1]], torch.tensor([True]))[0], [math.nan])


def test_stages_of_the_7b_model_begin_at_their_steps():
    stage = StagedLength(windows=None)
    found = [stage(Progress(step, 3000), None) for step in (0, 1199, 1200, 2999)]
    assert [settings["max_completion_length"] for settings in found] == [16384, 16384, 32768, 32768]
    assert all((settings["epsilon"], settings["epsilon_high"]) == (0.2, 0.28) for settings in found)


def test_each_stage_can_have_a_clip_range_of_its_own():
    stage = StagedLength(
        stages=[[0, 16384], [5, 32768], [9, 49152]], longest=49152, clips=[[0.2, 0.28], [0.1, 0.3], [0, 1]]
    )
    found = [tuple(stage(Progress(step, 10), None).values()) for step in (0, 5, 9)]
    assert found == [(16384, 0.2, 0.28), (32768, 0.1, 0.3), (49152, 0, 1)]


def test_saturation_is_a_mean_that_has_not_risen_enough():
    assert not saturated([100.0, 100.0, 100.0], 2, 0.0), "two windows before the last two are needed"
    assert saturated([100.0, 100.0, 104.0, 100.0], 2, 0.02)
    assert not saturated([100.0, 100.0, 105.0, 100.0], 2, 0.02)
    assert saturated([100.0, 90.0], 1, 0.0) and not saturated([100.0, 90.0], None, 0.0)
    assert saturated([10.0, 200.0, 150.0, 150.0, 150.0, 150.0], 2, 0.0), "what is further back does not matter"


def test_stages_move_on_once_lengths_are_saturated():
    """Windows in pairs: 10+12 rise to 14+16, stay within 2 % from 15+15 on; then the second stage counts anew."""
    settings = {"stages": [[0, 32], [900, 64], [950, 128]], "longest": 128, "windows": 2, "rise": 0.02}
    stage = StagedLength(**settings)
    assert windows(stage, [10, 12, 14, 16, 15, 15, 15]) == [32] * 6 + [64] * 2
    assert stage.state_dict() == {"stage": 1, "lengths": [15]}
    assert windows(stage, [15, 20, 25, 25, 25, 25], start=100) == [64] * 6 + [128]
    assert windows(stage, [5] * 9, start=200) == [128] * 10, "there is no stage after the last"


def test_a_step_moves_on_lengths_that_still_rise_and_never_back():
    stage = StagedLength(stages=[[0, 32], [3, 64]], longest=64, windows=1, rise=0.0)
    assert windows(stage, [10, 20, 30, 40]) == [32, 32, 32, 64, 64]
    early = StagedLength(stages=[[0, 32], [30, 64]], longest=64, windows=1, rise=0.0)
    assert windows(early, [10, 9, 8]) == [32, 32, 64, 64]


def test_a_checkpoint_of_more_stages_goes_on_in_the_last_one():
    stage = StagedLength(stages=[[0, 32], [3, 64]], longest=64)
    stage.load_state_dict({"stage": 5, "lengths": []})
    assert stage(Progress(0, 9), None)["max_completion_length"] == 64


def test_configurations_have_the_defaults_of_the_code():
    pipeline = built("+control=campo", "+shape=campo", "trainer.max_completion_length=32768")
    (control,), (shape,) = pipeline["controls"], pipeline["shapes"]
    default = StagedLength()
    assert vars(control.call) == vars(default) | {"clips": [[0.2, 0.28]] * 2}
    parameters = inspect.signature(without_loops).parameters.values()
    assert shape.call.keywords == {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_the_exp_penalises_after_dynamic_sampling():
    pipeline = built("+exp=campo")
    assert [stage.key for stage in pipeline["rows"]] == ["method.rows.dynamic_sampling"]
    assert [stage.key for stage in pipeline["shapes"]] == ["method.shapes.campo"]
    assert pipeline["controls"][0].call.limits == [56, 112]


@pytest.mark.parametrize("setting", ["reading=book", "penalty=-0.1", "min_repeats=1", "min_repeats=2.5"])
def test_a_wrong_value_of_the_penalty_is_refused_by_name(setting):
    assert_refused("+shape=campo", f"method.shapes.campo.{setting}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stages", [[5, 40]]),
        ("stages", [[0, 40], [9, 32769]]),
        ("clips", []),
        ("clips", 0.2),
        ("clips", [0.2, 0.28]),
        ("clips", [[0.2, 0.28, 0.3]]),
        ("clips", [[0.2, 0.28]] * 3),
        ("clips", [[0.2, -0.28]]),
        ("clips", [[0.2, "much"]]),
        ("clips", ["ab"]),
        ("windows", 0),
        ("windows", 1.5),
        ("rise", -0.1),
        ("longest", 0),
    ],
)
def test_a_wrong_value_of_the_stages_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match="set it to") as refused:
        StagedLength(**{name: value})
    assert str(refused.value).startswith(f"{name}: ")
