"""The appended position against a forward of its own, and that nothing else sees it; LaSeR with it in the trainer."""

import functools

import pytest
import torch

from rltoken.errors import UserError
from rltoken.methods.brpo import brpo, budget_answers, thinking_only
from rltoken.methods.last_token import class_balance, mix_self_reward, self_reward_loss
from rltoken.trainer import TokenGRPOTrainer

LORA = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
APPENDED = {"appended_id": 2}
REFERENCE = {"scale": 5.0, "reference": -3.6}
"""At the size of a random model, whose log-probabilities are near -log 37."""


def even_first(completion_ids, **_):
    """1 for completions whose first token is even, so that most groups have both."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def laser(alpha=0.1, share=0.1, loss_after=0, mix_after=0):
    return {
        "marks": {"class_balance": class_balance},
        "aux": {"self_reward": functools.partial(self_reward_loss, alpha=alpha, after=loss_after, **REFERENCE)},
        "credits": {
            "self_reward": functools.partial(mix_self_reward, share=share, least=0.0, after=mix_after, **REFERENCE)
        },
    }


@torch.no_grad()
def alone(trainer, window):
    """[B] the appended token's log-probability of each row, by a forward of that row without any padding."""
    found = []
    for i in range(window["completion_ids"].size(0)):
        parts = [window[f"{part}_ids"][i][window[f"{part}_mask"][i] > 0] for part in ("prompt", "completion")]
        logits = trainer.model(input_ids=torch.cat(parts)[None]).logits[0, -1] / trainer.temperature
        found.append(logits.log_softmax(-1)[trainer.appended_id])
    return torch.stack(found)


def look(logps, old_appended, appended):
    return 0.0 * logps


@LORA
@pytest.mark.parametrize("passes", [{}, {"num_iterations": 2}], ids=["on-policy", "two iterations"])
def test_it_is_the_log_probability_after_the_last_token(run, passes, lora, monkeypatch):
    """Where TRL makes the old-log-prob pass, where the frame does, and live, after steps too."""
    differences, lengths = {"old": [], "live": []}, set()
    old_pass, forward = TokenGRPOTrainer.old_pass, TokenGRPOTrainer.forward

    def old(self, window, what):
        found = old_pass(self, window, what)
        differences["old"].append((found.appended - alone(self, window)).abs().max().item())
        lengths.update(window["completion_mask"].sum(1).tolist(), window["prompt_mask"].sum(1).tolist())
        return found

    def live(self, model, inputs, what):
        memo, found = forward(self, model, inputs, what)
        differences["live"].append((found["appended"] - alone(self, inputs)).abs().max().item())
        return memo, found

    monkeypatch.setattr(TokenGRPOTrainer, "old_pass", old)
    monkeypatch.setattr(TokenGRPOTrainer, "forward", live)
    run({"aux": {"look": look}}, temperature=0.7, lora=lora, max_completion_length=30, **APPENDED, **passes)
    assert len(differences["old"]) == 4 // passes.get("num_iterations", 1) and len(differences["live"]) == 4
    assert max(differences["old"] + differences["live"]) < 1e-5
    assert len(lengths) > 2, "rows of several lengths"


def test_nothing_else_of_the_forward_changes(run, monkeypatch):
    forward, differences = TokenGRPOTrainer.forward, []

    def both(self, model, inputs, what):
        (logps, entropy, _), found = forward(self, model, inputs, what)
        (bare_logps, bare_entropy, _), bare = forward(self, model, inputs, what - {"appended"})
        padding = inputs["completion_mask"] == 0
        assert logps[padding].abs().sum() == 0 and entropy[padding].abs().sum() == 0 and "appended" not in bare
        for one, two in ((logps, bare_logps), (entropy, bare_entropy), (found["hidden"], bare["hidden"])):
            assert one.shape == two.shape
            kept = ~padding if one.dim() == 2 else ~padding.unsqueeze(2)
            differences.append(((one - two) * kept).abs().max().item())
        return (logps, entropy, None), found

    def needs_hidden(logps, appended, hidden):
        return 0.0 * logps

    monkeypatch.setattr(TokenGRPOTrainer, "forward", both)
    run({"aux": {"look": needs_hidden}}, max_completion_length=30, **APPENDED)
    assert len(differences) == 12 and max(differences) < 1e-5


@LORA
def test_without_coefficient_and_share_it_is_grpo(run, lora):
    settings = {"reward": even_first, "lora": lora, "scale_rewards": "group"}
    stock = run(**settings)
    assert stock.distance(run(laser(alpha=0.0, share=0.0), **APPENDED, **settings)) < 1e-6
    waiting = run(laser(loss_after=4, mix_after=4), **APPENDED, **settings)
    assert stock.distance(waiting) < 1e-6, "the warm-up is longer than the run"
    assert stock.distance(run(laser(), **APPENDED, **settings)) > 1e-5


def test_the_appended_position_off_is_grpo_bit_for_bit(run):
    assert run().distance(run({}, **APPENDED)) == 0.0


def test_one_forward_and_no_second_one(run):
    assert run(laser(), num_iterations=2, **APPENDED).forwards == run(num_iterations=2).forwards


@LORA
def test_gradient_checkpointing_changes_nothing(run, lora):
    settings = {"reward": even_first, "lora": lora, "max_steps": 2, **APPENDED}
    plain = run(laser(), **settings)
    assert plain.distance(run(laser(), gradient_checkpointing=True, **settings)) < 1e-6
    assert run({}, **settings).distance(plain) > 1e-6


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_accumulation_packs_and_padding_equal_one_batch(run, loss_type):
    settings = {"reward": even_first, "loss_type": loss_type, "optim": "sgd", "num_iterations": 2, **APPENDED}
    one = run(laser(alpha=1.0), per_device_train_batch_size=8, **settings)
    four = run(laser(alpha=1.0), per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert one.distance(four) < 5e-7
    assert one.distance(run(laser(alpha=1.0), pack_tokens=40, **settings)) < 5e-7
    assert one.distance(run(laser(alpha=1.0), pad_to_multiple_of=32, **settings)) < 5e-7


def ended_rows_teach(run, alpha):
    """The error of the self-reward over a run whose policy gradient is nothing, on rewards of the first token."""
    stages = {slot: laser(alpha=alpha)[slot] for slot in ("marks", "aux")}
    result = run(
        stages,
        reward=even_first,
        max_steps=12,
        learning_rate=3e-3,
        max_completion_length=40,
        num_generations=8,
        **APPENDED,
    )
    return [entry["self_reward/error"] for entry in result.metrics if "self_reward/error" in entry]


def test_the_loss_teaches_the_self_reward(run):
    taught, left = ended_rows_teach(run, 1.0), ended_rows_teach(run, 0.0)
    assert len(taught) == 12 and sum(taught[-3:]) < 0.6 * sum(left[-3:])


def test_beside_brpo_it_acts_on_the_thinking_rows(run):
    budgets = {"budgets": [3, 6], "longest": 6}
    stages = {
        "controls": {"brpo": functools.partial(thinking_only, **budgets)},
        "rows": {"brpo": functools.partial(budget_answers, **budgets, n_summaries=2, max_new_tokens=3)},
        **laser(),
    }
    stages["credits"] = {"brpo": brpo, **stages["credits"]}
    result = run(stages, reward=even_first, num_iterations=2, loss_type="dr_grpo", **APPENDED)
    assert all(value.isfinite().all() for value in result.weights.values())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_resume_is_exact_across_the_warm_ups(run, tmp_path, steps):
    """The loss begins at step 2, the mixing at step 3; saved before, between and after."""
    stages = laser(loss_after=2, mix_after=3)
    settings = {
        "reward": even_first, "num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4,
        "steps_per_generation": 2, **APPENDED,
    }  # fmt: skip
    whole = run(stages, save_strategy="steps", save_steps=steps, output_dir=tmp_path / "run", **settings)
    resumed = run(stages, resume=str(tmp_path / "run" / f"checkpoint-{steps}"), **settings)
    assert whole.distance(resumed) == 0.0


def test_without_a_token_it_is_refused(run):
    with pytest.raises(UserError, match=r"model\.appended: a stage names the signal"):
        run(laser())
