"""Fast-Math-R1's three rewards: literal numbers, the two stages of its exp, and settings."""

import functools

import pytest
import torch

from rltoken.methods.fast_math_r1 import boxed_while_thinking, cosine_reward, fast_math_r1
from rltoken.methods.kimi_length import length_reward
from tests.methods.configured import assert_refused, composed
from tests.methods.worked import GROUP, assert_close, grpo

COSINE = {0: 1.0, 7500: 0.868198, 15000: 0.55, 22500: 0.231802, 30000: 0.1, 60000: 0.1}


def test_fast_math_cosine():
    share = torch.tensor(list(COSINE)) / 30000
    assert_close(cosine_reward(share, share >= 0), list(COSINE.values()))
    assert_close(cosine_reward(share, share < 0), [-value for value in COSINE.values()])


def test_fast_math_format_is_a_box_within_the_thinking():
    boxed = functools.partial(boxed_while_thinking, think_end="</think>")
    assert boxed(r"a \boxed{3} b</think>c") and boxed("a \\boxed{3}\n b\n</think>\nc")
    assert not boxed(r"a</think>\boxed{3}") and not boxed(r"\boxed{3}") and not boxed(r"\boxed{3</think>}")


FAST_CORRECT = torch.tensor([True, True, False, False])
COUNTS = torch.tensor([6000, 12000, 18000, 30000])


def test_the_cosine_and_the_length_reward_of_the_worked_group():
    assert_close(cosine_reward(COUNTS / 30000, FAST_CORRECT), [0.914058, 0.689058, -0.410942, -0.1])
    found = length_reward(COUNTS.float(), FAST_CORRECT, GROUP, torch.ones(4, dtype=torch.bool))
    assert_close(found, [0.5, 0.25, 0.0, -0.5])


def fast_math(gated=False, **settings):
    texts = [r"\boxed{3}</think>" if marked else "" for marked in (1, 0, 1, 0)]
    texts = [text.ljust(count) for text, count in zip(texts, COUNTS.tolist(), strict=True)]
    return fast_math_r1(texts, FAST_CORRECT.float(), FAST_CORRECT, GROUP, COUNTS, gated=gated, **settings)


@pytest.mark.parametrize("settings", [{"unit": "characters"}, {"unit": "tokens", "longest": 30000}])
def test_fast_math_r1(settings):
    shaped = fast_math(**settings)
    assert_close(shaped, [2.414058, 0.939058, 0.589058, -0.6])
    assert_close(grpo(shaped), [1.271356, 0.083372, -0.198523, -1.156205])


def test_fast_math_r1_gated_has_no_length_for_wrong_answers():
    # the boxed wrong answer keeps the format's 1, below which the second, correct answer is not let
    assert_close(fast_math(gated=True, unit="characters"), [2.414058, 1.0, 1.0, 0.0])
    # in tokens the cosine ends at 10000: 0.1 + 0.45 (1 + cos(0.6 pi)) = 0.410942 for the first, 0.1 for the second
    assert_close(fast_math(unit="tokens"), [1.910942, 0.35, 0.9, -0.6])


def test_exp_fast_math_r1_is_grpo_with_the_three_rewards():
    cfg = composed("+exp=fast_math_r1")
    assert list(cfg.method.shapes) == ["fast_math_r1"] and not any(cfg.method[slot] for slot in ("prompts", "credits"))
    assert cfg.method.shapes.fast_math_r1.longest == cfg.rollout.max_thinking_tokens
    assert (cfg.trainer.loss_type, cfg.trainer.scale_rewards) == ("bnpo", "group")
    assert cfg.sft.traces._target_ == "rltoken.tiny.traces" and cfg.sft.trainer.max_steps == 150
    assert composed("+exp=fast_math_r1", "scale=paper").sft.traces._target_ == "rltoken.data.load_traces"
    assert composed("+exp=fast_math_r1", "sft=none").sft.traces is None


def test_configurations_have_the_papers_settings():
    shape = composed("+shape=fast_math_r1").method.shapes.fast_math_r1
    assert (shape.unit, shape.longest) == ("tokens", None)


@pytest.mark.parametrize("setting", ["method.shapes.fast_math_r1.unit=words", "method.shapes.fast_math_r1.longest=-1"])
def test_settings_out_of_range_are_refused(setting):
    assert_refused("+shape=fast_math_r1", setting)
