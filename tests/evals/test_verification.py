"""Self-rewards at evaluation: agreement with the grader, its intervals, what votes weigh, and log-probabilities."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltoken.evals import generators
from rltoken.evals.generate import SelfReward, Settings, evaluate
from rltoken.evals.generators import TransformersGenerator
from rltoken.evals.metrics import summary, vote_weights
from rltoken.evals.verification import auroc, f1, verification
from rltoken.rollout.forced import encode_template
from rltoken.tiny import accuracy, problems
from rltoken.tiny.model import build_model
from rltoken.tiny.tokenizer import build_tokenizer
from rltoken.tiny.world import World

NAN = math.nan


def table(scores, right, ids=None, control=None):
    """One completion per score, each of a problem of its own unless told otherwise."""
    return pd.DataFrame(
        {
            "id": ids or list(range(len(scores))),
            "self_reward": scores,
            "correct": [float(value) for value in right],
            "mean_logp": control or [0.0 if math.isfinite(score) else NAN for score in scores],
        }
    )


def means(found):
    return {name: estimate.mean for name, estimate in found.items()}


def test_agreement_by_hand():
    """Above .5: three, two of them right; right are three. Of 3 x 2 pairs the wrong .6 beats .2."""
    found = verification(table([0.9, 0.7, 0.6, 0.2, -0.4, NAN], [True, True, False, True, False, True]))
    assert means(found) == {
        "self_reward_accuracy": pytest.approx(3 / 5), "self_reward_f1": pytest.approx(4 / 6),
        "self_reward_auroc": pytest.approx(5 / 6), "mean_logp_auroc": 0.5,
    }  # fmt: skip


def test_a_half_is_not_held_to_be_correct():
    assert means(verification(table([0.5, 0.51], [False, True])))["self_reward_accuracy"] == 1.0


def test_agreement_on_the_worked_self_rewards():
    """.95, .3, .05 and -.1 of right, wrong, right, wrong: one right answer is missed; three of four pairs in order."""
    found = verification(table([0.95, 0.3, 0.05, -0.1], [True, False, True, False], control=[-3, -2, -1, -4]))
    assert means(found) == {
        "self_reward_accuracy": 0.75, "self_reward_f1": pytest.approx(2 / 3), "self_reward_auroc": 0.75,
        "mean_logp_auroc": 0.75,
    }  # fmt: skip


def test_ties_count_half_and_one_class_has_no_auroc():
    assert auroc([0.5, 0.5, 0.5], [True, False, False], "abc").mean == 0.5
    assert auroc([1.0, 0.5, 0.5], [True, True, False], "abc").mean == 0.75
    assert math.isnan(auroc([0.1, 0.2], [True, True], "ab").mean)


def test_without_a_self_reward_or_a_hit():
    none = verification(table([NAN], [True]))
    assert all(math.isnan(estimate.mean) for estimate in none.values())
    assert math.isnan(f1([False], [False], "a").mean)
    assert f1([False, False], [True, False], "ab").mean == 0.0


def test_intervals_by_hand():
    """Linear parts, times the 4 problems, about the number, and t with 3 degrees of freedom, 3.182446."""
    # F1 = 2 * 1 / (2 + 2); parts (2 - .5 * 2) / 4, -.5 / 4, -.5 / 4 and 0: values 1.5, 0, 0, .5 with s = .707107
    found = f1([True, True, False, False], [True, False, True, False], "abcd")
    assert (found.mean, found.n) == (0.5, 4) and (found.low, found.high) == (0.0, 1.0)
    assert found.half_width == 0.5, "3.182446 * .707107 / 2 = 1.125 would leave [0, 1]"
    # twenty times as many such problems: s = sqrt(80 / 79 * .375), t = 1.990450
    many = f1([True, True, False, False] * 20, [True, False, True, False] * 20, range(80))
    assert many.half_width == pytest.approx(1.990450 * math.sqrt(80 / 79 * 0.375 / 80), abs=1e-6)
    # AUROC .75: correct ones beat 1 and .5 of the wrong, wrong ones are beaten by .5 and 1: parts +-.125, values +-.5
    scores, right = [3.0, 1.0, 2.0, 0.0], [True, True, False, False]
    found = auroc(scores * 20, right * 20, range(80))
    assert found.mean == 0.75
    assert found.half_width == pytest.approx(1.990450 * math.sqrt(80 / 79 * 0.25 / 80), abs=1e-6)


def test_copies_of_a_completion_within_its_problem_change_nothing():
    rng = np.random.default_rng(0)
    scores, right = rng.normal(size=40), rng.random(40) < 0.5
    for statistic in (lambda *rows: auroc(*rows), lambda s, *rows: f1(s > 0, *rows)):
        once, thrice = (statistic(scores.repeat(n), right.repeat(n), np.arange(40).repeat(n)) for n in (1, 3))
        for end in ("mean", "low", "high", "n"):
            assert getattr(once, end) == pytest.approx(getattr(thrice, end))


def test_intervals_cover_the_truth():
    """Scores N(1, 1) of correct and N(0, 1) of wrong ones with a common part per problem: AUROC is Phi(1 / sqrt 2)."""
    rng, hits, clusters, shared = np.random.default_rng(1), 0, 60, 0.8
    for _ in range(300):
        right = rng.random((clusters, 8)) < rng.beta(1, 1, (clusters, 1))
        noise = shared * rng.normal(size=(clusters, 1)) + math.sqrt(1 - shared**2) * rng.normal(size=(clusters, 8))
        found = auroc((right + noise).ravel(), right.ravel(), np.arange(clusters).repeat(8))
        hits += found.low <= 0.760250 <= found.high
    assert 0.90 <= hits / 300 <= 0.985


def test_what_votes_weigh():
    """exp(-log 2) of the control is a half; a column `weight` goes before the self-reward."""
    rows = table([7.0, 0.5, -3.0, NAN], [1, 1, 0, 0], control=[-math.log(2), 0.0, -1e4, NAN])
    weights = {name: found.tolist() for name, found in vote_weights(rows).items()}
    assert weights == {"weighted_majority": [1.0, 0.5, 0.0, 0.0], "mean_logp_majority": [0.5, 1.0, 0.0, 0.0]}
    assert vote_weights(rows.assign(weight=3.0))["weighted_majority"].tolist() == [3.0] * 4
    assert vote_weights(rows[["id", "correct"]]) == {}


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=20), st.integers(1, 4))
def test_auroc_is_the_share_of_pairs_in_order(pairs, size):
    right = [score for score, correct in pairs if correct]
    wrong = [score for score, correct in pairs if not correct]
    found = auroc(*zip(*pairs, strict=True), [i // size for i in range(len(pairs))])
    if not right or not wrong:
        assert math.isnan(found.mean)
        return
    wins = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    assert found.mean == pytest.approx(wins / (len(right) * len(wrong)))


# Log-probabilities of completions


@pytest.fixture(scope="module")
def tiny():
    tokenizer = build_tokenizer(World())
    return build_model(tokenizer, seed=0).train(), tokenizer


@torch.no_grad()
@settings(max_examples=15)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(3, 20), min_size=1, max_size=6), st.lists(st.integers(1, 20), min_size=1, max_size=9)
        ),
        min_size=1,
        max_size=5,
    ),
    at_once=st.integers(1, 40),
)
def test_each_token_has_the_log_probability_of_a_forward_of_its_own(tiny, rows, at_once):
    """Whatever rows stand beside it, and however few positions are computed at once."""
    model, tokenizer = tiny
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generators, "POSITIONS", at_once)
        found = TransformersGenerator(model, tokenizer, temperature=1.0, batch_size=2).logps(
            *zip(*rows, strict=True), temperature=0.7
        )
    assert model.training
    for (context, ids), values in zip(rows, found, strict=True):
        logits = model.eval()(input_ids=torch.tensor([context + ids])).logits[0, len(context) - 1 : -1] / 0.7
        model.train()
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(values), expected, rtol=0, atol=1e-5)


def test_logits_are_of_few_positions_at_once(tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(generators, "POSITIONS", 8)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:2].numel()))
    TransformersGenerator(model, tokenizer, temperature=1.0, batch_size=2).logps([[5] * 9] * 4, [[6] * 20] * 4, 1.0)
    handle.remove()
    assert max(seen) == 8 and len(seen) == 14


# In an evaluation


class Keeping(TransformersGenerator):
    """Keeps what it completes, forced answers aside."""

    def complete(self, contexts, max_new_tokens, stops, seeds, begun=()):
        found = super().complete(contexts, max_new_tokens, stops, seeds, begun)
        self.kept = self.kept if begun else [*getattr(self, "kept", []), *zip(contexts, found, strict=True)]
        return found


def evaluated(tiny, **changes):
    """The table, and each completion with its prompt."""
    model, tokenizer = tiny
    options = {
        "samples": 4, "temperature": 1.0, "max_new_tokens": 40, "batch_size": 16, "seed": 3, "budgets": (4,),
        "max_answer_tokens": 3,
    }  # fmt: skip
    chosen = Settings(**options | changes)
    generator = Keeping(model, tokenizer, temperature=1.0, batch_size=chosen.batch_size)
    template = encode_template(tokenizer, think_end="</think>")
    return evaluate(generator, tokenizer, problems(6, split="eval"), accuracy, template, chosen), generator.kept


@torch.no_grad()
def test_an_evaluation_adds_the_columns_and_changes_none(tiny):
    """The random model writes the end now and then; only what has ended has a self-reward."""
    asked = SelfReward(token=2, reference=-4.0, scale=0.5, temperature=0.8)
    (found, kept), (plain, _) = evaluated(tiny, self_reward=asked), evaluated(tiny)
    pd.testing.assert_frame_equal(found[plain.columns], plain)
    assert set(found) - set(plain) == {"self_reward", "appended_logp", "mean_logp"}
    ended = ~found["truncated"]
    assert 3 <= ended.sum() < len(found)
    assert (found["self_reward"].notna() == ended).all() and (found["mean_logp"].notna() == ended).all()
    np.testing.assert_allclose(found["self_reward"], 0.5 * (found["appended_logp"] + 4.0))
    for row in ended.to_numpy().nonzero()[0]:
        prompt, ids = kept[row]
        logps = (tiny[0](input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 :] / 0.8).log_softmax(-1)
        assert found["appended_logp"][row] == pytest.approx(float(logps[-1, 2]), abs=1e-4)
        mean = logps[:-1].gather(-1, torch.tensor(ids)[:, None]).mean()
        assert found["mean_logp"][row] == pytest.approx(float(mean), abs=1e-4)


def test_a_summary_has_numbers_and_intervals_and_a_weighted_vote():
    rows = table([0.9, 0.4, NAN, 0.1, 0.2, 0.8], [1, 0, 0, 0, 0, 1], ids=list("aaabbb"))
    rows = rows.assign(
        outcome="wrong", thinking_tokens=3, completion_tokens=5, truncated=False, answer_class=[0, 1, 1, 0, 0, 1],
        appended_logp=[-1.0, -2.0, NAN, -3.0, -3.0, -1.0],
    )  # fmt: skip
    found = summary(rows)
    assert (found["majority_at_k"][-1], found["weighted_majority"]) == (0.0, 1.0), "the one right vote outweighs two"
    assert found["self_reward_accuracy"] == found["self_reward_auroc"] == found["self_reward_f1"] == 1.0
    assert found["self_reward_auroc_interval"] == [1.0, 1.0] and found["mean_logp_auroc"] == 0.5
    assert found["appended_logp"] == -2.0 and found["appended_logp_std"] == 1.0
    nothing = summary(rows.assign(self_reward=NAN, appended_logp=NAN, mean_logp=NAN))
    assert nothing["self_reward_auroc"] is nothing["self_reward_f1"] is nothing["appended_logp"] is None
    assert nothing["weighted_majority"] == nothing["majority_at_k"][-1] == 0.0
    plain = rows.drop(columns=["self_reward", "appended_logp", "mean_logp"])
    assert not [name for name in summary(plain) if "self_reward" in name or "logp" in name or "weighted" in name]
