"""Clip-Cov, KL-Cov, GTPO and GRPO-S in the trainer: GRPO with nothing selected; the window decides, not the batch."""

import functools

import pytest
import torch

from rltoken.errors import UserError
from rltoken.methods.clip_range import clip_range
from rltoken.methods.entropy_covariance import clip_cov, high_covariance, kl_cov, unclipped
from rltoken.methods.gtpo_entropy import grpo_s, gtpo, own_share, sequence_ratio

OFF_POLICY = {"num_iterations": 2}


def even_first(completion_ids, **_):
    """1 for completions whose first token is even, so that most groups have both."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def kl_cov_stages(share, beta=1.0):
    return {
        "marks": {"high_covariance": functools.partial(high_covariance, share=share)},
        "bounds": {"unclipped": unclipped},
        "aux": {"kl_cov": functools.partial(kl_cov, beta=beta)},
    }


SEQUENCES = {"ratios": {"mean": sequence_ratio}, "weights": {"own": own_share}}
STAGES = {
    "kl_cov": kl_cov_stages(0.2),
    "clip_cov": {"weights": {"clip_cov": functools.partial(clip_cov, share=0.2, lower=0.0)}},
    "gtpo": {"credits": {"gtpo": gtpo}},
    "grpo_s": {"credits": {"grpo_s": grpo_s}, **SEQUENCES},
}


def test_kl_cov_with_nothing_selected_is_unclipped_grpo(run):
    stock = run(epsilon=1.0, epsilon_high=1e9, **OFF_POLICY)
    assert stock.distance(run(kl_cov_stages(0.0), **OFF_POLICY)) == 0.0
    assert stock.distance(run(kl_cov_stages(0.2), **OFF_POLICY)) > 1e-4
    assert stock.distance(run(kl_cov_stages(0.2, beta=0.0), **OFF_POLICY)) == 0.0


def test_clip_cov_with_nothing_selected_is_grpo(run):
    stock = run(**OFF_POLICY)
    assert stock.distance(run({"weights": {"none": functools.partial(clip_cov, share=0.0)}}, **OFF_POLICY)) == 0.0
    assert stock.distance(run(STAGES["clip_cov"], **OFF_POLICY)) > 1e-4


def test_grpo_s_without_a_bonus_is_grpo_on_policy(run):
    settings = {"reward": even_first, "loss_type": "grpo", "optim": "sgd", "learning_rate": 1.0, "max_steps": 2}
    stages = {"credits": {"grpo_s": functools.partial(grpo_s, bonus=0.0)}, **SEQUENCES}
    stock = run(**settings)
    assert stock.distance(run(stages, **settings)) < 1e-6
    assert stock.distance(run(**settings | {"learning_rate": 0.0})) > 1e-3


def test_kl_cov_does_nothing_on_policy(run):
    assert run().distance(run(kl_cov_stages(0.5))) == 0.0


@pytest.mark.parametrize("name", STAGES)
def test_accumulation_and_packs_equal_one_batch(run, name):
    loss_type = "grpo" if name == "grpo_s" else "dapo"  # its weight is one of the response
    settings = {"reward": even_first, "loss_type": loss_type, "optim": "sgd", **OFF_POLICY}
    one = run(STAGES[name], per_device_train_batch_size=8, **settings)
    four = run(STAGES[name], per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert one.distance(four) < 5e-7
    assert one.distance(run(STAGES[name], pack_tokens=40, **settings)) < 5e-7


def test_a_mark_rides_along_as_it_was_made_per_row_and_per_token(run):
    made, seen = [], []

    def of_row(lengths):
        made.append(lengths.sort().values.tolist())
        return lengths.double()

    def of_token(mask):
        return 2.0 * mask

    def look(logps, of_row, of_token, mask):
        seen.append((of_row, of_token.equal(2.0 * mask), of_row.dim()))
        return 0.0 * logps

    stages = {"marks": {"of_row": of_row, "of_token": of_token}, "aux": {"look": look}}
    run(stages, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2)
    assert len(made) == 2 and len(seen) == 4
    assert all(same and dim == 1 for _, same, dim in seen)
    for number in range(2):
        halves = torch.cat([row for row, *_ in seen[2 * number : 2 * number + 2]])
        assert halves.sort().values.tolist() == made[number]


def test_a_window_stage_may_name_a_mark_too(run):
    stages = {
        "marks": {"longer": lambda lengths: (lengths > 6).float()},
        "weights": {"only": lambda longer, mask: longer.unsqueeze(1) * mask},
    }
    direct = {"weights": {"only": lambda lengths, mask: (lengths > 6).unsqueeze(1) * mask}}
    assert run(stages).distance(run(direct)) == 0.0


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ({"marks": {"high_covariance": high_covariance}}, r"method\.marks\.high_covariance: no stage names"),
        ({"marks": {"entropy": high_covariance}}, r"method\.marks\.entropy: there is a signal of that name"),
        ({"aux": {"kl_cov": kl_cov}}, r"method\.aux\.kl_cov: there is no signal 'high_covariance'.*\+mark=high_cov"),
        (
            {"marks": {"live": lambda logps: logps}, "bounds": {"range": clip_range}},
            r"method\.marks\.live: the signal 'logps' cannot be had in the slot 'marks'",
        ),
        ({"marks": {"one": lambda: torch.ones(())}, "weights": {"w": lambda one: one}}, r"marks\.one: .* one number"),
    ],
)
def test_marks_that_make_no_sense_are_refused(run, stages, told):
    with pytest.raises(UserError, match=told):
        run(stages)
