"""Stages against what TRL does itself, and rows, packs and accumulation against each other."""

import dataclasses
import functools

import pytest
import torch

from rltoken.methods.clip_range import clip_range
from rltoken.methods.entropy_bonus import entropy_bonus
from rltoken.methods.forking_tokens import forks, forks_microbatch
from rltoken.methods.gspo_token import gspo_token
from rltoken.methods.length_regularised import length_regularised
from rltoken.types import Row

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
OFF_POLICY = {"num_iterations": 2}


def test_forks_microbatch_is_top_entropy_quantile(run):
    stages = {"weights": {"forks": functools.partial(forks_microbatch, rho=0.2)}}
    assert run(top_entropy_quantile=0.2, **OFF_POLICY).distance(run(stages, **OFF_POLICY)) == 0.0


def test_forks_over_a_window_of_one_microbatch_is_top_entropy_quantile(run):
    stages = {"weights": {"forks": functools.partial(forks, rho=0.2)}}
    assert run(top_entropy_quantile=0.2).distance(run(stages)) == 0.0


def test_forks_change_the_weights(run):
    assert run().distance(run({"weights": {"forks": functools.partial(forks, rho=0.2)}})) > 1e-4


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_constant_bounds_are_trls_clip(run, loss_type):
    high = 5.0 if loss_type == "cispo" else 0.02
    stages = {"bounds": {"range": functools.partial(clip_range, low=0.01, high=high)}}
    settings = OFF_POLICY | {"loss_type": loss_type}
    stock = run(epsilon=0.01, epsilon_high=high, **settings)
    assert stock.distance(run(stages, **settings)) == 0.0
    assert loss_type == "cispo" or max(m.get("clip_ratio/region_mean", 0) for m in stock.metrics) > 0


def test_gspo_token_equals_sequence_ratios_where_advantages_are_per_sequence(run):
    """With one advantage per response GSPO and GSPO-token have the same gradient (paper, section 4.3)."""
    settings = OFF_POLICY | {"loss_type": "grpo", "epsilon": 0.01, "optim": "sgd", "learning_rate": 0.3, "max_steps": 2}
    sequence = run(importance_sampling_level="sequence", **settings)
    token = run({"ratios": {"gspo": gspo_token}}, **settings)
    assert sequence.distance(token) < 1e-6
    assert sequence.distance(run(**settings)) > 1e-4


def copies(rollout, sampler):
    """Add a copy of every row."""
    added = [dataclasses.replace(row, kind="copy", parent=i) for i, row in enumerate(rollout.rows)]
    return dataclasses.replace(rollout, rows=rollout.rows + added)


def halves(mask):
    """Half the weight for every token."""
    return mask * 0 + 0.5


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize("steps_per_generation", [1, 4])
def test_copies_of_half_weight_change_nothing(run, loss_type, steps_per_generation):
    stages = {
        "rows": {"copies": copies},
        "weights": {"halves": functools.partial(halves, kinds=("thinking", "copy"))},
    }
    settings = {
        "loss_type": loss_type,
        "epsilon_high": 5.0 if loss_type == "cispo" else 0.2,
        "gradient_accumulation_steps": steps_per_generation,
        "per_device_train_batch_size": 8 // steps_per_generation,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": 1,  # a larger window takes more of the random stream when TRL shuffles it
    }
    stock, ours = run({}, **settings), run(stages, **settings)
    assert stock.distance(ours) < 1e-7
    whole = run({"rows": {"copies": copies}}, **settings)
    assert stock.distance(whole) > 1e-5
    counted = run({"rows": {"copies": copies}}, normaliser="all", **settings)
    assert stock.distance(counted) < 1e-7


@pytest.mark.parametrize("loss_type", LOSSES)
def test_packs_equal_no_packs(run, loss_type):
    stages = {"aux": {"bonus": functools.partial(entropy_bonus, coef=0.1)}} if loss_type != "vespo" else {}
    settings = {
        "loss_type": loss_type,
        "epsilon_high": 5.0 if loss_type == "cispo" else 0.2,
        "num_iterations": 2,
        "optim": "sgd",
        "learning_rate": 1e-2,
    }
    whole, packed = run(stages, **settings), run(stages, pack_tokens=40, **settings)
    assert whole.distance(packed) < 5e-7
    assert run({}, **settings | {"learning_rate": 0.0}).distance(whole) > 1e-6


def test_packs_equal_no_packs_with_added_rows_and_accumulation(run):
    stages = {"rows": {"copies": copies}, "aux": {"per_row": lambda logps, mask: (logps * mask).sum(1) * 0.01}}
    settings = {"gradient_accumulation_steps": 2, "optim": "sgd", "loss_type": "dapo"}
    assert run(stages, **settings).distance(run(stages, pack_tokens=40, **settings)) < 5e-7


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"])
def test_accumulation_equals_one_batch(run, loss_type):
    stages = {
        "shapes": {"length": functools.partial(length_regularised, longest=12)},
        "weights": {"forks": functools.partial(forks, rho=0.5)},
        "aux": {"bonus": functools.partial(entropy_bonus, coef=0.1)},
    }
    settings = {"loss_type": loss_type, "epsilon_high": 5.0 if loss_type == "cispo" else 0.2, "optim": "sgd"}
    one = run(stages, per_device_train_batch_size=8, **settings)
    four = run(stages, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert one.distance(four) < 5e-7


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"])
def test_auxiliary_losses_are_reduced_as_trl_reduces(run, loss_type):
    """TRL's KL term, per token, as an auxiliary loss: the same reduction must give the same weights."""
    beta = 0.5

    def kl(logps, ref_logps):
        difference = ref_logps - logps
        return beta * (torch.exp(difference) - difference - 1)

    settings = {
        "loss_type": loss_type,
        "epsilon_high": 5.0 if loss_type == "cispo" else 0.2,
        "use_bias_correction_kl": False,
        "optim": "sgd",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
    }
    stock = run(beta=beta, **settings)
    assert stock.distance(run({"aux": {"kl": kl}}, **settings)) < 5e-7
    assert stock.distance(run(**settings)) > 1e-6


def test_shaped_rewards_reach_the_advantages_the_metrics_and_the_table(run):
    stages = {"shapes": {"double": lambda rewards: rewards * 2}}
    plain, doubled = run({}, scale_rewards="none"), run(stages, scale_rewards="none")
    assert doubled.metrics[0]["reward"] == pytest.approx(2 * plain.metrics[0]["reward"])
    assert doubled.metrics[0]["rewards/shaped/mean"] == pytest.approx(2 * plain.metrics[0]["reward"])
    raw = plain.metrics[0]["rewards/token_parity/mean"]
    assert doubled.metrics[0]["rewards/token_parity/mean"] == pytest.approx(raw)
    assert doubled.trainer.reward_func_names == ["token_parity"]


def test_rows_of_unequal_number_are_padded_to_the_split(run):
    def one_more(rollout, sampler):
        return dataclasses.replace(rollout, rows=[*rollout.rows, Row([5], [6, 7], [0, 1], kind="extra", parent=0)])

    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
    result = run({"rows": {"one": one_more}}, **settings)
    assert all(metrics["rows_per_prompt"] == 6.0 for metrics in result.metrics if "rows_per_prompt" in metrics)
