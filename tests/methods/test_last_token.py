"""LaSeR's self-reward, its loss and what it mixes into advantages: literal numbers, warm-up, what is refused."""

import functools

import pytest
import torch
from hydra.utils import instantiate

from rltoken import parts
from rltoken.errors import UserError
from rltoken.methods.last_token import class_balance, mix_self_reward, self_reward, self_reward_loss
from rltoken.pipeline import build
from rltoken.tiny.tokenizer import build_tokenizer
from rltoken.tiny.world import World
from rltoken.types import Progress
from tests.methods.configured import composed

LOGPS = torch.tensor([-13.5, -20.0, -22.5, -24.0])
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0])
GROUP, NONE_CUT = torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool)
ADVANTAGES = (REWARDS - 0.5) / 0.577350
"""Their mean is .5 and their unbiased standard deviation the root of 1/3."""
START, LATE = Progress(0, 1000), Progress(200, 1000)
NAN = torch.nan


def assert_close(found, expected, digits=5e-5):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=0, atol=digits)


def balance(rewards, cut=NONE_CUT):
    return class_balance(rewards == 1, rewards, cut)


def test_self_reward_and_its_error():
    rewards = self_reward(LOGPS, scale=0.1, reference=-23.0)
    assert_close(rewards, [0.95, 0.3, 0.05, -0.1], 1e-6)
    assert_close((rewards - REWARDS).square().mean(), 0.25125, 1e-6)
    loss, metrics = self_reward_loss(LOGPS, balance(REWARDS), REWARDS == 1, START)
    assert_close(loss.mean(), 0.025125, 1e-7)
    assert metrics["self_reward/error"] == pytest.approx(0.25125)
    assert metrics["self_reward/balanced_accuracy"] == 0.75 and metrics["self_reward/log_prob"] == -20.0


def test_above_a_half_it_is_held_to_be_correct():
    """Self-rewards of .45, .5 and .55, all wrong: two of three are told."""
    logps = torch.tensor([-18.5, -18.0, -17.5])
    wrong = torch.zeros(3)
    _, metrics = self_reward_loss(logps, class_balance(wrong > 0, wrong, wrong > 0), wrong > 0, START)
    assert metrics["self_reward/balanced_accuracy"] == pytest.approx(2 / 3 / 2)


def test_the_probabilities_that_are_taught_are_next_to_nothing():
    """exp(-23 + 1 / .1) for what is right and exp(-23) for what is wrong, to three digits: .1 * .005 at most."""
    probabilities = torch.tensor([2.26e-6, 1.03e-10], dtype=torch.float64)
    assert_close(self_reward(probabilities.log(), scale=0.1, reference=-23.0), [1.0, 0.0], 5e-4)


def test_one_right_and_three_wrong():
    """(2 * .0025 + 2/3 * (.09 + .0025 + .01)) / 4 = .018333."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert_close(balance(rewards), [2.0, 0.666667, 0.666667, 0.666667], 1e-6)
    loss, _ = self_reward_loss(LOGPS, balance(rewards), rewards == 1, START, alpha=1.0)
    assert_close(loss.mean(), 0.018333, 1e-6)


@pytest.mark.parametrize(
    ("logps", "reference", "told"),
    [
        ([-14.0, -14.6, -14.3, -2.0], -14.0, []),  # the last one was cut
        ([-14.0, -15.1, -14.3, -2.0], -14.0, ["model.appended: "]),  # by .57, the first by .3
        ([-14.0, -14.6, -14.3, -2.0], -13.2, ["method.aux.self_reward.reference: "]),
        ([-14.0, -18.0, -19.0, -2.0], -23.0, ["model.appended: ", "method.aux.self_reward.reference: "]),
        ([-14.0, -2.0, -2.0, -2.0], -23.0, []),  # one says nothing
    ],
)
def test_the_first_window_tells_whether_the_reference_fits(caplog, logps, reference, told):
    logps, cut = torch.tensor(logps), torch.tensor(logps) == -2.0
    for step in (0, 1, 500):
        mix_self_reward(ADVANTAGES.unsqueeze(1), logps, cut, GROUP, Progress(step, 1000), reference=reference)
    assert len(caplog.messages) == len(told)
    assert all(message.startswith(key) for message, key in zip(caplog.messages, told, strict=True))
    if "method.aux.self_reward.reference: " in told:
        mean = logps[~cut].mean().item()
        assert f"{mean:.2f} in the mean; set it to that" in caplog.messages[-1]


def test_what_was_cut_or_not_graded_is_in_no_loss():
    """Of five rows one right and one wrong count, at 5 / (2 * 1): the mean over five is that over the two."""
    rewards = torch.tensor([1.0, 0.0, 1.0, NAN, 0.0])
    cut = torch.tensor([False, False, True, False, True])
    assert balance(rewards, cut).tolist() == [2.5, 2.5, 0.0, 0.0, 0.0]
    logps = torch.tensor([-13.5, -20.0, -1e4, -1e4, -1e4])
    loss, metrics = self_reward_loss(logps, balance(rewards, cut), rewards == 1, START, alpha=1.0)
    assert_close(loss.mean(), (0.05**2 + 0.3**2) / 2, 1e-6)
    assert metrics["self_reward/log_prob"] == pytest.approx((-13.5 - 20.0) / 2)
    nobody = self_reward_loss(logps, balance(rewards, cut | True), rewards == 1, START)[1]
    assert "self_reward/log_prob" not in nobody and nobody["self_reward/error"] == 0


def test_a_class_alone_weighs_a_half():
    assert balance(torch.ones(3), NONE_CUT[:3]).tolist() == [0.5, 0.5, 0.5]
    assert balance(torch.ones(3), ~NONE_CUT[:3]).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("clamp", "expected"),
    [(False, [0.9196, -0.7794, 0.7255, -0.8657]), (True, [0.9225, -0.7851, 0.7165, -0.8538])],
    ids=["paper", "code"],
)
def test_mixed_advantages(clamp, expected):
    mixed = mix_self_reward(ADVANTAGES.unsqueeze(1).expand(4, 2), LOGPS, NONE_CUT, GROUP, LATE, clamp=clamp)
    assert_close(mixed[:, 0], expected)
    assert mixed[:, 0].equal(mixed[:, 1])


def test_a_group_whose_self_rewards_say_nothing_keeps_its_advantages():
    """Self-rewards .5, .5, .5, .553 deviate by .053 / 2 = .0265 from one another."""
    logps = torch.tensor([-18.0, -18.0, -18.0, -17.47])
    settings = ADVANTAGES.unsqueeze(1), logps, NONE_CUT, GROUP, LATE
    assert mix_self_reward(*settings).equal(ADVANTAGES.unsqueeze(1))
    assert mix_self_reward(*settings, least=0.0266).equal(ADVANTAGES.unsqueeze(1))
    assert not mix_self_reward(*settings, least=0.0264).equal(ADVANTAGES.unsqueeze(1))
    equal = mix_self_reward(ADVANTAGES.unsqueeze(1), torch.full((4,), -18.0), NONE_CUT, GROUP, LATE, least=0.0)
    assert equal.equal(ADVANTAGES.unsqueeze(1))


def test_what_was_cut_has_a_self_reward_of_zero():
    """.95, .3, 0, -.1: mean .2875; squared deviations .438906, .000156, .082656, .150156; variance .223958."""
    cut = torch.tensor([False, False, True, False])
    mixed = mix_self_reward(torch.zeros(4, 1), LOGPS + torch.tensor([0, 0, 1e4, 0]), cut, GROUP, LATE, share=1.0)
    assert_close(mixed[:, 0], [1.399916, 0.026414, -0.607510, -0.818818])


def test_warm_up_counts_steps_that_are_done():
    for step, mixes in ((0, False), (199, False), (200, True), (999, True)):
        mixed = mix_self_reward(ADVANTAGES.unsqueeze(1), LOGPS, NONE_CUT, GROUP, Progress(step, 1000))
        assert mixed.equal(ADVANTAGES.unsqueeze(1)) != mixes
    for step, trains in ((2, False), (3, True)):
        loss, metrics = self_reward_loss(LOGPS, balance(REWARDS), REWARDS == 1, Progress(step, 9), after=3)
        assert (loss.sum() > 0) == trains and metrics["self_reward/error"] > 0


def test_the_loss_has_its_gradient_at_the_appended_position_only():
    """2 alpha scale w (s - r): of the first, 2 * .1 * .1 * (.95 - 1) = -.001."""
    logps = LOGPS.clone().requires_grad_()
    loss, _ = self_reward_loss(logps, balance(REWARDS), REWARDS == 1, START)
    loss.sum().backward()
    assert_close(logps.grad, [-0.001, 0.006, -0.019, -0.002], 1e-7)


@pytest.mark.parametrize(
    ("slot", "stage", "setting"),
    [
        ("aux", self_reward_loss, {"alpha": -0.1}),
        ("aux", self_reward_loss, {"scale": 0}),
        ("aux", self_reward_loss, {"after": 0.5}),
        ("aux", self_reward_loss, {"reference": "low"}),
        ("credits", mix_self_reward, {"share": 1.1}),
        ("credits", mix_self_reward, {"least": -1}),
        ("credits", mix_self_reward, {"clamp": "yes"}),
        ("credits", mix_self_reward, {"after": -1}),
    ],
)
def test_a_wrong_value_gets_one_error_that_names_its_key(slot, stage, setting):
    (name,) = setting
    with pytest.raises(UserError) as refused:
        build({"marks": {"class_balance": class_balance}, slot: {"mine": functools.partial(stage, **setting)}})
    assert str(refused.value).startswith(f"method.{slot}.mine.{name}:")


def test_loss_and_credit_share_what_makes_the_self_reward():
    cfg = composed("+exp=laser_self_reward", "method.aux.self_reward.scale=0.2")
    pipeline = build(instantiate(cfg.method, _convert_="object"))
    (credit,), (loss,) = pipeline["credits"], pipeline["aux"]
    for name in ("scale", "reference"):
        assert credit.call.keywords[name] == loss.call.keywords[name]
    assert credit.call.keywords["scale"] == 0.2


def test_the_papers_settings_are_the_defaults():
    cfg = composed("+mark=class_balance", "+aux=self_reward", "+credit=self_reward").method
    assert cfg.aux.self_reward == {
        "_target_": "rltoken.methods.last_token.self_reward_loss", "_partial_": True, "alpha": 0.1, "scale": 0.1,
        "reference": -23.0, "after": 0, "kinds": ["thinking"],
    }  # fmt: skip
    assert cfg.credits.self_reward == {
        "_target_": "rltoken.methods.last_token.mix_self_reward", "_partial_": True, "share": 0.1, "least": 0.1,
        "clamp": False, "scale": 0.1, "reference": -23.0, "after": 200, "kinds": ["thinking"],
    }  # fmt: skip


def test_the_appended_token_must_be_one_of_the_tokenizer():
    tokenizer = build_tokenizer(World())
    assert parts.appended({"appended": None}, tokenizer) is None
    assert parts.appended({"appended": "<unk>"}, tokenizer) == tokenizer.unk_token_id
    for wrong, told in (("<|vision_start|>", "no token of the tokenizer"), ("<eos>", "ends or pads")):
        with pytest.raises(UserError, match=rf"model\.appended: .*{told}"):
            parts.appended({"appended": wrong}, tokenizer)
