"""Stages against what TRL does itself, and rows, packs and accumulation against each other."""

import dataclasses
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from rltoken.methods.clip_range import clip_range
from rltoken.methods.entropy_advantage import entropy_advantage
from rltoken.methods.entropy_bonus import entropy_bonus
from rltoken.methods.forced_answer import forced_answer, group_centred
from rltoken.methods.forking_tokens import forks, forks_microbatch
from rltoken.methods.gspo_token import gspo_token
from rltoken.methods.length_regularised import length_regularised
from rltoken.types import Row

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
MAIN = ("grpo", "dr_grpo", "dapo", "cispo")
OFF_POLICY = {"num_iterations": 2}


def losses(*names):
    """Loss types as parameters; those that few use are slow."""
    return [name if name in MAIN else pytest.param(name, marks=pytest.mark.slow) for name in names]


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


@pytest.mark.parametrize("loss_type", MAIN)
@pytest.mark.parametrize("steps_per_generation", [pytest.param(1, marks=pytest.mark.slow), 4])
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


@pytest.mark.parametrize("loss_type", losses(*LOSSES))
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
    assert packed.forwards > whole.forwards
    assert whole.distance(packed) < 5e-7
    assert run({}, **settings | {"learning_rate": 0.0}).distance(whole) > 1e-6


def test_packs_equal_no_packs_with_added_rows_and_accumulation(run):
    stages = {"rows": {"copies": copies}, "aux": {"per_row": lambda logps, mask: (logps * mask).sum(1) * 0.01}}
    settings = {"gradient_accumulation_steps": 2, "optim": "sgd", "loss_type": "dapo"}
    assert run(stages, **settings).distance(run(stages, pack_tokens=40, **settings)) < 5e-7


@pytest.mark.parametrize("loss_type", losses(*MAIN, "sapo", "luspo"))
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


@pytest.mark.parametrize("loss_type", losses(*MAIN, "bnpo", "sapo", "luspo"))
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


def test_rows_of_unequal_number_are_padded_to_whole_families(run):
    """One added row for one of eight thinking rows: each of them gets one, for micro-batches hold whole families."""

    def one_more(rollout, sampler):
        return dataclasses.replace(rollout, rows=[*rollout.rows, Row([5], [6, 7], [0, 1], kind="extra", parent=0)])

    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
    result = run({"rows": {"one": one_more}}, **settings)
    assert all(metrics["rows_per_prompt"] == 8.0 for metrics in result.metrics if "rows_per_prompt" in metrics)


FRAME = {
    "rows": {"force": functools.partial(forced_answer, max_new_tokens=3)},
    "shapes": {"length": functools.partial(length_regularised, longest=12)},
    "credits": {"entropy": functools.partial(entropy_advantage, alpha=0.05), "summary": group_centred},
    "weights": {"forks": functools.partial(forks, rho=0.5, kinds=("thinking", "summary"))},
    "ratios": {"gspo": gspo_token},
    "aux": {"bonus": functools.partial(entropy_bonus, coef=0.1)},
}
SGD = {"optim": "sgd", "max_steps": 2, "loss_type": "dapo"}


def test_padding_of_prompts_and_completions_changes_nothing(run):
    assert run(FRAME, **SGD).distance(run(FRAME, pad_to_multiple_of=32, **SGD)) < 5e-7


def test_values_on_masked_tokens_change_nothing(run):
    """Forced and padded tokens: whatever a credit or a weight says of them, infinity and NaN included."""

    def rubbish(advantages, mask):
        return torch.where(mask > 0, advantages, torch.full_like(advantages, torch.nan))

    def heavy(mask):
        return torch.where(mask > 0, torch.ones_like(mask).float(), torch.full(mask.shape, torch.inf))

    both = {"kinds": ("thinking", "summary")}
    stages = FRAME | {
        "credits": FRAME["credits"] | {"rubbish": functools.partial(rubbish, **both)},
        "weights": FRAME["weights"] | {"heavy": functools.partial(heavy, **both)},
    }
    assert run(FRAME, **SGD).distance(run(stages, **SGD)) == 0.0


def test_the_loss_mask_covers_completions_only(run):
    masks = []

    def look(mask, ids):
        masks.append((mask.shape, ids.shape))
        return mask.float()

    result = run(FRAME | {"weights": {"look": functools.partial(look, kinds=("thinking", "summary"))}}, **SGD)
    assert masks and all(
        mask == ids and mask[1] <= result.trainer.args.max_completion_length + 4 for mask, ids in masks
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_equal_rewards_leave_the_weights_where_they_are(run, tiny, value):
    def constant(completion_ids, **_):
        return [value] * len(completion_ids)

    stages = {slot: FRAME[slot] for slot in ("weights", "ratios")}
    stages["credits"] = {"entropy": FRAME["credits"]["entropy"]}
    start = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32).state_dict()
    for scale_rewards in ("group", "none"):
        trained = run(stages, reward=constant, scale_rewards=scale_rewards, **SGD).weights
        assert all(torch.equal(trained[name], start[name]) for name in start)


def test_a_reward_that_abstains_trains_nothing(run):
    """Rows without any reward have advantage 0 in every slot; the others stay finite."""

    def abstains(completion_ids, **_):
        return [None if ids[0] % 2 else float(len(ids) > 6) for ids in completion_ids]

    result = run(FRAME, reward=abstains, **SGD)
    assert all(value.isfinite().all() for value in result.weights.values())
