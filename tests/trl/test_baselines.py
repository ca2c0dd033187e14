"""The baselines that are TRL's own fields: each exp has them, and TRL's losses have the worked numbers."""

import pytest
import torch
from hydra import compose, initialize_config_module

from rltoken.config import check_keys, register_schemas
from rltoken.methods.dler import unfinished
from rltoken.methods.kdrl import divergence
from rltoken.parts import rewards
from rltoken.rewards.math import accuracy
from rltoken.train import checked
from tests.methods.configured import composed
from tests.methods.worked import LENGTHS, REWARDS, assert_close, grpo
from tests.trl.losses import loss_of

EXPS = {
    "grpo": {},
    "dapo": {"loss_type": "dapo", "scale_rewards": "group", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "beta": 0.0,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.0},
    "rlvr": {"loss_type": "dapo", "scale_rewards": "group", "beta": 0.01, "use_bias_correction_kl": False},
}
OFF_POLICY = ("gspo", "cispo")
"""They differ from plain policy gradients only there."""


def arguments(exp, folder):
    """The pipeline and the trainer's arguments of an exp in the embedded world."""
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfg = compose("config", overrides=[f"+exp={exp}"])
    check_keys(cfg)
    pipeline, args, _ = checked(cfg, folder)
    return pipeline, args


@pytest.mark.parametrize("exp", EXPS)
def test_an_exp_is_trls_own_fields(exp, tmp_path):
    pipeline, args = arguments(exp, tmp_path)
    assert not pipeline.stages()
    assert {name: getattr(args, name) for name in EXPS[exp]} == EXPS[exp]
    assert (args.num_iterations > 1) == (exp in OFF_POLICY)


LOGPS = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -1.0, -1.5]])
RATIOS = torch.tensor([[0.25, -0.2, 0.0], [0.3, 0.0, 0.3]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
SIGNS = torch.tensor([1.0, -1.0])
LOSSES = {
    "grpo": ({"loss_type": "grpo"}, 0.111937),
    "bnpo": ({"loss_type": "bnpo"}, 0.336197),
    "dapo": ({"loss_type": "dapo"}, 0.336197),
    "clip-higher": ({"loss_type": "dapo", "epsilon_high": 0.28}, 0.320197),
    "dr_grpo": ({"loss_type": "dr_grpo", "max_completion_length": 4}, 0.210123),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, -0.112508),
    "gspo": ({k: v for k, v in EXPS["gspo"].items() if k != "beta"}, 0.110501),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(run, name):
    settings, expected = LOSSES[name]
    trainer = run({}, max_steps=1, **settings).trainer
    assert loss_of(trainer, LOGPS, SIGNS, MASK, old_logps=LOGPS - RATIOS).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("exp", "kept"), [("dapo", [False, True]), ("cispo", [True, True])])
def test_cispo_drops_no_tokens_gradient(run, tmp_path, exp, kept):
    """Two tokens of a correct completion, of which the policy has moved far towards the first."""
    _, args = arguments(exp, tmp_path)
    trainer = run({}, max_steps=1, loss_type=args.loss_type, epsilon_high=args.epsilon_high).trainer
    logps = torch.tensor([[-0.1, -1.0]], requires_grad=True)
    both = torch.ones(1, 2, dtype=torch.long)
    loss_of(trainer, logps, torch.ones(1), both, old_logps=torch.tensor([[-9.0, -1.0]])).backward()
    assert (logps.grad != 0).tolist() == [kept]


VERIFIED = [("so 1,234 apples", "1234", 1.0), ("42 then 41.", "42", 0.0), ("the answer is 41.", "41", 1.0)]


@pytest.mark.parametrize(("completion", "gold", "expected"), VERIFIED)
def test_rlvrs_verifier_takes_the_last_number(completion, gold, expected):
    assert accuracy([completion], answer=[gold], last_number=True) == [expected]


def test_rlvrs_reward_is_ten_for_what_is_right_and_stops(tmp_path):
    """The authors' PPO has -10 for what does not stop, their GRPO 0."""
    _, args = arguments("rlvr", tmp_path)
    verified, cut = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([False, False, True])
    assert unfinished(verified * args.reward_weights[0], cut, factor=0.0).tolist() == [10.0, 0.0, 0.0]


KL = {("k1", 0.1): 0.1, ("k2", 0.1): 0.005, ("k3", 0.1): 0.004837, ("k3", -0.1): 0.005171, ("k3", 1.0): 0.367879}


@pytest.mark.parametrize(("estimator", "d"), KL)
def test_estimators_of_the_divergence(estimator, d):
    """d is the policy's log-probability less the reference's."""
    assert divergence(torch.tensor(-d), estimator, 10.0).item() == pytest.approx(KL[estimator, d], abs=1e-6)


@pytest.mark.parametrize("d", [0.1, -0.1, 1.0])
def test_trls_kl_term_is_k3_without_its_correction(run, d):
    trainer = run({}, max_steps=1, loss_type="dapo", beta=0.01, use_bias_correction_kl=False).trainer
    found = loss_of(trainer, torch.tensor([[d]]), torch.zeros(1), torch.ones(1, 1, dtype=torch.long))
    assert found.item() == pytest.approx(0.01 * KL["k3", d], abs=1e-8)


def test_trls_overlong_punishment_is_added_to_a_reward():
    settings = ("trainer.max_completion_length=4000", "reward.funcs.overlong.soft_punish_cache=1500")
    funcs, _, _ = rewards(composed("reward=[math,overlong]", *settings).reward)
    punished = funcs["overlong"](completions=[""] * 4, completion_ids=[[0] * n for n in LENGTHS.tolist()])
    assert list(funcs) == ["accuracy", "overlong"]
    rewarded = REWARDS + torch.tensor(punished)
    assert_close(rewarded, [1.0, 0.666667, -1.0, 1.0])
    assert_close(grpo(rewarded), [0.609208, 0.261089, -1.479506, 0.609208])
