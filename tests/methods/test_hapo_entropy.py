"""Heterogeneous HAPO: numbers worked by hand, both signs, the sampling temperature, and what is refused."""

import functools
import json
import math

import pytest
import torch
from trl import GRPOConfig

from rltoken.combinations import check
from rltoken.errors import UserError
from rltoken.methods.hapo_entropy import (
    AdaptiveTemperature,
    Landmarks,
    Redistribution,
    adaptive_clip,
    landmarks,
    level,
    tempered,
    token_average,
)
from rltoken.ops import nearest_rank
from rltoken.pipeline import build
from rltoken.rollout import logits as changes
from tests.methods.configured import assert_refused, built, composed, sections

NAN = torch.nan
# two responses of four and three tokens; log H relative to the pivot, H = 1, is a multiple of log 2 and log 10
ENTROPY = torch.tensor([[0.01, 0.5, 2.0, 0.1], [0.02, 1.0, 0.05, 7.0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
REWARDS, GROUP = torch.tensor([1.0, 0.0]), torch.tensor([3, 3])
RATIO = torch.tensor([[1.0, 1.05, 1.3, 0.8], [1.0, 0.7, 0.85, 1.0]])
LEVELS = {
    "intended": [[-1.0, -0.1505, 1.0, -0.5], [-0.8495, 0.0, -0.6505, 0.0]],
    "released": [[1.0, 0.1505, 1.0, 0.5], [0.8495, 0.0, 0.6505, 0.0]],
}
LOSS = {"intended": -0.325195, "released": -0.195402}


def assert_close(found, expected, atol=5e-5):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=0, atol=atol, equal_nan=True)


def credited(sign):
    """The advantages of the example after all parts but the sampling, and its clip range."""
    advantages = token_average(REWARDS, GROUP, MASK).unsqueeze(1)
    low, high = adaptive_clip(ENTROPY, MASK, sign=sign)
    stage = Redistribution(sign=sign)
    return advantages * stage(RATIO, low, high, stage.observe(ENTROPY, MASK)), low, high


@pytest.mark.parametrize("sign", LEVELS)
def test_levels(sign):
    assert_close(level(ENTROPY, MASK, 0.8, sign), LEVELS[sign])


def test_landmarks():
    marks = landmarks(ENTROPY, MASK, 0.8)
    assert marks.pivot == 0.0, "the sixth of seven values"
    assert marks.sigma == pytest.approx(1.8701, abs=5e-5)
    assert (marks.above, marks.below) == (pytest.approx(math.log(2)), pytest.approx(math.log(100)))
    about_the_pivot = (sum(math.log(h) ** 2 for h in (0.01, 0.5, 2, 0.1, 0.02, 1, 0.05)) / 7) ** 0.5
    assert about_the_pivot == pytest.approx(2.7189, abs=5e-5), "the code's divisor, which cancels in the levels"
    for divisor in (1.8701, 2.7189):
        standardised = (ENTROPY.log() / divisor)[MASK.bool()]
        scaled = torch.where(standardised > 0, standardised / standardised.max(), -standardised / standardised.min())
        assert_close(scaled, [level for row in LEVELS["intended"] for level in row][:-1])


def test_nearest_rank_is_one_of_the_values():
    values = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    assert [nearest_rank(values, q).item() for q in (0.01, 0.2, 0.21, 0.8, 1.0)] == [1, 1, 2, 4, 5]
    assert nearest_rank(torch.arange(1.0, 31.0), 0.1) == 3, "0.1 * 30 is a little above 3"


def test_token_average():
    """Mean 4/7 = .571429, variance 12/49, standard deviation .494872."""
    assert_close(token_average(REWARDS, GROUP, MASK), [0.866024, -1.154698], atol=5e-7)


def test_token_average_falls_back_where_an_advantage_is_large():
    """One correct response of 1 token, one wrong of 99: mean .01, so A = .99 / .0995 = 9.95; plainly +-.7071."""
    mask = torch.zeros(4, 99, dtype=torch.long)
    mask[0, 0] = mask[1] = 1
    mask[2:, :2] = 1  # another group, of equal lengths, stays below
    rewards, group = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    assert_close(token_average(rewards, group, mask), [9.9498, -0.1005, 1.0, -1.0], atol=2e-4)
    expected = [0.7071, -0.7071, 1.0, -1.0]
    assert_close(token_average(rewards, group, mask, fallback_at=5.0), expected)
    # one wrong of 1 token, one correct of 99: -9.95 is as far from 0
    assert_close(token_average(1 - rewards, group, mask, fallback_at=5.0), [-value for value in expected])


def test_token_average_leaves_ungraded_rows_out():
    rewards, group = torch.tensor([1.0, NAN, 0.0]), torch.tensor([0, 0, 0])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    assert_close(token_average(rewards, group, mask), [0.866024, NAN, -1.154698], atol=5e-7)


def test_clip_range():
    low, high = adaptive_clip(ENTROPY, MASK)
    assert_close(low, [[0.4, 0.2301, 0.2, 0.3], [0.3699, 0.2, 0.3301, 0.2]])
    assert_close(high, [[0.28, 0.28, 0.56, 0.28], [0.28] * 4])
    low, high = adaptive_clip(ENTROPY, MASK, sign="released")
    assert_close(low, [[0.2] * 4] * 2)
    assert_close(high, [[0.56, 0.3221, 0.56, 0.42], [0.5179, 0.28, 0.4621, 0.28]])


def test_advantages_after_redistribution():
    advantages, _, _ = credited("intended")
    assert_close(advantages[0], [0.0, 0.7357, 1.7320, 0.8660])
    assert_close(advantages[1, :3], [-0.1738, -1.1547, -0.4036], atol=6e-5)  # -.40355


@pytest.mark.parametrize("sign", LOSS)
def test_loss_of_the_example(sign):
    advantages, low, high = credited(sign)
    clipped = RATIO.clamp(1 - low, 1 + high)
    loss = -torch.minimum(RATIO * advantages, clipped * advantages)
    assert_close((loss * MASK).sum() / 7, LOSS[sign], atol=1e-6)


@pytest.mark.parametrize(
    ("h", "ratio", "weight"),
    [
        (0.5, 1.0, 1.0), (0.5, 1.2, 1.5), (0.5, 0.85, 1.5),  # undecided: gains outside of (0.9, 1.14)
        (-0.5, 1.0, 0.5), (-0.5, 1.2, 1.0), (-0.5, 0.85, 1.0),  # decided: loses inside
        (0.0, 1.0, 1.0), (0.0, 2.0, 1.0), (-1.0, 1.0, 0.0), (1.0, 2.0, 2.0),
        (0.5, 1.1401, 1.5), (0.5, 1.1399, 1.0), (0.5, 0.8999, 1.5), (0.5, 0.9001, 1.0),
    ],
)  # fmt: skip
def test_redistribution(h, ratio, weight):
    eps = torch.tensor([[0.2]], dtype=torch.float64), torch.tensor([[0.28]], dtype=torch.float64)
    found = Redistribution()(torch.tensor([[ratio]], dtype=torch.float64), *eps, torch.tensor([[h]]).double())
    assert found.item() == pytest.approx(weight)


def test_without_entropies_or_a_spread_nothing_moves():
    none, flat = torch.zeros_like(MASK), torch.full_like(ENTROPY, 0.3)
    for sign in LEVELS:
        assert level(ENTROPY, none, 0.8, sign).eq(0).all() and level(flat, MASK, 0.8, sign).eq(0).all()
    control = AdaptiveTemperature()
    assert control() == {}, "the first window is sampled at the temperature itself"
    control.observe(flat, MASK)
    assert control() == {}
    control.observe(ENTROPY, MASK)
    before = control.state_dict()
    control.observe(ENTROPY, none)
    assert control.state_dict() == before


def logits_of(entropy):
    """[1, 3] logits whose entropy is so many nats, by bisection."""
    low, high = 0.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        p = torch.tensor([middle, 0.0, 0.0], dtype=torch.float64).softmax(-1)
        low, high = (middle, high) if torch.special.entr(p).sum() > entropy else (low, middle)
    return torch.tensor([[low, 0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("form", "entropy", "factor"),
    [
        ("paper", 1.0, 1.0),
        ("paper", 0.1, 1 + 0.1 * math.log(0.1) / 1.870135),
        ("paper", 1.05, 1 + 0.1 * math.log(1.05) / 1.870135),
        ("paper", 1e-6, 1 + 0.1 * math.log(1e-6) / 1.870135),  # -7.4 standard deviations, not bounded
        ("scaled", 0.1, 1 - 0.1 * 0.5),
        ("scaled", 1e-6, 0.9),
        ("scaled", 1.05, 1 + 0.1 * math.log(1.05) / math.log(2)),
        ("released", 0.1, 1 + 0.1 * 0.5),
        ("released", 1e-6, 1.1),
    ],
)
def test_a_token_is_sampled_at_its_own_temperature(form, entropy, factor):
    control = AdaptiveTemperature(form=form)
    control.observe(ENTROPY, MASK)
    logits = logits_of(entropy)
    torch.testing.assert_close(control()["logits"](logits), logits / factor, rtol=1e-6, atol=0)


def test_the_entropy_is_taken_at_the_temperature():
    """At T = 2 a token of pivot entropy has logits twice as large, and is not moved."""
    control = AdaptiveTemperature(temperature=2.0, tau=0.5)
    control.observe(ENTROPY, MASK)
    at_pivot = 2 * logits_of(1.0)
    torch.testing.assert_close(control()["logits"](at_pivot), at_pivot)
    assert not torch.allclose(control()["logits"](at_pivot / 2), at_pivot / 2, atol=1e-3)


def test_a_temperature_stays_between_a_tenth_and_twice_and_masked_tokens_stay_impossible():
    settings = {"temperature": 1.0, "tau": 1.0, "above": 0.1, "below": 1.0, "limit": None}
    certain, even = torch.tensor([[50.0, 0.0, -math.inf]]), torch.tensor([[3.0, 3.0, -math.inf]])
    assert tempered(certain, pivot=0.0, **settings).tolist() == [[pytest.approx(500.0), 0.0, -math.inf]]
    assert tempered(even, pivot=-2.0, **settings).tolist() == [[1.5, 1.5, -math.inf]]


@pytest.mark.parametrize("limit_side", ["above", "below"])
def test_beyond_a_side_on_which_no_token_lay_the_limit_holds(limit_side):
    sides = {"above": 0.5, "below": 0.5, limit_side: 0.0}
    change = functools.partial(tempered, temperature=1.0, tau=0.1, pivot=math.log(0.5), limit=1.0, **sides)
    logits = logits_of(0.9 if limit_side == "above" else 0.1)
    torch.testing.assert_close(change(logits), logits / (1.1 if limit_side == "above" else 0.9))


def test_state_is_the_last_window():
    control, resumed = AdaptiveTemperature(), AdaptiveTemperature()
    assert control.state_dict() == {}
    resumed.load_state_dict({})
    assert resumed() == {}
    control.observe(ENTROPY, MASK)
    resumed.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert resumed.marks == control.marks == Landmarks(**control.state_dict())


def test_a_change_survives_being_written_down():
    control = AdaptiveTemperature(tau=1 / 3)
    control.observe(ENTROPY, MASK)
    change = control()["logits"]
    again = changes.found(changes.told(change))
    assert again.func is change.func and again.keywords == change.keywords


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (3, "no functools.partial"),
        (functools.partial(tempered, torch.ones(1)), "with settings alone"),
        (functools.partial(tempered, tau=torch.ones(1)), "cannot be written down"),
        (functools.partial(tempered, tau=0.1), "not to be called with"),
        (functools.partial(math.pow), "no public function of a module in rltoken.methods"),
        (functools.partial(json.dumps), "no public function of a module in rltoken.methods"),
        (functools.partial(level, rho=0.8), "no|not to be called with"),
    ],
)
def test_what_is_no_change_of_logits_is_refused(change, told):
    with pytest.raises(ValueError, match=told):
        changes.told(change)


@pytest.mark.parametrize("text", ["", "3", "{}", '{"function": 3, "settings": {}}', '{"function": "os:system"}'])
def test_what_a_request_may_not_say(text):
    with pytest.raises(ValueError, match="rltoken_logits: "):
        changes.found(text)


def test_the_exp_has_the_papers_settings_and_several_steps_a_window():
    cfg = composed("+exp=hapo_entropy")
    trainer = cfg.trainer
    assert (trainer.epsilon, trainer.epsilon_high, trainer.delta, trainer.loss_type) == (0.2, 0.28, 10, "dapo")
    assert trainer.num_iterations > 1, "on-policy no clip range is ever reached"
    pipeline = built("+exp=hapo_entropy")
    (control,), (credit,), (bounds,), (weight,) = (
        pipeline[slot] for slot in ("controls", "credits", "bounds", "weights")
    )
    assert (control.call.temperature, control.call.tau, control.call.rho, control.call.form) == (1.0, 0.1, 0.8, "paper")
    assert credit.call.keywords == {"fallback_at": None}
    assert bounds.call.keywords == {"low": 0.2, "high": 0.28, "alpha": 1.0, "rho": 0.8, "sign": "intended"}
    assert (weight.call.beta, weight.call.rho, weight.call.sign) == (1.0, 0.8, "intended")
    assert weight.live and not bounds.live and pipeline.changes_logits


def test_the_codes_reading_is_one_choice():
    cfg, pipeline = composed("+exp=hapo_entropy/released"), built("+exp=hapo_entropy/released")
    (control,), (credit,), (bounds,), (weight,) = (
        pipeline[slot] for slot in ("controls", "credits", "bounds", "weights")
    )
    assert (control.call.form, control.call.tau, credit.call.keywords["fallback_at"]) == ("released", 0.05, 5)
    assert (bounds.call.keywords["sign"], weight.call.sign) == ("released", "released")
    assert bounds.call.keywords["high"] == cfg.trainer.epsilon_high == cfg.trainer.epsilon == 0.2


@pytest.mark.parametrize(
    ("overrides", "signs"),
    [
        (["+exp=hapo_entropy", "method.weights.hapo_entropy.sign=released"], (["released"], ["released"])),
        (["+exp=hapo_entropy", "method.bounds.hapo_entropy.sign=released"], (["released"], ["intended"])),
        (["+bounds=hapo_entropy"], (["intended"], [])),
        (["+exp=hapo_entropy", "~method.weights.hapo_entropy"], (["intended"], [])),
    ],
)
def test_one_option_has_the_sign_of_clip_range_and_weight(overrides, signs):
    pipeline = built(*overrides)
    bounds = [stage.call.keywords["sign"] for stage in pipeline["bounds"]]
    assert (bounds, [stage.call.sign for stage in pipeline["weights"]]) == signs


@pytest.mark.parametrize(
    "setting",
    [
        "method.credits.hapo_entropy.fallback_at=0",
        "method.bounds.hapo_entropy.alpha=-1",
        "method.bounds.hapo_entropy.low=-0.1",
        "method.bounds.hapo_entropy.sign=code",
    ],
)
def test_settings_out_of_range_are_refused(setting):
    assert_refused("+exp=hapo_entropy", setting)


@pytest.mark.parametrize(
    ("call", "settings"),
    [
        (AdaptiveTemperature, {"tau": -1}),
        (AdaptiveTemperature, {"form": "book"}),
        (AdaptiveTemperature, {"rho": 0}),
        (Redistribution, {"beta": 1.5}),
        (Redistribution, {"rho": 2}),
        (Redistribution, {"sign": "code"}),
    ],
)
def test_settings_of_objects_out_of_range_are_refused(call, settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}: "):
        call(**settings)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_vllm": True, "vllm_mode": "server", "temperature": 0.7}, r"trainer\.temperature: "),
        ({"use_transformers_continuous_batching": True}, r"trainer\.use_transformers_continuous_batching: "),
        ({"repetition_penalty": 1.1}, r"trainer\.repetition_penalty: "),
        ({"use_vllm": True, "vllm_mode": "colocate", "temperature": 0.7}, r"trainer\.temperature: "),
        ({"use_vllm": True, "vllm_mode": "colocate", "top_p": 0.9}, r"trainer\.top_p=1"),
        ({"use_vllm": True, "vllm_mode": "colocate", "top_k": 20}, r"trainer\.top_k=0"),
        (
            {"use_vllm": True, "vllm_mode": "colocate", "temperature": 0.7, "off_policy_mask_threshold": 0.5}
            | {"vllm_importance_sampling_correction": False},
            r"off_policy_mask_threshold",
        ),
    ],
)
def test_back_ends_that_would_not_follow_are_refused(changes, told):
    settings = {"output_dir": "unused", "per_device_train_batch_size": 8, "num_generations": 4, "bf16": False}
    args = GRPOConfig(use_cpu=True, **settings | changes)
    pipeline = build({"controls": {"hapo": AdaptiveTemperature(temperature=args.temperature)}})
    with pytest.raises(UserError, match=told):
        check(pipeline, args)
    check(build({}), args)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.7, "top_p": 0.9},
        {"use_vllm": True, "vllm_mode": "colocate"},
        {"use_vllm": True, "vllm_mode": "colocate", "temperature": 0.7, "vllm_importance_sampling_correction": False},
    ],
)
def test_back_ends_that_follow_are_let_pass(changes):
    settings = {"output_dir": "unused", "per_device_train_batch_size": 8, "num_generations": 4, "bf16": False}
    args = GRPOConfig(use_cpu=True, **settings | changes)
    pipeline = build({"controls": {"hapo": AdaptiveTemperature(temperature=args.temperature)}})
    check(pipeline, args)
    assert pipeline.changes_logits


def test_a_temperature_of_its_own_is_refused():
    settings = {"output_dir": "unused", "per_device_train_batch_size": 8, "num_generations": 4, "bf16": False}
    pipeline = build({"controls": {"hapo": AdaptiveTemperature(temperature=0.5)}})
    with pytest.raises(
        UserError, match=r"^method\.controls\.hapo\.temperature: it moves around 0.5, .*trainer\.temperature=1; "
    ):
        check(pipeline, GRPOConfig(use_cpu=True, **settings))


def test_dapo_is_hapo_without_its_stages():
    hapo, dapo = sections("hapo_entropy"), sections("hapo_entropy/dapo")
    assert not any(dapo.pop("method").values()) and len(hapo.pop("method")["weights"]) == 1
    # HAPO's advantages are standardised by its own stage
    assert (dapo["trainer"].pop("scale_rewards"), hapo["trainer"].pop("scale_rewards")) == ("group", "none")
    assert dapo == hapo
