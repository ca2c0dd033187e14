"""Heterogeneous HAPO in training: DAPO with every part off, each part alone, resumed, split, sampled by generate."""

import dataclasses
import functools
import math

import pytest
import torch

from rltoken.methods import hapo_entropy
from rltoken.methods.hapo_entropy import AdaptiveTemperature, Redistribution, adaptive_clip, token_average

RANGE = {"epsilon": 0.02, "epsilon_high": 0.028}
DAPO = {"loss_type": "dapo", "num_iterations": 2, "delta": 10.0, **RANGE}
LOGITS = "control/logits/pivot"


def method(*, tau=0.0, alpha=0.0, beta=0.0, average=False):
    """The stages of HAPO, fresh ones since some keep state; everything is off unless it is asked for."""
    clip = functools.partial(adaptive_clip, low=RANGE["epsilon"], high=RANGE["epsilon_high"], alpha=alpha)
    return {
        "controls": {"hapo": AdaptiveTemperature(tau=tau, form="scaled")},  # a random model has hardly any spread
        "credits": {"hapo": token_average} if average else {},
        "bounds": {"hapo": clip},
        "weights": {"hapo": Redistribution(beta=beta)},
    }


PARTS = {"temperature": {"tau": 0.5}, "average": {"average": True}, "clip": {"alpha": 1.0}, "credit": {"beta": 1.0}}
ALL = {"tau": 0.5, "average": True, "alpha": 1.0, "beta": 1.0}


def test_with_every_part_off_it_is_dapo(run):
    dapo, off = run(**DAPO), run(method(), **DAPO)
    assert dapo.distance(off) == 0.0
    own = {"thinking_tokens", "rows_per_prompt"}
    for theirs, ours in zip(dapo.metrics, off.metrics, strict=True):
        assert theirs == {
            key: value for key, value in ours.items() if not key.startswith("control/") and key not in own
        }


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_changes_what_is_trained(run, part):
    assert run(method(), **DAPO).distance(run(method(**PARTS[part]), **DAPO)) > 1e-4


def test_on_policy_the_clip_range_does_nothing_and_credit_is_only_damped(run):
    settings = DAPO | {"num_iterations": 1}
    off = run(method(), **settings)
    assert off.distance(run(method(alpha=1.0), **settings)) == 0.0
    weights = []

    class Recorded(Redistribution):
        def __call__(self, ratio, eps_low, eps_high, observed):
            weights.append(super().__call__(ratio, eps_low, eps_high, observed))
            return weights[-1]

    run(method() | {"weights": {"hapo": Recorded()}}, **settings)
    assert all(found.max() == 1 and found.min() == 0 for found in weights)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resume_is_exact(run, tmp_path, step):
    settings = DAPO | {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    whole = run(method(**ALL), output_dir=tmp_path / "whole", **settings)
    checkpoint = str(tmp_path / f"whole/checkpoint-{step}")
    resumed = run(method(**ALL), output_dir=tmp_path / "resumed", resume=checkpoint, **settings)
    assert whole.distance(resumed) == 0.0
    assert whole.metrics[-2:] == resumed.metrics[-2:]
    assert whole.trainer.pipeline.state_dict() == resumed.trainer.pipeline.state_dict() != {"method.controls.hapo": {}}


SPLIT = {
    "micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "packs": {"pack_tokens": 40},
}


@pytest.mark.parametrize("name", SPLIT)
def test_however_a_window_is_split_its_levels_are_its_own(run, name):
    settings = DAPO | {"optim": "sgd"}
    one, parts = run(method(**ALL), **settings), run(method(**ALL), **settings | SPLIT[name])
    assert one.distance(parts) < 5e-7
    assert one.distance(run(method(**ALL), **settings | {"learning_rate": 0.0})) > 1e-6


@pytest.mark.parametrize("lora", [False, True])
def test_only_windows_after_the_first_are_sampled_at_other_temperatures(run, monkeypatch, lora):
    stock, calls = hapo_entropy.tempered, []

    @functools.wraps(stock)
    def counted(logits, **settings):
        calls.append(settings["pivot"])
        return stock(logits, **settings)

    monkeypatch.setattr(hapo_entropy, "tempered", counted)
    done = run(method(tau=0.5), lora=lora, **DAPO)
    told = [entry.get(LOGITS) for entry in done.metrics if "reward" in entry]
    assert told[0] is None and told[1] is not None and set(calls) == {told[1]}
    assert "generate" not in vars(done.trainer.accelerator.unwrap_model(done.trainer.model))


def test_generate_samples_each_token_at_its_own_temperature(run):
    trainer = run({}, max_steps=1, **DAPO).trainer
    control = AdaptiveTemperature(tau=0.5, temperature=0.7)
    control.load_state_dict({"pivot": math.log(3.8), "sigma": 0.05, "above": 0.1, "below": 0.1})
    change = control()["logits"]
    prompts = torch.tensor(trainer.tokenize([trainer.train_dataset[0]] * 3))
    settings = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 8, "top_k": 0, "return_dict_in_generate": True}
    with trainer.changing_logits(change):
        found = trainer.model.generate(prompts, output_scores=True, output_logits=True, **settings)
    factors = []
    for raw, scores in zip(found.logits, found.scores, strict=True):
        torch.testing.assert_close(scores, change(raw) / 0.7)
        factors.append((raw / change(raw)).median(1).values)
    assert torch.stack(factors).std() > 0.01


def first_tokens(rollout, sampler):
    """Add a row for each that there is, of its first token alone."""
    added = [
        dataclasses.replace(row, kind="first", parent=i, completion_ids=row.completion_ids[:1], train_mask=[1])
        for i, row in enumerate(rollout.rows)
    ]
    return dataclasses.replace(rollout, rows=rollout.rows + added)


def test_a_model_whose_generate_was_set_before_has_it_back(run):
    """transformers sets one under FSDP2, which gathers the weights that no layer has."""
    trainer = run({}, max_steps=1).trainer
    model, change = trainer.model, functools.partial(torch.neg)
    with trainer.changing_logits(change):
        assert "generate" in vars(model)
    assert "generate" not in vars(model)
    model.generate = before = model.generate
    with trainer.changing_logits(change):
        assert vars(model)["generate"] is not before
    assert vars(model)["generate"] is before


def test_entropies_of_added_rows_are_no_part_of_the_window(run):
    levels = []

    class Recorded(Redistribution):
        def observe(self, old_entropy, mask):
            levels.append(super().observe(old_entropy, mask))
            return levels[-1]

    def state(**rows):
        stages = method() | {"weights": {"hapo": Recorded()}, "rows": rows}
        return run(stages, max_steps=1, loss_type="dapo", packing="rows").trainer.pipeline.state_dict()

    assert state() == state(first_token=first_tokens)
    assert [len(found) for found in levels] == [8, 8] and torch.equal(*levels)
