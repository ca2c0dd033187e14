"""BRPO through the trainer: against Dr. GRPO, on scripted and on odd traces, and what it refuses."""

import functools
import types
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from rltoken.errors import UserError
from rltoken.methods.brpo import brpo, budget_answers, thinking_only
from rltoken.methods.dynamic_sampling import dynamic_sampling
from rltoken.methods.forced_answer import forced_answer
from rltoken.pipeline import build
from rltoken.rollout.forced import until_end
from rltoken.trainer import TokenGRPOTrainer
from rltoken.types import Template

DR_GRPO = {"loss_type": "dr_grpo", "scale_rewards": "none", "max_steps": 2}
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "learning_rate": 1.0}
BOTH = ("thinking", "summary")
EOS, END, ELLIPSIS, HEADER, RIGHT, WRONG = 1, 4, 14, 20, 31, 32
TEMPLATE = Template(think_end_id=END, cut=(ELLIPSIS, END, HEADER), ended=(HEADER,))
CUT, ENDED = list(TEMPLATE.cut), list(TEMPLATE.ended)


def method(*, budgets=(2, 4, 8), control=True, credit=True, look=None, **settings):
    """BRPO's stages; the settings `prior`, `mode` are the credit's. `look` gets every finished rollout."""
    chosen = {name: settings.pop(name) for name in ("prior", "mode") if name in settings}
    places = {"budgets": list(budgets), "longest": budgets[-1]}
    stages = {
        "rows": {"brpo": functools.partial(budget_answers, **places, **{"max_new_tokens": 3, **settings})},
    }
    if look is not None:

        def keep(rollout):
            look.append(rollout)
            return rollout

        stages["rows"]["look"] = keep
    if control:
        stages["controls"] = {"brpo": functools.partial(thinking_only, **places)}
    if credit:
        stages["credits"] = {"brpo": functools.partial(brpo, **chosen)}
    return stages


def thinking(rollout):
    return rollout.rows[: len(rollout.inputs)]


def added(rollout):
    return rollout.rows[len(rollout.inputs) :]


# With the model's own samples


@pytest.mark.parametrize("n_summaries", [1, 3])
def test_base_and_v2only_is_trls_dr_grpo_on_the_final_score(run, n_summaries):
    """TRL's own advantages on the reward that the rows stage publishes, with and without the credit stage."""
    settings = {"budgets": (3, 6, 12), "n_summaries": n_summaries, "decoupled": False}
    look, options = [], DR_GRPO | SGD | {"max_steps": 2}
    trls = run(method(credit=False, look=look, **settings), **options)
    ours = run(method(prior="base", mode="v2only", **settings), **options)
    assert trls.distance(ours) < 1e-6
    assert trls.distance(run(method(prior="uniform", mode="brpo", **settings), **options)) > 1e-4
    for rollout in look:
        torch.testing.assert_close(rollout.rewards.squeeze(1), rollout.signals["budget_scores"][:, -1])


def test_only_the_last_budget_is_plain_grpo_split_in_two_rows(run):
    """One budget, one answer: the thinking and the answer of a row have the same advantage, score minus group mean."""
    seen = []

    def look(advantages, mask, rewards, kind, parent):
        seen.append((advantages, mask, rewards, kind, parent))
        return advantages

    stages = method(
        budgets=(12,), n_summaries=1, decoupled=False, summary_train_rows="all", prior="base", mode="v2only"
    )
    stages["credits"]["look"] = functools.partial(look, kinds=BOTH)
    run(stages, **DR_GRPO)
    for advantages, mask, rewards, kind, parent in seen:
        assert kind == ["thinking"] * 8 + ["summary"] * 8 and parent.tolist() == [*range(8)] * 2
        groups = rewards[:8].view(2, 4)
        expected = (groups - groups.mean(1, keepdim=True)).flatten().repeat(2)[:, None].expand(mask.shape)
        torch.testing.assert_close(advantages[mask > 0], expected[mask > 0])


@pytest.mark.parametrize("control", [True, False], ids=["thinking only", "whole completions"])
def test_thinking_that_ended_does_not_count_as_cut(run, control):
    """Rows end with `</think>`; TRL's clipped ratio and the signal `truncated` count those as finished."""
    look, seen = [], []

    def spy(advantages, truncated):
        seen.append(truncated.tolist())
        return advantages

    stages = method(budgets=(6, 12), control=control, look=look)
    stages["credits"]["spy"] = spy
    result = run(stages, temperature=1.5)
    logged = [entry["completions/clipped_ratio"] for entry in result.metrics if "completions/clipped_ratio" in entry]
    last = [[row.completion_ids[-1] for row in thinking(rollout)] for rollout in look]
    assert any(END in ids for ids in last)
    assert not any(END in row.completion_ids[:-1] for rollout in look for row in thinking(rollout))
    cut = [[token not in (EOS, END) for token in ids] for ids in last]
    assert seen == cut
    assert logged == pytest.approx([sum(window) / 8 for window in cut])


def test_what_rewards_log_of_forced_answers_is_told_apart(run):
    def telling(completion_ids, log_extra, log_metric, **_):
        log_extra("tokens", [len(ids) for ids in completion_ids])
        log_metric("graded", float(len(completion_ids)))
        return [1.0] * len(completion_ids)

    look = []
    result = run(method(look=look, n_summaries=2), reward=telling, log_completions=True, max_steps=1)
    (rollout,) = look
    assert result.metrics[0]["forced/graded"] == 8 * 3 * 2
    assert "graded" not in result.metrics[0]
    assert all(extra["tokens"] > 0 for extra in rollout.extras)


def test_a_budget_without_weight_takes_no_credit_where_its_answers_have_no_reward(run):
    calls = []

    def all_but_the_last(completion_ids, **_):
        calls.append(len(completion_ids))
        return [None if i % 2 else float(sum(ids) % 3) for i, ids in enumerate(completion_ids)]

    seen = []

    def look(advantages, mask):
        seen.append((advantages, mask))
        return advantages

    stages = method(budgets=(4, 12), n_summaries=1, decoupled=False, prior=[1.0, 0.0], mode="v2only")
    stages["credits"]["look"] = look
    run(stages, reward=all_but_the_last, **DR_GRPO | {"max_steps": 1})
    assert calls == [16]
    ((advantages, mask),) = seen
    assert advantages[mask > 0].abs().max() > 0.1


def test_forced_tokens_are_never_trained(run):
    look, seen = [], []

    def spy(advantages, mask, ids, kind):
        seen.append((mask, ids, kind))
        return advantages

    stages = method(look=look, summary_train_rows="all", n_summaries=2)
    stages["credits"]["spy"] = functools.partial(spy, kinds=BOTH)
    run(stages, max_steps=1)
    for rollout, (mask, ids, kind) in zip(look, seen, strict=True):
        assert kind.count("summary") == 8 * 3 * 2
        for row, trained, tokens in zip(rollout.rows, mask.tolist(), ids.tolist(), strict=True):
            length = len(row.completion_ids)
            assert tokens[:length] == row.completion_ids and not any(trained[length:])
            if row.kind == "thinking":
                assert trained[:length] == [1] * length
            else:
                end = row.completion_ids.index(END)
                assert trained[:length] == [0] * (end + 1) + [1] * (length - end - 1)
                own = rollout.rows[row.parent].completion_ids
                assert row.completion_ids[:end] == own[:end] and length - end - 1 <= 3


def test_rewards_and_metrics_are_those_of_the_final_budget(run):
    look = []
    stages = method(n_summaries=2, drawn=True, look=look)
    result = run(stages, log_completions=True, num_completions_to_print=0, max_steps=2)
    entries = [entry for entry in result.metrics if "final_score" in entry]
    for rollout, entry in zip(look, entries, strict=True):
        scores = rollout.signals["budget_scores"]
        per_budget = [entry[f"budget_scores/{j}"] for j in (1, 2, 3)]
        assert per_budget == pytest.approx(scores.mean(0).tolist())
        assert entry["anytime_score"] == pytest.approx(sum(per_budget) / 3)
        assert entry["final_score"] == entry["budget_scores/3"] == pytest.approx(entry["reward"])
        assert entry["reward"] == pytest.approx(entry["rewards/token_parity/mean"])
        assert len(set(scores.flatten().tolist())) > 3, "the scores differ"
        lengths = [len(row.completion_ids) for row in thinking(rollout)]
        assert entry["completions/mean_length"] == pytest.approx(sum(lengths) / 8)
        assert entry["rows_per_prompt"] == pytest.approx(len(rollout.rows) / 2)
    table = pd.read_parquet(min(Path(result.trainer.args.output_dir).glob("completions/*.parquet")))
    assert len(table) == 8
    assert table["token_parity"].tolist() == pytest.approx(look[0].rewards.squeeze(1).tolist())
    for text, row in zip(table["completion"], thinking(look[0]), strict=True):
        assert "</think>" in str(text) and len(str(text).split("</think>")[0].split()) <= 8 + len(row.completion_ids)


def test_drawn_budgets_are_the_same_for_siblings_and_those_of_the_parent(run):
    seen = []

    def spy(advantages, budgets, budget_scores, group, parent, kind):
        seen.append((budgets, group, parent))
        assert torch.equal(budgets, budgets[parent])
        torch.testing.assert_close(budget_scores, budget_scores[parent], equal_nan=True)
        return advantages

    stages = method(drawn=True, budgets=(3, 7, 11), summary_train_rows=2, n_summaries=2)
    stages["credits"]["spy"] = functools.partial(spy, kinds=BOTH)
    run(stages)
    drawn = set()
    for budgets, group, _ in seen:
        for number in (0, 1):
            own = budgets[group == number]
            assert (own == own[0]).all() and own[0, 2] == 11
            assert 1 <= own[0, 0] <= 3 < own[0, 1] <= 7
            drawn.add(tuple(own[0].tolist()))
    assert len(drawn) > 3


@pytest.mark.parametrize("control", [True, False])
def test_thinking_rows_never_exceed_the_last_budget(run, control):
    look = []
    run(method(budgets=(2, 5), look=look, control=control), max_completion_length=12, max_steps=2)
    lengths = [len(row.completion_ids) for rollout in look for row in thinking(rollout)]
    assert max(lengths) == 5
    assert all(len(row.train_mask) == len(row.completion_ids) for rollout in look for row in rollout.rows)


@pytest.mark.parametrize("settings", [{"pack_tokens": 40}, {"per_device_train_batch_size": 2}], ids=str)
def test_packs_and_accumulation_change_nothing(run, settings):
    """Five or more rows per trace, their number from chance: packed, or padded to four equal micro-batches."""
    stages = method(summary_train_rows=2, n_summaries=2)
    steps = 8 // settings.get("per_device_train_batch_size", 8)
    whole = run(stages, **DR_GRPO | SGD)
    split = run(stages, gradient_accumulation_steps=steps, **settings, **DR_GRPO | SGD)
    assert whole.distance(split) < 2e-6
    assert whole.distance(run(stages, **DR_GRPO | SGD | {"learning_rate": 0.0})) > 1e-4


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
def test_an_adapter_trains(run, loss_type):
    result = run(method(n_summaries=2), lora=True, loss_type=loss_type, max_steps=1)
    lora = [value for name, value in result.weights.items() if "lora_B" in name]
    assert all(value.isfinite().all() for value in result.weights.values())
    assert any((value != 0).any() for value in lora)


# Scripted traces


def all_right(context):
    return [RIGHT, EOS]


def is_right(completion_ids, **_):
    return [float(ids[-2:] == [RIGHT, EOS]) for ids in completion_ids]


class Scripted(TokenGRPOTrainer):
    """Trace i for the i-th prompt of a call, as far as sampling would have got; answers by a function."""

    def sample(self, prompt_ids, *, num_generations=1, max_new_tokens=None, stops=()):
        longest = max_new_tokens or self.generation_config.max_new_tokens
        ends = {*self.eos_token_ids, *stops}
        self.asked.append((longest, tuple(stops)))
        return [until_end(trace[:longest], ends) for _, trace in zip(prompt_ids, self.traces, strict=True)], None

    def extend(self, contexts, *, max_new_tokens=None, stops=(), batch_rows=None):
        self.contexts += contexts
        ends = {*self.eos_token_ids, *stops}
        return [until_end(self.answer(context)[:max_new_tokens], ends) for context in contexts], None

    def make_window(self, inputs):
        window = super().make_window(inputs)
        self.window = {name: value.clone() for name, value in window.items() if isinstance(value, torch.Tensor)}
        return window


@pytest.fixture
def script(tiny, tmp_path):
    """script(stages, traces, answer): one step of one group of those traces; weights, rollout, contexts, metrics."""
    folder, tokenizer, dataset = tiny
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()

    def train(traces, answer=all_right, *, reward=is_right, template=TEMPLATE, stages=None, **changes):
        look = []
        names = [name for name in changes if name not in GRPOConfig.__dataclass_fields__]
        stages = method(look=look, **{name: changes.pop(name) for name in names}) if stages is None else stages
        trainer = Scripted(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward,
            args=GRPOConfig(
                **{
                    "output_dir": str(tmp_path / "scripted"),
                    "per_device_train_batch_size": len(traces),
                    "num_generations": len(traces),
                    "max_completion_length": 16,
                    "bf16": False,
                    "use_cpu": True,
                    "gradient_checkpointing": False,
                    "report_to": "none",
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "disable_tqdm": True,
                    "shuffle_dataset": False,
                    **DR_GRPO,
                    **SGD,
                    **changes,
                }
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            pipeline=build(stages),
            template=template,
        )
        trainer.traces, trainer.answer, trainer.contexts, trainer.asked = traces, answer, [], []
        trainer.train()
        weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
        prompt = look[0].rows[0].prompt_ids if look else []
        return types.SimpleNamespace(
            trainer=trainer,
            rollout=look[0] if look else None,
            tails=[context[len(prompt) :] for context in trainer.contexts],
            window=trainer.window,
            weights=weights,
            moved={name: value - start[name] for name, value in weights.items()},
            metrics=trainer.state.log_history[0],
        )

    return train


def norm(moved):
    return sum(float((value.double() ** 2).sum()) for value in moved.values()) ** 0.5


SIBLINGS = [[40] * 20, [41] * 20, [42] * 20]
"""Three responses that never close their thinking, and answer wrongly."""


def odd_one_right(context, answer=(RIGHT, EOS)):
    return [WRONG, EOS] if {40, 41, 42} & set(context[-8:]) else list(answer)


ODD = {
    "never closes": (
        [50] * 20,
        [50] * 8,
        {2: [50] * 2 + CUT, 4: [50] * 4 + CUT, 8: [50] * 8 + CUT},
        [1, 1, 1],
    ),
    "ends the sequence": (
        [50, 51, 52, EOS, 53],
        [50, 51, 52, EOS],
        {2: [50, 51, *CUT], 4: [50, 51, 52, EOS, *CUT], 8: [50, 51, 52, EOS, *CUT]},
        [1, 0, 0],
    ),
    "closes at once": ([END, 50], [END], {b: [END, *ENDED] for b in (2, 4, 8)}, [1, 1, 1]),
    "closes at a budget": (
        [50, 51, 52, END, 53],
        [50, 51, 52, END],
        {2: [50, 51, *CUT], 4: [50, 51, 52, END, *ENDED], 8: [50, 51, 52, END, *ENDED]},
        [1, 1, 1],
    ),
    "is empty": ([EOS], [EOS], {b: [EOS, *CUT] for b in (2, 4, 8)}, [0, 0, 0]),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_traces(script, name):
    trace, row, contexts, scores = ODD[name]
    result = script([trace, *SIBLINGS], odd_one_right, n_summaries=2, summary_train_rows="all")
    rollout = result.rollout
    assert thinking(rollout)[0].completion_ids == row and thinking(rollout)[0].train_mask == [1] * len(row)
    assert [thinking(rollout)[i].completion_ids for i in (1, 2, 3)] == [[40 + i] * 8 for i in range(3)]
    assert result.tails[:6] == [contexts[budget] for budget in (2, 4, 8) for _ in range(2)]
    assert rollout.signals["budget_scores"].tolist() == [[float(s) for s in scores], *[[0.0] * 3] * 3]
    assert rollout.rewards.flatten().tolist() == [scores[-1], 0.0, 0.0, 0.0]
    own = added(rollout)[:6]
    assert [r.completion_ids for r in own] == [[*tail, RIGHT, EOS] for tail in result.tails[:6]]
    assert [r.train_mask for r in own] == [[0] * len(tail) + [1, 1] for tail in result.tails[:6]]
    assert len(added(rollout)) == 24 and {r.advantage for r in added(rollout)} == {0.0}
    assert result.metrics["thinking_closed"] == (0.25 if "closes " in name and name != "never closes" else 0.0)
    assert result.metrics["final_score"] == scores[-1] / 4
    assert result.metrics["anytime_score"] == pytest.approx(sum(scores) / 12)
    assert all(value.isfinite().all() for value in result.weights.values())
    assert (norm(result.moved) > 1e-6) == any(scores)
    assert result.trainer.asked == [(8, (END,))]


@pytest.mark.parametrize("answer", [[END, RIGHT, EOS], [RIGHT, END, EOS], [RIGHT, EOS, END]], ids=str)
def test_a_second_end_of_thinking_in_the_answer_scores_0(script, answer):
    """Unless it stands after the end of the sequence, where nothing is sampled."""

    def always(completion_ids, **_):
        return [float(RIGHT in ids) for ids in completion_ids]

    result = script([[50, END], *SIBLINGS], functools.partial(odd_one_right, answer=answer), reward=always)
    fine = answer.index(EOS) < answer.index(END)
    assert result.rollout.signals["budget_scores"][0].tolist() == [float(fine)] * 3
    assert result.metrics["summaries_well_formed"] == (1.0 if fine else 0.75)
    assert (norm(result.moved) > 1e-6) == fine


def test_the_credit_of_each_thinking_token(script):
    """Scores 0, 1, 1 against 0, 0, 0 under the base prior: V2 = 1/4, and V1 = 0, then (1 * 0 + 2 * 1) / 3."""
    trace = [50, 51, 52, 53, 54, END]

    def later(context):
        return odd_one_right(context) if 52 in context else [WRONG, EOS]

    result = script([trace, *SIBLINGS], later, prior="base", summary_train_rows="all")
    assert result.rollout.signals["budget_scores"][0].tolist() == [0.0, 1.0, 1.0]
    found = result.window["advantages"][0, :6].tolist()
    j = [1 - 1 / 4, 1 - 2 / 3 * (1 / 4), 1 - (2 / 3 * (0 + 2 * 1) / 3 + 1 / 3 * (1 / 4))]
    assert found == pytest.approx([j[0]] * 2 + [j[1]] * 2 + [j[2]] * 2)
    sibling = [-1 / 4, -2 / 3 * 1 / 4, -1 / 3 * 1 / 4]
    assert result.window["advantages"][1, :8].tolist() == pytest.approx(
        [sibling[0]] * 2 + [sibling[1]] * 2 + [sibling[2]] * 4
    )


def test_answers_have_the_credit_of_their_own_prefix(script):
    """Two answers each, one right: +-1/2, by the paper's weight of 1 / (3 * 2); whatever the thinking's credit."""
    turn = iter(range(1000))

    def by_turns(context):
        return [RIGHT, EOS] if next(turn) % 2 else [WRONG, EOS]

    result = script([[50] * 9, *SIBLINGS], by_turns, n_summaries=2, summary_train_rows="all")
    rows, columns = (
        result.window["advantages"][4:],
        result.window["tool_mask"][4:] * result.window["completion_mask"][4:],
    )
    assert rows[columns > 0].view(24, 2)[:, 0].tolist() == pytest.approx([-1 / 12, 1 / 12] * 12)
    assert result.window["advantages"][:4].abs().max() < 1e-6, "all traces score alike"


def test_all_alike_moves_nothing(script):
    for answer in ([RIGHT, EOS], [WRONG, EOS]):
        result = script([[50] * 9, *SIBLINGS], lambda context, answer=answer: answer, n_summaries=3)
        assert norm(result.moved) == 0.0 and len(result.rollout.rows) == 4


def test_abstaining_rewards_train_nothing_and_stay_finite(script):
    """The first trace has no reward at all; the others train as a group of three."""

    def abstains(completion_ids, **_):
        return [None if 50 in ids else float(ids[-2] == RIGHT) for ids in completion_ids]

    def one(context):
        return [RIGHT, EOS] if 40 in context else [WRONG, EOS]

    result = script([[50] * 9, *SIBLINGS], one, reward=abstains, prior="base", mode="v2only", summary_train_rows="all")
    assert result.rollout.signals["budget_scores"][0].isnan().all()
    assert result.window["advantages"][0].abs().max() == 0.0
    assert result.window["advantages"][1:4, 0].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert result.window["advantages"].isfinite().all() and norm(result.moved) > 1e-6


def test_a_model_that_does_not_think(script):
    template = Template(think_end_id=None, cut=(HEADER,), ended=(HEADER,))
    result = script([[50, 51, EOS], *SIBLINGS], odd_one_right, template=template)
    assert result.tails[0] == [50, 51, HEADER] and result.trainer.asked == [(8, ())]
    assert result.rollout.signals["budget_scores"][0].tolist() == [1.0, 1.0, 1.0]


# Drawn answers


def first_of_three():
    """Of the three answers to the cut at 2 the first is right; none is to other prefixes."""
    asked = []

    def answer(context):
        asked.append(tuple(context))
        turn = asked.count(tuple(context))
        return [RIGHT if turn == 1 and context.count(50) == 2 else WRONG + turn, EOS]

    return answer


@pytest.mark.parametrize(("summary_train_rows", "loss_type"), [(1, "dr_grpo"), (2, "dapo")])
def test_the_step_of_drawn_answers_is_that_of_all_in_expectation(script, summary_train_rows, loss_type):
    """Plain gradient descent: the mean over every draw of the three that have an advantage is the step on all."""

    def step(summary_train_rows, seed=0):
        return script(
            [[50] * 8, [END]],
            first_of_three(),
            budgets=(2, 4),
            n_summaries=3,
            summary_train_rows=summary_train_rows,
            loss_type=loss_type,
            seed=seed,
        )

    whole = step("all")
    assert sum(row.advantage != 0 for row in added(whole.rollout)) == 3
    moved = {}
    for seed in range(100):
        result = step(summary_train_rows, seed)
        moved[str([row.completion_ids for row in added(result.rollout)])] = result.moved
        if len(moved) == 3:
            break
    assert len(moved) == 3
    for name, value in whole.moved.items():
        torch.testing.assert_close(sum(m[name] for m in moved.values()) / 3, value, rtol=1e-4, atol=1e-7)
    for one in moved.values():
        assert norm({name: one[name] - whole.moved[name] for name in one}) > 0.05 * norm(whole.moved)
    enough = step(9).moved
    assert norm({name: enough[name] - whole.moved[name] for name in enough}) < 1e-6


# What is refused


def assert_refused(run, stages, message, **settings):
    with pytest.raises(UserError, match=message):
        run(stages, **settings)


CONTROL = {"brpo": functools.partial(thinking_only, budgets=[4], longest=8)}


def test_thinking_alone_is_refused_without_a_rows_stage(run):
    assert_refused(run, {"controls": CONTROL}, r"method\.controls\.brpo: .*no answer to grade; add a rows stage")


def test_thinking_alone_is_refused_where_no_rows_stage_grades(run):
    stages = {"controls": CONTROL, "rows": {"force": forced_answer}}
    assert_refused(run, stages, r"method\.rows\.force: .*no rows stage graded")


def test_dynamic_sampling_is_refused_before_and_after(run):
    stages = method(credit=False)
    force = stages["rows"]["brpo"]
    before = stages | {"rows": {"dynamic": dynamic_sampling, "brpo": force}}
    assert_refused(run, before, r"method\.rows\.dynamic: .*there is no reward yet")
    after = stages | {"rows": {"brpo": force, "dynamic": dynamic_sampling}}
    assert_refused(run, after, r"method\.rows\.dynamic: .*it must come before method.rows.brpo; choose")


def test_dynamic_sampling_after_it_is_refused_even_if_no_row_was_added(script):
    """All answers alike: BRPO adds no row, and fresh groups would have no reward."""
    stages = method(credit=False)
    stages["rows"]["dynamic"] = dynamic_sampling
    with pytest.raises(UserError, match=r"method\.rows\.dynamic: "):
        script([[50] * 9, *SIBLINGS], stages=stages)


def test_dynamic_sampling_before_it_works_on_whole_completions(run):
    look = []
    stages = method(control=False, look=look)
    stages["rows"] = {"dynamic": dynamic_sampling, **stages["rows"]}
    result = run(stages, max_steps=1)
    assert all(value.isfinite().all() for value in result.weights.values()) and len(look) == 1


def test_the_credit_is_refused_without_its_rows(run):
    stages = {"credits": {"brpo": brpo}}
    assert_refused(run, stages, r"method\.credits\.brpo: no rows stage publishes 'budget.*'; add one")


def test_a_last_budget_beyond_the_completion_length_is_refused(run):
    assert_refused(
        run, method(budgets=(4, 16)), r"method\.controls\.brpo: .*16 is outside 1 to .*=12", max_completion_length=12
    )


def test_a_template_that_forces_nothing_is_refused(script):
    with pytest.raises(UserError, match=r"method\.rows\.brpo: .*set model\.think_end or model\.forced\.header"):
        script([[50] * 9, *SIBLINGS], template=Template(think_end_id=None, cut=()))
