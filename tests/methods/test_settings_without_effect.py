"""Settings that would silently change nothing, or something else than they say, are refused or warned of."""

import functools
import logging
import re

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from trl import GRPOConfig

from rltoken import combinations
from rltoken.config import register_schemas, to_grpo_config
from rltoken.errors import UserError
from rltoken.methods.gtpo_entropy import own_share, sequence_ratio
from rltoken.methods.hapo_history import HapoHistory
from rltoken.methods.kdrl import divergence
from rltoken.methods.spine import entropy_band, reference_band
from rltoken.pipeline import build
from rltoken.train import checked
from tests.methods.configured import built

WITH_MARK = ("+mark=class_balance", "+aux=self_reward", "+credit=self_reward")


def check(*overrides):
    """Compose and check as a run does before anything is loaded; the pipeline."""
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfg = compose("config", overrides=list(overrides))
    args = to_grpo_config(cfg.trainer, output_dir="unused", seed=0)
    pipeline = build(instantiate(cfg.method, _convert_="object"))
    combinations.check(pipeline, args)
    return pipeline


REFUSED = {
    "a share of a mean ratio that nothing makes": (
        ["+weight=own_share"],
        r"method\.weights\.own_share: .* half a method, .*gtpo_entropy\.sequence_ratio; choose the method whole",
    ),
    "a mean ratio without each token's share": (
        ["+ratio=sequence_mean"],
        r"method\.ratios\.sequence_mean: .* half a method, .*gtpo_entropy\.own_share",
    ),
    "two bands": (
        ["+aux=[entropy_band,reference_band]"],
        r"method\.aux\.reference_band: it is another form of method\.aux\.entropy_band, .* leave one of them out",
    ),
    "two bands in the other order": (["+aux=[reference_band,entropy_band]"], r"method\.aux\.reference_band: "),
    "a teacher in the loss and in the advantage": (
        ["+aux=kdrl", "+credit=kdrl"],
        r"method\.credits\.kdrl: it is another form of method\.aux\.kdrl",
    ),
    "self-rewards among rewards": (
        ["+exp=laser_self_reward", "trainer.scale_rewards=none"],
        r"trainer\.scale_rewards: 'none' leaves .*method\.credits\.self_reward .*; set it to group",
    ),
    "self-rewards among rewards that another credit transforms": (
        [*WITH_MARK[:2], "+credit=[signed_advantage,self_reward]"],
        r"trainer\.scale_rewards: ",
    ),
    "a clip range as CISPO's cap": (
        ["+exp=cispo", "+bounds=clip_range"],
        r"method\.bounds\.clip_range: trainer\.loss_type=cispo caps the ratio itself, here at 0\.28, .* 1 or more",
    ),
    "the trainer's own clip range as CISPO's cap": (
        ["+exp=cispo", "trainer.epsilon_high=null"],
        r"trainer\.epsilon_high: trainer\.loss_type=cispo caps the ratio itself, here at 0\.2, ",
    ),
    "a control's clip range as CISPO's cap": (
        ["+exp=cispo", "+control=campo"],
        r"method\.controls\.campo: trainer\.loss_type=cispo caps the ratio itself, here at 0\.28, ",
    ),
    "a later stage's clip range as CISPO's cap": (
        ["+exp=cispo", "+control=campo", "method.controls.campo.clips=[[0.2,5.0],[0.2,0.28]]"],
        r"method\.controls\.campo: trainer\.loss_type=cispo caps the ratio itself, here at 0\.28, ",
    ),
    "two scales of one self-reward": (
        ["+exp=laser_self_reward", "method.credits.self_reward.scale=0.2"],
        r"method\.credits\.self_reward\.scale: it is 0\.2 where method\.aux\.self_reward\.scale is 0\.1, ",
    ),
    "two references of one self-reward": (
        ["+exp=laser_self_reward", "method.credits.self_reward.reference=-23"],
        r"method\.credits\.self_reward\.reference: it is -23 where method\.aux\.self_reward\.reference is -13\.8, ",
    ),
    "half of a pair that a mark makes whole": (
        ["+aux=self_reward"],
        r"method\.aux\.self_reward: there is no signal 'class_balance', nor a mark .* '\+mark=class_balance'",
    ),
    "progress of episodes averaged over a response": (
        ["+exp=mrt/episodes", "trainer.importance_sampling_level=sequence"],
        r"trainer\.importance_sampling_level: .* erases the per-token effect of method\.credits\.mrt_episodes",
    ),
    "answers at episodes for nobody": (
        ["+rows=mrt_episodes"],
        r"method\.rows\.mrt_episodes: no stage names 'episode_scores'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    overrides, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        check(*overrides)


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "bnpo", "luspo", "cispo"])
def test_a_mean_ratio_is_refused_where_the_loss_sums_over_tokens(loss_type):
    with pytest.raises(UserError, match=rf"trainer\.loss_type: '{loss_type}' sums .*sequence_mean .*use grpo or sapo"):
        check("+exp=grpo_s", f"trainer.loss_type={loss_type}", "trainer.epsilon_high=5.0")


IDLE = {
    "+weight=thr method.weights.thr": ("tau_mode=none", "beta", 0.5, 1.0),
    "+weight=nthr method.weights.nthr": ("tau_mode=none", "beta", 0.5, 1.0),
    "+exp=kdrl method.aux.kdrl": ("delta=0", "beta_min", 0.001, 0.0),
    "+exp=kdrl/advantage method.credits.kdrl": ("delta=0", "beta_min", 0.001, 0.0),
    "+exp=kdrl/distillation method.aux.kdrl.importance=live method.aux.kdrl": ("estimator=k1", "clip", 5.0, 10.0),
    "+exp=brpo method.credits.brpo": ("mode=v2only", "decay", 0.9, 0.5),
    "+exp=brpo/grpo method.credits.brpo": ("mode=none", "decay", 0.9, 0.5),
    "+shape=l1_max method.shapes.l1_max": ("reading=code", "delta", 0.25, 0.5),
    "+shape=campo method.shapes.campo": ("reading=paper", "penalty", 0.5, 0.1),
    "+control=campo method.controls.campo": ("windows=null", "rise", 0.1, 0.02),
}
"""A choice and its section -> a setting that makes another one idle, that other one, a value of it, and its default."""


@pytest.mark.parametrize("choice", IDLE)
def test_a_setting_that_another_one_makes_idle_keeps_its_default(choice):
    *overrides, section = choice.split()
    switch, idle, value, default = IDLE[choice]
    assert built(*overrides, settings=(f"{section}.{switch}", f"{section}.{idle}={default}"))
    told = f"{idle}: {value} changes nothing beside {switch.replace('null', 'None')}; leave it at {default}, or change "
    with pytest.raises((UserError, InstantiationException), match=told):  # a class is made by Hydra, which wraps it
        built(*overrides, settings=(f"{section}.{switch}", f"{section}.{idle}={value}"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["+exp=grpo_s"],
        ["+exp=grpo_s", "trainer.loss_type=sapo"],
        ["+exp=cispo", "+bounds=clip_range", "method.bounds.clip_range.high=1.0"],
        ["+exp=cispo", "+bounds=unclipped"],
        ["+exp=spine"],
        ["+exp=laser_self_reward"],
        ["+exp=laser_self_reward", "trainer.scale_rewards=batch"],
        ["+exp=laser_self_reward", "method.aux.self_reward.scale=0.2"],  # which the credit follows
        ["+exp=cispo", "+control=campo", "method.controls.campo.clips=[[0.2,5.0]]"],
        [*WITH_MARK[:2], "+credit=[dler,self_reward]"],  # whose advantages are standardised, whatever TRL's are
    ],
    ids=str,
)
def test_not_refused(overrides):
    assert check(*overrides).stages()


OFF_POLICY = "each window is trained in one optimizer step"
WARNED = {
    "ratios on-policy": (["+ratio=gspo_token"], rf"method\.ratios\.gspo_token: {OFF_POLICY}"),
    "all that wait for a ratio, at once": (
        ["+exp=kl_cov", "trainer.num_iterations=1"],
        rf"method\.bounds\.unclipped, method\.aux\.kl_cov: {OFF_POLICY}",
    ),
    "a mixing that never begins": (
        ["+exp=laser_self_reward", "trainer.max_steps=20"],
        r"method\.credits\.self_reward\.after: it begins after 20 optimizer steps, and trainer\.max_steps=20",
    ),
    "a teacher who weighs nothing": (
        ["+exp=kdrl", "method.aux.kdrl.beta=0"],
        r"method\.aux\.kdrl: with beta=0 it changes nothing; .*'~method\.aux\.kdrl'",
    ),
    "a teacher who weighs nothing in the advantage": (
        ["+exp=kdrl/advantage", "method.credits.kdrl.beta=0"],
        r"method\.credits\.kdrl: with beta=0 it changes nothing",
    ),
    "weights of 1": (
        ["+exp=thr", "method.weights.thr.p=0", "method.weights.thr.tau_mode=none"],
        r"method\.weights\.thr: with p=0 and tau_mode=none it changes nothing",
    ),
    "a divergence without its weight off-policy": (
        ["+exp=kdrl", "method.aux.kdrl.importance=none", "trainer.num_iterations=2"],
        r"method\.aux\.kdrl\.importance: each window is trained in 2 optimizer steps, .* set it to detached\.",
    ),
    "limits that come after the end": (
        ["+control=think_prune"],
        r"method\.controls\.think_prune: in the first and in the last step .* trainer\.max_steps=60",
    ),
    "a length that another control sets after it": (
        ["+exp=campo", "+control=length_schedule"],
        r"method\.controls\.length_schedule: it sets max_completion_length too, so that .*\.campo has no say",
    ),
    "skipped groups that nobody asks about": (
        ["+exp=grpo", "+weight=mixed_groups"],
        r"method\.weights\.mixed_groups: it matters to stages that name 'weight' alone, and there is none",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_warned_of(caplog, name):
    overrides, message = WARNED[name]
    with caplog.at_level(logging.WARNING):
        check(*overrides)
    (record,) = (record for record in caplog.records if record.name == "rltoken.combinations")
    assert re.match(message, record.getMessage())


@pytest.mark.parametrize(
    ("problems", "settings", "warned"),
    [(480, {}, True), (479, {}, False), (240, {"num_iterations": 2}, True), (1, {"max_steps": -1}, True),
     (480, {"max_steps": -1, "num_train_epochs": 2}, False)],
)  # fmt: skip
def test_a_history_of_problems_that_come_once_is_warned_of(caplog, problems, settings, warned):
    """60 steps of 64 rows in groups of 8 are 480 problems."""
    pipeline = build({"shapes": {"hapo_history": HapoHistory()}})
    args = GRPOConfig(
        use_cpu=True, bf16=False, per_device_train_batch_size=64, gradient_accumulation_steps=1, num_generations=8,
        **{"max_steps": 60, "num_train_epochs": 1, **settings},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        combinations.warn_of_one_pass(pipeline, args, problems)
        combinations.warn_of_one_pass(build({}), args, problems)
    told = [record.getMessage() for record in caplog.records if record.name == "rltoken.combinations"]
    assert len(told) == warned and all(text.startswith("method.shapes.hapo_history: ") for text in told)


@pytest.mark.parametrize(
    "overrides", [["+exp=kl_cov", "trainer.num_iterations=1"], ["+exp=campo", "+control=length_schedule"]]
)
def test_a_run_is_warned_by_its_trainer_alone(caplog, tmp_path, overrides):
    """Which checks once more, when there is a log: what is checked before anything is loaded refuses only."""
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfg = compose("config", overrides=overrides)
    with caplog.at_level(logging.WARNING):
        checked(cfg, tmp_path)
    assert not [record for record in caplog.records if record.name == "rltoken.combinations"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["+exp=kl_cov"],
        ["+exp=grpo_s", "trainer.num_iterations=2"],
        ["+exp=laser_self_reward", "trainer.max_steps=21"],
        ["+exp=laser_self_reward", "trainer.max_steps=-1", "trainer.num_train_epochs=1"],  # nobody knows how many
        ["+exp=think_prune"],
        ["+control=length_schedule"],
        ["+exp=hapo_entropy"],  # its control sets nothing until it has seen a window
        ["+exp=spine"],
        ["+exp=kdrl", "trainer.num_iterations=2"],
        ["+exp=thr", "method.weights.thr.p=0"],  # which leaves out tokens of little influence
        ["+exp=thr", "method.weights.thr.tau_mode=none"],
        ["+exp=kdrl", "method.aux.kdrl.importance=none"],
        ["+weight=mixed_groups", "+credit=dler"],  # which may give equal rewards an advantage
    ],
    ids=str,
)
def test_what_acts_is_not_warned_of(caplog, overrides):
    with caplog.at_level(logging.WARNING):
        check(*overrides)
    assert not [record for record in caplog.records if record.name == "rltoken.combinations"]


def test_k1_has_a_gradient_that_does_not_know_the_teacher():
    """Why KDRL refuses it without a live weight: whatever the teacher says, the gradient is that of log pi."""
    logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    gradients = [
        torch.autograd.grad(divergence(teacher - logps, "k1", clip=10.0).sum(), logps)[0]
        for teacher in (torch.tensor([-0.1, -3.0, -1.0]), torch.tensor([-4.0, -0.2, -2.0]))
    ]
    assert gradients[0].tolist() == gradients[1].tolist() == [1.0, 1.0, 1.0]


def test_halves_and_forms_may_be_settings_of_a_user():
    """Named by hand, with settings bound, they are known by their functions."""
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "bf16": False, "use_cpu": True}
    args = GRPOConfig(output_dir="unused", loss_type="grpo", **settings)
    own = functools.partial(own_share, kinds=("thinking",))
    combinations.check(build({"weights": {"mine": own}, "ratios": {"its": sequence_ratio}}), args)
    with pytest.raises(UserError, match=r"method\.weights\.mine: "):
        combinations.check(build({"weights": {"mine": own}}), args)
    bands = {"one": functools.partial(entropy_band, coef=0.1), "other": functools.partial(reference_band, coef=0.1)}
    with pytest.raises(UserError, match=r"method\.aux\.other: it is another form of method\.aux\.one"):
        combinations.check(build({"aux": bands}), args)
