"""BRPO's whole training step against its equations in plain loops, and what the trainer logs of it."""

import functools
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from rltoken.methods.brpo import brpo, budget_answers, thinking_only
from rltoken.rollout.forced import until_end
from rltoken.trainer import TokenGRPOTrainer

EOS, END, RIGHT, WRONG = 1, 4, 31, 32
PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "loss_type": "dr_grpo", "scale_rewards": "none", "max_steps": 1}
BOTH = ("thinking", "summary")


def method(*, budgets=(3, 7, 11), control=True, look=None, spy=None, rows=None, **credit):
    """BRPO's stages; `look` gets every finished rollout, `spy` is one more credit stage."""
    places = {"budgets": list(budgets), "longest": budgets[-1]}
    rows = {"max_new_tokens": 3, "n_summaries": 2, "summary_train_rows": "all"} | (rows or {})
    stages = {
        "rows": {"brpo": functools.partial(budget_answers, **places, **rows)},
        "credits": {"brpo": functools.partial(brpo, **credit)},
    }
    if control:
        stages["controls"] = {"brpo": functools.partial(thinking_only, **places)}
    if look is not None:
        stages["rows"]["look"] = lambda rollout: look.append(rollout) or rollout
    if spy is not None:
        stages["credits"]["spy"] = functools.partial(spy, kinds=BOTH)
    return stages


def mean(values):
    return math.fsum(values) / len(values)


def score(kept, completion):
    """The share of even tokens, as the fixture's reward; 0 without exactly one end of thinking, or after EOS."""
    formed = [*kept[-1:], *completion[len(kept) :]].count(END) == 1 and kept[-1] != EOS
    return sum(token % 2 == 0 for token in completion) / len(completion) if formed else 0.0


def by_the_equations(rollout, *, prior, mode, decay, n_summaries, decoupled, weight):
    """[(prompt, completion, credit per token)] of every row, and r[i][j], from the rows' tokens and budgets alone."""
    n, size = len(rollout.inputs), rollout.group_size
    budgets = rollout.signals["budgets"].tolist()
    m = len(budgets[0])
    thinking, answers = rollout.rows[:n], iter(rollout.rows[n:])
    r, answered = [], []
    for i, row in enumerate(thinking):
        z, scores, own = row.completion_ids, [], []
        for b in budgets[i]:
            forced = [] if len(z) <= b and z[-1] == END else [END]
            for _ in range(n_summaries):
                if not decoupled and b != budgets[i][-1]:
                    continue
                answer = next(answers)
                assert answer.parent == i and answer.completion_ids[: len(z[:b] + forced)] == z[:b] + forced
                scores.append((len(z[:b]), score(z[:b], answer.completion_ids)))
                own.append((answer, len(z[:b] + forced)))
        r.append([mean([s for _, s in scores[k : k + n_summaries]]) for k in range(0, len(scores), n_summaries)])
        answered.append((scores, own))
    assert next(answers, None) is None
    if not decoupled:
        r = [
            [*before[:-1], final[0]] for before, final in zip(rollout.signals["budget_scores"].tolist(), r, strict=True)
        ]
    result = []
    for i, row in enumerate(thinking):
        group = range(i - i % size, i - i % size + size)
        named = {"base": [0.0] * (m - 1) + [1.0], "linear": budgets[i], "uniform": [1.0] * m}
        weights = named[prior] if isinstance(prior, str) else prior
        p = [w / math.fsum(weights) for w in weights]
        credit = []
        for t in range(1, len(row.completion_ids) + 1):
            j = next(j for j in range(m) if budgets[i][j] >= t)
            returns = {who: math.fsum(p[k] * r[who][k] for k in range(j, m)) for who in group}
            v2 = mean(list(returns.values()))
            earlier = [decay ** (j - k) for k in range(j)]
            v1 = sum(w * r[i][k] for k, w in enumerate(earlier)) / sum(earlier) * sum(p[j:]) if j else 0.0
            v = {"brpo": j / m * v1 + (m - j) / m * v2, "v1only": v1, "v2only": v2, "none": 0.0}[mode]
            credit.append(returns[i] - v)
        result.append((row.prompt_ids, row.completion_ids, credit))
    for i, (scores, own) in enumerate(answered):
        for number, ((cut, s), (answer, context)) in enumerate(zip(scores, own, strict=True)):
            if n_summaries == 1:
                siblings = [answered[who][0][number][1] for who in range(i - i % size, i - i % size + size)]
            else:
                siblings = [other for length, other in scores if length == cut]
            credit = (s - mean(siblings)) * weight
            tokens = len(answer.completion_ids) - context
            result.append((thinking[i].prompt_ids, answer.completion_ids, [0.0] * context + [credit] * tokens))
    return r, result


CASES = {
    "AR-uniform": ({"prior": "uniform", "mode": "brpo", "decay": 0.5}, {"drawn": True}, 1 / 6),
    "AR-linear, one answer": (
        {"prior": "linear", "mode": "brpo", "decay": 0.5},
        {"drawn": True, "n_summaries": 1, "summary_weight": "code"},
        1.0,
    ),
    "GRPO with variance reduction": (
        {"prior": "base", "mode": "brpo", "decay": 0.25},
        {"n_summaries": 1, "decoupled": False},
        1.0,
    ),
    "v1only": ({"prior": [1, 0, 3], "mode": "v1only", "decay": 1.0}, {"n_summaries": 3, "summary_weight": 0.3}, 0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_that_of_the_equations(run, tiny, name):
    """Plain gradient descent on -1/(traces * L) sum of credit * log-probability, from rows that the model sampled."""
    credit, rows, weight = CASES[name]
    look = []
    found = run(method(look=look, rows=rows, **credit), learning_rate=1.0, **PLAIN)
    settings = {"n_summaries": 2, "decoupled": True, "weight": weight} | credit
    settings |= {key: value for key, value in rows.items() if key in settings}
    scores, expected = by_the_equations(look[0], **settings)
    torch.testing.assert_close(look[0].signals["budget_scores"], torch.tensor(scores), rtol=0, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32)
    loss = 0.0
    for prompt, completion, values in expected:
        ids = torch.tensor([prompt + completion])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        loss = loss - (logps[len(prompt) - 1 :] * torch.tensor(values)).sum() / (8 * 12)
    loss.backward()
    moved = 0.0
    for key, weights in model.named_parameters():
        torch.testing.assert_close(found.weights[key], (weights - weights.grad).detach(), rtol=0, atol=2e-6)
        moved = max(moved, weights.grad.abs().max().item())
    assert moved > 1e-3


def test_the_table_shows_the_first_answer_at_the_last_budget(run, tiny):
    look = []
    result = run(method(look=look), log_completions=True, num_completions_to_print=0, **PLAIN)
    finals = [look[0].rows[8 + 6 * i + 4].completion_ids for i in range(8)]
    table = pd.read_parquet(min(Path(result.trainer.args.output_dir).glob("completions/*.parquet")))
    shown = [text if isinstance(text, str) else text[0]["content"] for text in table["completion"]]
    assert shown == tiny[1].batch_decode(finals, skip_special_tokens=True)
    assert all(row.completion_ids != final for row, final in zip(look[0].rows[8:14:2], finals, strict=False))


def test_credit_on_forced_and_padded_tokens_trains_nothing(run):
    def rubbish(advantages, mask):
        return torch.where(mask > 0, advantages, torch.full_like(advantages, torch.nan))

    clean = run(method(), learning_rate=1.0, **PLAIN)
    assert clean.distance(run(method(spy=rubbish), learning_rate=1.0, **PLAIN)) == 0.0


SAVED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9, "optim": "sgd", "max_steps": 2}


def test_resume_draws_the_same_budgets_and_answers(run, tmp_path):
    stages = method(rows={"drawn": True, "summary_train_rows": 1})
    whole = run(stages, output_dir=tmp_path / "whole", **SAVED)
    resumed = run(stages, output_dir=tmp_path / "again", resume=str(tmp_path / "whole/checkpoint-1"), **SAVED)
    assert whole.distance(resumed) == 0.0


# Scripted traces


@pytest.fixture
def scripted(monkeypatch):
    """scripted(traces, answer): the trainer samples those traces, and answer(context, its turn) after them."""

    def install(traces, answer):
        asked, turns = [], {}

        def sample(self, prompt_ids, *, num_generations=1, max_new_tokens=None, stops=()):
            longest = max_new_tokens or self.generation_config.max_new_tokens
            asked.append((longest, tuple(stops)))
            ends = {*self.eos_token_ids, *stops}
            return [until_end(trace[:longest], ends) for _, trace in zip(prompt_ids, traces, strict=True)], None

        def extend(self, contexts, *, max_new_tokens=None, stops=(), batch_rows=None):
            found = []
            for context in contexts:
                turns[tuple(context)] = turns.get(tuple(context), 0) + 1
                found.append(until_end(answer(context, turns[tuple(context)])[:max_new_tokens], {EOS, *stops}))
            return found, None

        monkeypatch.setattr(TokenGRPOTrainer, "sample", sample)
        monkeypatch.setattr(TokenGRPOTrainer, "extend", extend)
        return asked

    return install


def is_right(completion_ids, **_):
    return [float(ids[-2:] == [RIGHT, EOS]) for ids in completion_ids]


GROUP = {"per_device_train_batch_size": 4, "num_generations": 4, "reward": is_right}


def test_a_last_budget_longer_than_every_trace(run, scripted):
    """Budgets 2, 4, 12 with two answers each; the traces end after 2, 3, 3 (by EOS) and 1 tokens."""
    seen, look = [], []

    def spy(advantages, mask, kind, rewards):
        seen.append((advantages, mask, kind, rewards))
        return advantages

    def answer(context, turn):
        right = {50: turn == 1, 51: True, 53: True}
        return [RIGHT if any(right.get(token, False) for token in context[-5:]) else WRONG, EOS]

    asked = scripted([[50, END], [51, 52, END], [53, 54, EOS], [END]], answer)
    result = run(method(budgets=(2, 4, 12), look=look, spy=spy), **PLAIN, **GROUP)
    assert asked == [(12, (END,))]
    scores = [[0.5, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert look[0].signals["budget_scores"].tolist() == scores
    contexts = [row.completion_ids[:-2] for row in look[0].rows[4:]]
    assert contexts == [
        *[[50, END]] * 6,
        *[[51, 52, END]] * 6,  # cut after 52 and closed by force, or by itself
        *[[53, 54, END]] * 2,
        *[[53, 54, EOS, END]] * 4,
        *[[END]] * 6,
    ]
    advantages, mask, kind, rewards = seen[0]
    assert rewards.tolist() == [0, 1, 0, 0, *[1, 0, 0, 0, 0, 0], *[1] * 6, *[1, 1, 0, 0, 0, 0], *[0] * 6]
    assert kind == ["thinking"] * 4 + ["summary"] * 24
    trained = [row[own > 0].tolist() for row, own in zip(advantages, mask, strict=True)]
    assert trained[0] == pytest.approx([1 / 6 - 3 / 8] * 2)
    assert trained[1] == pytest.approx([1 - 3 / 8] * 2 + [2 / 3 - (1 / 3 * 2 / 3 + 2 / 3 * 1 / 6)])
    assert trained[2] == pytest.approx([1 / 3 - 3 / 8] * 2 + [-(1 / 3 * 2 / 3 + 2 / 3 * 1 / 6)])
    assert trained[3] == pytest.approx([-3 / 8])
    assert trained[4] == pytest.approx([5 / 6 / 6] * 2) and trained[5] == pytest.approx([-1 / 6 / 6] * 2)
    assert all(row == pytest.approx([0.0, 0.0]) for row in trained[10:])
    (logged,) = [entry for entry in result.metrics if "final_score" in entry]
    assert logged["anytime_score"] == pytest.approx(4.5 / 12) and logged["final_score"] == 0.25
    assert logged["completions/clipped_ratio"] == 0.0 and logged["completions/mean_length"] == 2.25
    assert logged["thinking_closed"] == 0.75 and logged["summaries_well_formed"] == pytest.approx(20 / 24)


def test_what_a_whole_completion_says_after_its_thinking_is_dropped(run, scripted):
    """Without the control: a second end of thinking, and an answer, in what was sampled after the first."""
    look = []
    traces = [[50, END, 55, END, RIGHT, EOS], [51, END, RIGHT, EOS], [52, END, END, EOS], [53] * 20]
    asked = scripted(traces, lambda context, turn: [RIGHT if 50 in context else WRONG, EOS])
    result = run(method(budgets=(2, 8), control=False, look=look), **PLAIN, **GROUP)
    assert asked == [(12, ())]
    thinking = [row.completion_ids for row in look[0].rows[:4]]
    assert thinking == [[50, END], [51, END], [52, END], [53] * 8]
    assert look[0].signals["budget_scores"].tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    (logged,) = [entry for entry in result.metrics if "final_score" in entry]
    assert logged["completions/clipped_ratio"] == 0.25 and logged["completions/max_length"] == 8
    assert logged["reward"] == 0.25 and logged["thinking_tokens"] == 2.75, "without the ends of thinking"
