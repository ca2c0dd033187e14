"""What stages see and do on real windows: every slot, added and replaced rows, state, resume, evaluation."""

import dataclasses
import functools
from pathlib import Path

import pandas as pd
import pytest
import torch

from rltoken import resume
from rltoken.errors import UserError
from rltoken.methods.budget_prompt import budget_prompt
from rltoken.methods.dynamic_sampling import dynamic_sampling
from rltoken.methods.entropy_advantage import entropy_advantage
from rltoken.methods.entropy_bonus import entropy_bonus
from rltoken.methods.forced_answer import forced_answer, group_centred
from rltoken.methods.forking_tokens import forks
from rltoken.methods.gspo_token import gspo_token
from rltoken.methods.hbpo import subgroup_prompt
from rltoken.methods.l1 import l1_exact
from rltoken.methods.length_regularised import length_regularised
from rltoken.methods.length_schedule import length_schedule
from rltoken.types import LIVE, SAMPLED, SCORED
from tests.trl.teachers import a_teacher


def sometimes(completion_ids, **_):
    """1 for completions whose first token is even: whole groups are often alike, as with verifiable rewards."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def spy(seen, names, result):
    """A stage that names the signals `names` and keeps what it gets."""
    namespace = {"seen": seen, "result": result}
    arguments = ", ".join(names)
    exec(
        f"def stage({arguments}):\n    seen.append(dict(zip({names!r}, ({arguments},))))\n    return {result}",
        namespace,
    )
    return namespace["stage"]


def test_every_window_signal_can_be_had_and_has_its_shape(run, tiny):
    seen, names = [], [*SAMPLED, *SCORED]
    names.remove("answers")
    stages = {"rows": {"force": forced_answer}, "credits": {"spy": spy(seen, names, "advantages")}}
    run(stages, reward=sometimes, appended_id=2, teacher=a_teacher(tiny[0]))
    assert len(seen) == 4
    signals = seen[0]
    rows, tokens = signals["mask"].shape
    assert rows == 8, "a stage sees thinking rows only, unless its `kinds` says otherwise"
    for name in ("ids", "advantages", "old_logps", "old_entropy", "ref_logps", "teacher_logps"):
        assert signals[name].shape == (rows, tokens), name
    assert signals["old_hidden"].shape == (rows, tokens, 64)
    assert signals["old_appended"].shape == (rows,) and (signals["old_appended"] < 0).all()
    assert signals["group"].tolist() == [0] * 4 + [1] * 4
    assert signals["parent"].tolist() == list(range(8)) and set(signals["kind"]) == {"thinking"}
    assert signals["lengths"].tolist() == signals["mask"].sum(1).tolist()
    assert len(set(signals["prompt_id"])) == 2 and "answer" in signals["inputs"][0]
    assert (signals["old_logps"] <= 0).all() and (signals["old_entropy"] >= 0).all()
    assert [s["progress"].step for s in seen] == [0, 1, 2, 3]


def test_live_signals(run):
    seen = []
    names = [*(name for name in LIVE if name != "weight"), "old_logps", "mask", "group", "old_entropy"]
    run({"weights": {"spy": spy(seen, names, "mask * 0 + 1")}}, num_iterations=2, appended_id=2)
    first, second = seen[0], seen[1]
    assert first["hidden"].requires_grad and first["hidden"].shape[:2] == first["mask"].shape
    assert first["appended"].requires_grad and first["appended"].shape == first["group"].shape
    mask = first["mask"].bool()
    assert torch.equal(first["ratio"][mask], torch.ones_like(first["ratio"][mask]))
    assert not torch.equal(second["ratio"][mask], torch.ones_like(second["ratio"][mask]))
    torch.testing.assert_close(first["entropy"][mask], first["old_entropy"][mask])
    assert (first["eps_low"] == 0.2).all() and (first["eps_high"] == 0.2).all()


def test_hidden_states_give_the_log_probs(run):
    seen = []
    result = run({"weights": {"spy": spy(seen, ["hidden", "logps", "ids", "mask"], "mask * 0 + 1")}}, learning_rate=0.0)
    head = result.trainer.model.get_output_embeddings().weight
    logits = seen[0]["hidden"] @ head.T
    expected = logits.log_softmax(-1).gather(-1, seen[0]["ids"].unsqueeze(-1)).squeeze(-1)
    mask = seen[0]["mask"].bool()
    torch.testing.assert_close(seen[0]["logps"][mask], expected[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_every_slot_together_trains(run, loss_type, lora):
    stages = {
        "prompts": {"budget": functools.partial(budget_prompt, budgets=[4, 8])},
        "controls": {"length": functools.partial(length_schedule, start=6, end=12)},
        "rows": {"dynamic": dynamic_sampling, "force": functools.partial(forced_answer, max_new_tokens=3)},
        "shapes": {"length": functools.partial(length_regularised, longest=12)},
        "credits": {"entropy": entropy_advantage, "summary": group_centred},
        "bounds": {"range": lambda mask: (0.1, mask * 0 + 0.3)},
        "weights": {"forks": functools.partial(forks, kinds=("thinking", "summary"))},
        "ratios": {"gspo": gspo_token},
        "aux": {"bonus": entropy_bonus},
    }
    settings = {
        "loss_type": loss_type,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "num_iterations": 2,
        "logging_steps": 1,
    }
    result = run(stages, lora=lora, reward=sometimes, **settings)
    assert all(value.isfinite().all() for value in result.weights.values())
    windows = [metrics for metrics in result.metrics if "rows_per_prompt" in metrics]
    assert [metrics["rows_per_prompt"] for metrics in windows] == [8.0] * len(windows)
    assert windows[0]["control/max_completion_length"] == 6 and windows[0]["completions/max_length"] <= 6


def test_summaries_are_forced_trained_and_graded(run):
    seen = []
    names = ["kind", "parent", "mask", "ids", "rewards", "group", "texts"]
    stage = functools.partial(spy(seen, names, "rewards"), kinds=("thinking", "summary"))
    result = run({"rows": {"force": functools.partial(forced_answer, max_new_tokens=3)}, "credits": {"s": stage}})
    end = result.trainer.template.think_end_id
    signals = seen[0]
    assert signals["kind"] == ["thinking"] * 8 + ["summary"] * 8
    assert signals["parent"].tolist() == [*range(8), *range(8)]
    for row in range(8, 16):
        trained = signals["mask"][row].nonzero().flatten().tolist()
        forced = signals["ids"][row].tolist().index(end)
        assert trained[0] == forced + 1 and len(trained) <= 3
        prefix = signals["ids"][row, :forced]
        assert torch.equal(prefix, signals["ids"][row - 8, :forced])


def test_added_rows_leave_the_loss_to_the_thinking_rows_divisor(run):
    """Rows of weight zero change nothing but the random stream: the divisors count thinking rows."""
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        settings = {"loss_type": loss_type, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
        nothing = functools.partial(lambda mask: mask * 0.0, kinds=("summary",))
        stages = {"rows": {"force": forced_answer}, "weights": {"none": nothing}}
        assert run({}, **settings).distance(run(stages, **settings)) < 1e-8


def test_dynamic_sampling_replaces_flat_groups(run):
    kept = []

    def look(rollout, sampler):
        kept.append((sampler.total(rollout.rewards).view(-1, rollout.group_size), rollout))
        return rollout

    stages = {"rows": {"dynamic": functools.partial(dynamic_sampling, max_rounds=20), "look": look}}
    result = run(stages, reward=sometimes, log_completions=True, num_completions_to_print=0, num_generations=2)
    for rewards, rollout in kept:
        assert (rewards.amax(1) > rewards.amin(1)).all()
        assert [row.parent for row in rollout.rows] == list(range(8))
        prompts = [str(example["prompt"]) for example in rollout.inputs]
        assert prompts[0::2] == prompts[1::2]
    assert result.metrics[0]["frac_reward_zero_std"] == 0.0
    counted = [metrics for metrics in result.metrics if "dynamic_sampling/rounds" in metrics]
    assert len(counted) == len(kept) and all(metrics["dynamic_sampling/flat"] == 0 for metrics in counted)
    assert sum(metrics["dynamic_sampling/dropped"] for metrics in counted) == result.trainer.sampler.stream.cursor > 0
    assert max(metrics["dynamic_sampling/rounds"] for metrics in counted) > 1
    table = pd.read_parquet(min(Path(result.trainer.args.output_dir).glob("completions/*.parquet")))
    assert len(table) == 8 and [float(v) for v in table["sometimes"]] == kept[0][0].flatten().tolist()
    assert result.metrics[0]["completions/mean_length"] == pytest.approx(
        sum(len(row.completion_ids) for row in kept[0][1].rows) / 8
    )


def test_dynamic_sampling_gives_up_after_its_rounds_and_says_so(run):
    """No reward has spread: each round replaces all groups, and they stay flat."""
    alike = functools.partial(dynamic_sampling, max_rounds=2)
    result = run({"rows": {"dynamic": alike}}, reward=lambda completions, **_: [1.0] * len(completions), max_steps=1)
    assert result.metrics[0]["dynamic_sampling/dropped"] == 2 * 2 and result.metrics[0]["dynamic_sampling/rounds"] == 2
    assert result.metrics[0]["dynamic_sampling/flat"] == 1.0 and result.trainer.sampler.stream.cursor == 4


BOTH = ("thinking", "summary")


def rising_clip(progress):
    """A control that changes the clip range from window to window."""
    return {"epsilon": 0.001 * (1 + progress.step), "epsilon_high": 0.002 * (1 + progress.step)}


RESUMED = {
    "odd step of a window": {
        "steps_per_generation": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    },
    "two iterations": {"num_iterations": 2},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact(run, tmp_path, name):
    stages = {
        "rows": {"dynamic": dynamic_sampling},
        "controls": {"length": functools.partial(length_schedule, start=6, end=12), "clip": rising_clip},
    }
    settings = RESUMED[name] | {"reward": sometimes, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    whole = run(stages, output_dir=tmp_path / "whole", **settings)
    for step in (1, 2, 3):
        resumed = run(
            stages, output_dir=tmp_path / f"from {step}", resume=str(tmp_path / f"whole/checkpoint-{step}"), **settings
        )
        assert whole.distance(resumed) == 0.0, step
        assert whole.trainer.sampler.stream.cursor == resumed.trainer.sampler.stream.cursor, step


def test_resume_is_exact_past_the_end_of_an_epoch(run, tiny, tmp_path):
    """Two windows an epoch: the resumed run must not begin with the order of the first epoch again."""
    settings = {"train_dataset": tiny[2].select(range(4)), "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    whole = run({}, output_dir=tmp_path / "whole", **settings)
    for step in range(1, 6):
        checkpoint = str(tmp_path / f"whole/checkpoint-{step}")
        resumed = run({}, output_dir=tmp_path / f"from {step}", resume=checkpoint, **settings)
        assert whole.distance(resumed) == 0.0, step


def test_resume_between_two_logs_is_exact(run, tmp_path):
    """The next log averages over steps before the checkpoint too, and shows completions from before it."""
    settings = RESUMED["odd step of a window"] | {"max_steps": 6, "logging_steps": 3, "log_completions": True}
    settings |= {"save_strategy": "steps", "save_steps": 1, "reward": sometimes}
    whole = run({}, output_dir=tmp_path / "whole", **settings)
    for step in (1, 2, 4):
        again = f"from {step}"
        resumed = run({}, output_dir=tmp_path / again, resume=str(tmp_path / f"whole/checkpoint-{step}"), **settings)
        assert whole.metrics == resumed.metrics and len(whole.metrics) == 3, step
        for at in (at for at in (3, 6) if at >= step):
            tables = [tmp_path / f"{name}/completions/completions_{at:05d}.parquet" for name in ("whole", again)]
            assert len(pd.read_parquet(tables[0])) > 0
            assert pd.read_parquet(tables[0]).equals(pd.read_parquet(tables[1])), (step, at)


def test_a_reference_that_follows_is_resumed(run, tmp_path):
    settings = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    whole = run({}, output_dir=tmp_path / "whole", **settings)
    resumed = run({}, output_dir=tmp_path / "resumed", resume=str(tmp_path / "whole/checkpoint-2"), **settings)
    assert whole.distance(resumed) == 0.0


def test_saving_never_touches_training(run, tmp_path):
    settings = RESUMED["odd step of a window"] | {"reward": sometimes}
    stages = {"rows": {"dynamic": dynamic_sampling}}
    plain = run(stages, **settings)
    saved = run(stages, **settings, save_strategy="steps", save_steps=1)
    assert plain.distance(saved) == 0.0 and plain.metrics == saved.metrics


def test_evaluation_never_touches_training(run, tiny):
    plain = run({})
    dataset = tiny[2]
    evaluated = run(
        {}, eval_dataset=dataset.select(range(4)), eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4
    )
    assert any("eval_reward" in metrics for metrics in evaluated.metrics)
    assert plain.distance(evaluated) == 0.0


def test_stages_for_different_kinds_leave_each_others_rows_alone(run):
    """Two bounds for two kinds, and a live one for a third: each row has the range of its own kind."""
    seen = []
    fixed = functools.partial
    stages = {
        "rows": {"force": forced_answer},
        "bounds": {
            "thinking": fixed(lambda mask, *, value: (value, value), value=0.05),
            "summary": fixed(lambda mask, *, value: (value, value), value=0.01, kinds=("summary",)),
            "live": fixed(lambda logps, *, value: (value, value), value=0.02, kinds=("copy",)),
        },
        "weights": {"spy": fixed(spy(seen, ["eps_low", "kind"], "eps_low * 0 + 1"), kinds=BOTH)},
    }
    run(stages)
    for signals in seen:
        for kind, low in zip(signals["kind"], signals["eps_low"], strict=True):
            assert torch.allclose(low, torch.full_like(low, {"thinking": 0.05, "summary": 0.01}[kind]))


def test_advantages_are_the_credit_at_both_timings(run):
    window, live = [], []
    halve = "mask * 0 + 0.5"
    run(
        {
            "weights": {
                "half": lambda mask: mask * 0 + 0.5,
                "window": spy(window, ["advantages", "mask"], halve),
                "live": spy(live, ["advantages", "mask", "entropy"], halve),
            }
        },
        max_steps=1,
    )
    close = torch.testing.assert_close
    close(window[0]["advantages"].sort(0).values[:, 0], live[0]["advantages"].sort(0).values[:, 0])


def test_drawn_prompts_pass_the_prompt_stages(run):
    kept = []

    def look(rollout, sampler):
        kept.append([("budget" in example) for example in rollout.inputs])
        return rollout

    stages = {
        "prompts": {"budget": functools.partial(budget_prompt, budgets=[4])},
        "rows": {"dynamic": dynamic_sampling, "look": look},
    }
    result = run(stages, reward=sometimes, num_generations=2)
    assert result.trainer.sampler.stream.cursor > 0 and all(all(rows) for rows in kept)


def test_a_checkpoint_of_another_number_of_processes_is_refused(run, tmp_path):
    run({}, output_dir=tmp_path / "one", save_strategy="steps", save_steps=2)
    folder = tmp_path / "one/checkpoint-2"
    resume.write_manifest(folder, step=2, processes=2)
    with pytest.raises(UserError, match=r"resume: .*written by 2 processes and there are 1"):
        run({}, output_dir=tmp_path / "two", resume=str(folder))
    accepted = run({}, output_dir=tmp_path / "two", resume=str(folder), on_change="accept")
    assert accepted.trainer.state.global_step == 4


def test_a_checkpoint_of_other_data_is_refused(run, tiny, tmp_path, capsys):
    run({}, output_dir=tmp_path / "one", save_strategy="steps", save_steps=2)
    other = {"output_dir": tmp_path / "two", "resume": str(tmp_path / "one/checkpoint-2")}
    other["train_dataset"] = tiny[2].select(range(1, 64))
    with pytest.raises(UserError, match=r"resume: .*checkpoint-2 does not fit: the training data are others than then"):
        run({}, **other)
    assert run({}, **other, on_change="accept").trainer.state.global_step == 4
    assert "the training data are others than then. Accepted: from here on" in capsys.readouterr().out


def test_a_negative_weight_is_refused(run):
    with pytest.raises(UserError, match=r"method\.weights\.bad: a weight is negative"):
        run({"weights": {"bad": lambda mask: mask * -1.0}})
    with pytest.raises(UserError, match=r"method\.weights\.bad: a weight is negative"):
        run({"weights": {"bad": lambda entropy: -entropy}})


def test_token_credit_per_sequence_is_refused(run):
    with pytest.raises(
        UserError, match=r"importance_sampling_level: 'sequence' erases the per-token credit of method\.credits\.e"
    ):
        run(
            {"credits": {"e": functools.partial(entropy_advantage, alpha=1e-3)}},
            importance_sampling_level="sequence",
            loss_type="grpo",
        )


@pytest.mark.parametrize(
    ("slot", "stage", "message"),
    [
        ("controls", lambda progress: {"temperature": 2.0}, r"'temperature'\] cannot be controlled"),
        ("controls", lambda progress: {"max_completion_length": 99}, r"outside 1 to trainer.max_completion_length=12"),
        ("prompts", lambda inputs: inputs[:3], r"returned 3 prompts for 8"),
        ("rows", lambda rollout: dataclasses.replace(rollout, rows=rollout.rows[:3]), r"3 rows for 8 prompts"),
        ("shapes", lambda rewards: rewards[:3], r"returned the shape \[3\]"),
    ],
)
def test_what_a_stage_returns_is_checked(run, slot, stage, message):
    with pytest.raises(UserError, match=rf"method\.{slot}\.bad: .*{message}"):
        run({slot: {"bad": stage}})


def test_prompts_and_shapes_are_tried_before_anything_is_sampled(run):
    def never(**_):
        raise AssertionError("a completion was graded")

    def without_template(inputs):
        return [
            {**example, "prompt": [{"role": "system", "content": "short"}, *example["prompt"]]} for example in inputs
        ]

    with pytest.raises(UserError, match=r"method\.shapes\.l1: a prompt has no column 'budget'; add \+prompt=l1"):
        run({"shapes": {"l1": l1_exact}}, reward=never)
    with pytest.raises(UserError, match=r"method\.prompts\.told: the model's chat template does not take its prompts"):
        run({"prompts": {"told": without_template}}, reward=never)
    with pytest.raises(UserError, match=r"method\.prompts\.hbpo\.budgets: a group of 4 cannot be split evenly over 3"):
        run({"prompts": {"hbpo": functools.partial(subgroup_prompt, budgets=[2, 4, 6])}}, reward=never)


def test_trying_a_stage_leaves_its_state_alone(run):
    class Counter:
        calls = 0

        def __call__(self, rewards):
            self.calls += 1
            return rewards

    counter = Counter()
    run({"shapes": {"counter": counter}}, max_steps=3)
    assert counter.calls == 3


def test_answers_need_a_function(run):
    with pytest.raises(UserError, match=r"reward\.classes: "):
        run({"shapes": {"vote": lambda answers, rewards: rewards}})


def test_a_rank_that_has_nothing_to_decode_gets_nothing(run):
    assert run({}, max_steps=1).trainer.decode([], []) == []


def test_a_rank_that_has_nothing_to_continue_samples_with_the_others(run, monkeypatch):
    """Another rank has three contexts, and a forward of split weights needs all ranks."""
    trainer = run({}, max_steps=1).trainer
    monkeypatch.setattr(trainer.sampler, "most", lambda n: 3)
    asked = []
    extend = trainer.extend
    monkeypatch.setattr(
        trainer, "extend", lambda contexts, **given: asked.append(len(contexts)) or extend(contexts, **given)
    )
    assert trainer.sampler.generate([], max_new_tokens=2) == [] and asked == [3]
