"""TTRL and SPINE on real windows: oracles, what the weights reach, the reference, resume, refusals."""

import functools
import math

import pytest
import torch

from rltoken.errors import UserError
from rltoken.methods.forking_tokens import forks, forks_microbatch
from rltoken.methods.gtpo_entropy import gtpo
from rltoken.methods.length_regularised import length_regularised
from rltoken.methods.spine import (
    entropy_band,
    masked_kl,
    mixed_groups,
    random_tokens,
    reference_band,
    spine_forks,
)
from rltoken.methods.thr import thr
from rltoken.methods.ttrl import extra_votes, majority_vote, majority_vote_with_extra
from rltoken.signals import plain_text


def classes(texts, group):
    """Two answers, told apart by the number of words; none where there is no word."""
    return [len(text.split()) % 2 if text.split() else -1 for text in texts]


TTRL = {"shapes": {"ttrl": majority_vote}}
VOTED = {"classes": classes, "loss_type": "dapo"}
SGD = {"optim": "sgd", "learning_rate": 1e-2}


def spine(*, rho=0.3, kl=1.0, band=0.5, frozen=False):
    """The stages of SPINE."""
    return TTRL | {
        "weights": {"forks": functools.partial(spine_forks, rho=rho), "mixed": mixed_groups},
        "aux": {
            "kl": functools.partial(masked_kl, coef=kl),
            "band": functools.partial(reference_band if frozen else entropy_band, coef=band),
        },
    }


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_spine_without_band_and_anchor_on_all_tokens_is_ttrl(run, loss_type):
    settings = VOTED | {"loss_type": loss_type, "num_iterations": 2}
    ttrl = run(TTRL, **settings)
    assert ttrl.distance(run(spine(rho=1.0, kl=0.0, band=0.0), **settings)) == 0.0
    assert ttrl.distance(run(spine(), **settings)) > 1e-5


def test_gold_reaches_no_stage_after_the_vote(run):
    """What the reward functions say may be turned round, and every tensor is the same."""
    stages = {
        "shapes": TTRL["shapes"] | {"length": functools.partial(length_regularised, longest=12)},
        "credits": {"gtpo": gtpo},
        "weights": {"thr": functools.partial(thr, p=0.3)},
    }

    def even(completion_ids, **_):
        return [float(len(ids) % 2 == 0) for ids in completion_ids]

    def odd(completion_ids, **_):
        return [1.0 - value for value in even(completion_ids)]

    settings = {"classes": classes, "scale_rewards": "none", "num_iterations": 2}
    voted = run(stages, reward=even, **settings)
    assert voted.distance(run(stages, reward=odd, **settings)) == 0.0
    gold = stages | {"shapes": {"length": functools.partial(length_regularised, longest=12)}}
    assert run(gold, reward=even, **settings).distance(run(gold, reward=odd, **settings)) > 1e-4


def test_votes_that_nobody_counts_are_refused(run):
    with pytest.raises(UserError, match=r"method\.rows\.votes: no stage names 'extra_answers'"):
        run({"rows": {"votes": functools.partial(extra_votes, votes=2)}})


def loss_of_the_equations(logps, entropy, old_logps, old_entropy, ref_logps, mask, rewards, group, *, rho, kl, band):
    """SPINE's objective, fork by fork: the sum over the forks of mixed groups, divided by all forks of the window."""
    total, forks = 0.0, 0
    for i, length in enumerate(mask.sum(1).tolist()):
        mates = rewards[group == group[i]]
        advantage = float((rewards[i] - mates.mean()) / (mates.std() + 1e-4))
        order = sorted(range(length), key=lambda t: -float(old_entropy[i, t]))
        chosen = order[: max(1, round(rho * length))]
        low, high = (float(entropy[i, chosen].quantile(q)) for q in (0.1, 0.5))
        forks += len(chosen)
        for t in chosen if mates.min() < mates.max() else ():
            ratio = math.exp(logps[i, t] - old_logps[i, t])
            surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            gap = float(ref_logps[i, t] - logps[i, t])
            outside = max(0.0, float(entropy[i, t]) - high) + max(0.0, low - float(entropy[i, t]))
            total += -surrogate + kl * (math.exp(gap) - gap - 1) + band * outside
    return total / forks


def test_the_loss_is_that_of_the_equations(run):
    """On- and off-policy, against a brute force that shares no code with the stages."""
    expected, coefficients = [], {"rho": 0.3, "kl": 1.0, "band": 0.5}

    def look(logps, entropy, old_logps, old_entropy, ref_logps, mask, rewards, group):
        signals = (logps.detach(), entropy.detach(), old_logps, old_entropy, ref_logps, mask, rewards, group)
        expected.append(loss_of_the_equations(*signals, **coefficients))
        return logps * 0

    stages = spine(**coefficients)
    stages["aux"] = stages["aux"] | {"look": look}
    result = run(stages, num_iterations=2, scale_rewards="group", max_steps=6, **VOTED)
    assert [metrics["loss"] for metrics in result.metrics[:6]] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert min(abs(loss) for loss in expected[1:]) > 1e-4


def test_ttrl_is_grpo_on_the_votes(run):
    """A reward function that votes as the stage does, on one process: the same weights."""

    def voted(completions, **_):
        found = torch.tensor(classes([plain_text(completion) for completion in completions], None))
        group = torch.arange(len(found)) // 4
        rewards = torch.zeros(len(found))
        return majority_vote(rewards, rewards > 0, group, found)[0].tolist()

    assert run(reward=voted, loss_type="dapo").distance(run(TTRL, **VOTED)) == 0.0
    assert run(loss_type="dapo").distance(run(TTRL, **VOTED)) > 1e-4


def test_the_anchor_on_all_tokens_is_trls_kl(run):
    settings = SGD | {"num_iterations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    stock = run(beta=0.5, use_bias_correction_kl=False, **settings)
    assert stock.distance(run({"aux": {"kl": functools.partial(masked_kl, coef=0.5)}}, **settings)) < 5e-7
    assert stock.distance(run(**settings)) > 1e-6


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}])
@pytest.mark.parametrize("pack_tokens", [None, 40])
def test_auxiliary_losses_see_the_product_of_all_weights(run, settings, pack_tokens):
    """Of a window's and a forward's, each on the token it was made for, after shuffle, split and packs."""
    seen = []

    def look(logps, weight, ids, mask):
        seen.append((weight.requires_grad, torch.equal(weight, torch.where(mask > 0, ids % 3 * 2.0, 1.0))))
        return logps * 0

    stages = {
        "weights": {"window": lambda ids: ids % 3, "live": lambda entropy: entropy * 0 + 2},
        "aux": {"look": look},
    }
    run(stages, pack_tokens=pack_tokens, **settings)
    assert len(seen) >= 4 and set(seen) == {(False, True)}


def test_without_a_weight_stage_the_weight_is_one(run):
    seen = []

    def look(logps, weight):
        seen.append(bool((weight == 1).all()))
        return logps * 0

    run({"aux": {"look": look}}, max_steps=2)
    assert seen == [True, True]


def test_the_weight_cannot_be_had_before_all_weights_are_known(run):
    with pytest.raises(UserError, match="signal 'weight' cannot be had in the slot 'weights'"):
        run({"weights": {"early": lambda weight: weight}})


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_reference_is_the_model_before_training(run, lora, beta):
    """Of a new adapter its base; with TRL's own reference too."""
    seen = []

    def look(ref_entropy, old_entropy, ref_logps, old_logps, mask):
        pairs = ((ref_entropy, old_entropy), (ref_logps, old_logps))
        seen.append([((a - b) * mask).abs().max().item() for a, b in pairs])
        return mask * 0 + 1.0

    run({"weights": {"look": look}}, lora=lora, beta=beta, learning_rate=5e-2)
    assert max(seen[0]) < 1e-5 and min(seen[-1]) > 1e-3


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_an_adapter_trains_off_policy_from_its_base(run, frozen):
    result = run(spine(frozen=frozen), lora=True, num_iterations=2, **VOTED)
    assert all(value.isfinite().all() for value in result.weights.values())
    kl = [metrics["spine/kl"] for metrics in result.metrics if "spine/kl" in metrics]
    assert kl[0] == pytest.approx(0.0, abs=1e-8) and kl[-1] > 1e-6


def test_gradient_checkpointing_changes_nothing(run):
    settings = VOTED | SGD
    plain, checkpointed = run(spine(), **settings), run(spine(), gradient_checkpointing=True, **settings)
    assert plain.distance(checkpointed) < 1e-7


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "grpo"])
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_accumulation_and_packs_change_nothing(run, loss_type, frozen):
    settings = VOTED | SGD | {"loss_type": loss_type}
    one = run(spine(frozen=frozen), per_device_train_batch_size=8, **settings)
    four = run(spine(frozen=frozen), per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    packed = run(spine(frozen=frozen), per_device_train_batch_size=8, pack_tokens=40, **settings)
    assert packed.forwards > one.forwards
    assert one.distance(four) < 5e-7 and one.distance(packed) < 5e-7


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resume_is_exact(run, tmp_path, step):
    """Frozen thresholds, the anchor and random tokens, at an odd step of a window."""
    stages = spine(frozen=True)
    stages["weights"]["random"] = functools.partial(random_tokens, rho=0.8)
    settings = VOTED | {"steps_per_generation": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    whole = run(stages, output_dir=tmp_path / "whole", **settings)
    checkpoint = str(tmp_path / f"whole/checkpoint-{step}")
    resumed = run(stages, output_dir=tmp_path / "resumed", resume=checkpoint, **settings)
    assert whole.distance(resumed) == 0.0 and whole.metrics == resumed.metrics


def test_random_tokens_differ_between_windows(run):
    kept = []

    def look(logps, weight, mask):
        kept.append(((weight > 0) & (mask > 0)).nonzero().tolist())
        return logps * 0

    run({"weights": {"random": functools.partial(random_tokens, rho=0.5)}, "aux": {"look": look}}, learning_rate=0.0)
    assert len(kept) == 4 and all(kept) and len({str(tokens) for tokens in kept}) == 4


def test_extra_votes_are_sampled_and_decide_but_are_not_trained(run):
    """Six votes beside each group of four, whose answers every row of the group sees; the reward is their vote's."""
    seen = []

    def look(advantages, extra_answers, answers, rewards, group, correct, mask):
        voted = majority_vote_with_extra(rewards, correct, group, answers, extra_answers)[0]
        seen.append((extra_answers.clone(), group.clone(), torch.equal(voted, rewards), len(mask)))
        return advantages

    stages = {"rows": {"extra": functools.partial(extra_votes, votes=6)}, "credits": {"look": look}}
    result = run(stages | {"shapes": {"ttrl": majority_vote_with_extra}}, max_steps=2, **VOTED)
    for answers, group, as_voted, rows in seen:
        assert answers.shape == (8, 6) and as_voted and rows == 8
        assert all(torch.equal(answers[i], answers[4 * int(number)]) for i, number in enumerate(group))
    assert len({str(answers.tolist()) for answers, *_ in seen}) == 2
    assert all(metrics["rows_per_prompt"] == 4 for metrics in result.metrics[:2])


def test_extra_votes_that_are_not_there_are_refused(run):
    with pytest.raises(UserError, match="no rows stage publishes 'extra_answers'"):
        run({"shapes": {"ttrl": majority_vote_with_extra}}, **VOTED)
    same = {"rows": {"same": lambda rollout, sampler: rollout}, "shapes": {"ttrl": majority_vote_with_extra}}
    with pytest.raises(UserError, match="no rows stage published 'extra_answers'"):
        run(same, **VOTED)


def test_votes_are_logged(run):
    result = run(TTRL, max_steps=2, **VOTED)
    for metrics in result.metrics[:2]:
        assert 0.5 <= metrics["ttrl/majority_share"] <= 1
        assert 0 <= metrics["ttrl/label_accuracy"] <= 1 and 0 <= metrics["ttrl/reward_accuracy"] <= 1


def test_without_gold_there_is_a_reward_all_the_same(run):
    result = run(TTRL, reward=lambda completions, **_: [None] * len(completions), max_steps=2, **VOTED)
    assert all("ttrl/label_accuracy" not in metrics for metrics in result.metrics)
    assert result.metrics[0]["reward"] > 0 and result.metrics[0]["grad_norm"] > 0


@pytest.mark.parametrize("weights", [{}, {"forks": forks}, {"forks": forks_microbatch}])
def test_the_anchor_is_refused_beside_trls_kl(run, weights):
    with pytest.raises(UserError, match=r"trainer\.beta: 0\.1 would add TRL's KL term .* method\.aux\.kl"):
        run({"weights": weights, "aux": {"kl": masked_kl}}, beta=0.1)
