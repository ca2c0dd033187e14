"""BRPO's worked numbers, its answers on scripted traces, the whole of it in plain loops, and what it draws."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltoken.errors import UserError
from rltoken.methods.brpo import (
    brpo,
    budget_advantages,
    budget_answers,
    budget_index,
    drawn_budgets,
    earlier_mean,
    final_rewards,
    prior_of,
    summary_advantages,
    thinking_only,
    trained,
)
from rltoken.pipeline import build
from rltoken.rng import seeded
from rltoken.rollout.sampler import weighted_sum
from rltoken.types import Continuation, Progress, Rollout, Row, Template

SCORES = torch.tensor([[0.25, 0.5, 1, 1], [0, 0, 0.25, 0.5], [1, 0.75, 1, 1], [0, 0.25, 0, 0.75]])
BUDGETS = torch.tensor([[4, 8, 12, 16]] * 4)
ONE_GROUP = torch.zeros(4, dtype=torch.long)
EOS, END, ELLIPSIS, HEADER, ANSWER = 1, 4, 14, 20, 31
TEMPLATE = Template(think_end_id=END, cut=(ELLIPSIS, END, HEADER), ended=(HEADER,))


def assert_close(found, expected, atol=2e-6):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=atol)


# Thinking: Eq. 3 and 7 to 9


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (
            "uniform",
            [
                [0.171875, 0.25, 0.223958, 0.058594],
                [-0.328125, -0.140625, 0.015625, 0.047433],
                [0.421875, 0.171875, 0.119792, 0.025112],
                [-0.265625, -0.078125, -0.026042, 0.123326],
            ],
        ),
        (
            "linear",
            [
                [0.225, 0.317187, 0.307292, 0.09375],
                [-0.325, -0.151563, 0.028125, 0.075893],
                [0.35, 0.198438, 0.161458, 0.040179],
                [-0.25, -0.076563, -0.005208, 0.197321],
            ],
        ),
        (
            "base",
            [
                [0.1875, 0.328125, 0.385417, 0.234375],
                [-0.3125, -0.109375, 0.09375, 0.189732],
                [0.1875, 0.140625, 0.177083, 0.100446],
                [-0.0625, 0.140625, 0.260417, 0.493304],
            ],
        ),
    ],
)
def test_credit_under_the_three_priors(prior, expected):
    assert_close(budget_advantages(SCORES, prior_of(BUDGETS, prior), ONE_GROUP), expected)
    per_token = brpo(SCORES, BUDGETS, ONE_GROUP, torch.ones(4, 16), prior=prior)
    assert_close(per_token[:, [0, 4, 8, 12]], expected)
    assert_close(per_token[:, [3, 7, 11, 15]], expected)


def uniform(mode, **settings):
    return budget_advantages(SCORES, prior_of(BUDGETS, "uniform"), ONE_GROUP, mode=mode, **settings)


def test_intermediates_of_the_uniform_prior():
    """R = [.6875,.625,.5,.25] and V1 = [0,.1875,.208333,.1875] of the first response; V2 = [.515625,...] of all."""
    returns = uniform("none")
    assert_close(returns[0], [0.6875, 0.625, 0.5, 0.25])
    assert_close((returns - uniform("v1only"))[0], [0.0, 0.1875, 0.208333, 0.1875])
    assert_close(returns - uniform("v2only"), [[0.515625, 0.4375, 0.34375, 0.203125]] * 4)


def test_v1only_v2only_and_none():
    assert_close(uniform("none")[3], [0.25, 0.25, 0.1875, 0.1875])
    assert_close(uniform("v1only")[0], [0.6875, 0.4375, 0.291667, 0.0625])
    assert_close(uniform("v2only")[0], [0.171875, 0.1875, 0.15625, 0.046875])


def test_v2only_under_the_base_prior_is_dr_grpo_on_the_final_score():
    found = brpo(SCORES, BUDGETS, ONE_GROUP, torch.ones(4, 16), prior="base", mode="v2only")
    assert_close(found, [[0.1875] * 16, [-0.3125] * 16, [0.1875] * 16, [-0.0625] * 16])


def test_nearer_budgets_weigh_more():
    """(1 * .25 + 2 * .5) / 3, then (1 * .25 + 2 * .5 + 4 * 1) / 7; with decay 1 the plain mean."""
    assert_close(earlier_mean(SCORES, 0.5)[0], [0.0, 0.25, 0.416667, 0.75])
    assert_close(earlier_mean(SCORES, 1.0)[0], [0.0, 0.25, 0.375, 0.583333])
    assert_close(uniform("v1only", decay=1.0)[0], [0.6875, 0.4375, 0.3125, 0.104167])


def test_priors():
    assert_close(prior_of(BUDGETS[:1], "linear"), [[0.1, 0.2, 0.3, 0.4]])
    assert_close(prior_of(BUDGETS[:1], "uniform"), [[0.25] * 4])
    assert_close(prior_of(BUDGETS[:1], "base"), [[0.0, 0.0, 0.0, 1.0]])
    assert_close(prior_of(BUDGETS[:2], [1, 1, 0, 2]), [[0.25, 0.25, 0.0, 0.5]] * 2)
    assert_close(prior_of(torch.tensor([[1, 3], [2, 2]]), "linear"), [[0.25, 0.75], [0.5, 0.5]])


def credit_with(**settings):
    return build({"credits": {"brpo": functools.partial(brpo, **settings)}})


@pytest.mark.parametrize("prior", ["last", [1, 1, 1, -1], [0, 0, 0, 0]])
def test_a_prior_that_is_none_is_refused(prior):
    with pytest.raises(UserError, match=r"method\.credits\.brpo\.prior: "):
        credit_with(prior=prior)


def test_a_prior_needs_a_weight_per_budget():
    with pytest.raises(ValueError, match="prior: 2 weights for 4 budgets"):
        prior_of(BUDGETS, [1, 2])


@pytest.mark.parametrize(("setting", "value"), [("mode", "v3only"), ("decay", 0.0), ("decay", 1.5)])
def test_an_unknown_mode_and_a_decay_out_of_range_are_refused(setting, value):
    with pytest.raises(UserError, match=rf"method\.credits\.brpo\.{setting}: .*{value}"):
        credit_with(**{setting: value})


def test_segments():
    budgets = torch.tensor([[4, 8, 12, 16]])
    assert budget_index(budgets, 11)[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert budget_index(torch.tensor([[1, 3], [2, 4]]), 5).tolist() == [[0, 1, 1, 2, 2], [0, 0, 1, 1, 2]]


def test_tokens_beyond_the_last_budget_have_no_credit():
    found = brpo(SCORES, BUDGETS, ONE_GROUP, torch.ones(4, 20), prior="uniform")
    assert torch.equal(found[:, 16:], torch.zeros(4, 4)) and (found[:, :16] != 0).all()


def test_one_response_alone_has_its_own_return_as_v2():
    """Eq. 8 as it stands; the authors' code sets V2 = 0 for a group of one."""
    alone = budget_advantages(SCORES[:1], prior_of(BUDGETS[:1], "uniform"), ONE_GROUP[:1], mode="v2only")
    assert_close(alone, [[0.0] * 4])


def test_groups_have_baselines_of_their_own():
    two = budget_advantages(
        torch.cat([SCORES, 1 - SCORES]), prior_of(BUDGETS.repeat(2, 1), "linear"), torch.arange(8) // 4
    )
    one = budget_advantages(SCORES, prior_of(BUDGETS, "linear"), ONE_GROUP)
    torch.testing.assert_close(two, torch.cat([one, -one]))


def test_an_ungraded_response_abstains():
    scores = torch.cat([SCORES, torch.full((1, 4), torch.nan)])
    found = brpo(scores, torch.cat([BUDGETS, BUDGETS[:1]]), torch.zeros(5).long(), torch.ones(5, 16), prior="linear")
    assert torch.equal(found[4], torch.zeros(16))
    torch.testing.assert_close(found[:4], brpo(SCORES, BUDGETS, ONE_GROUP, torch.ones(4, 16), prior="linear"))


# Answers: Eq. 10


def answers(scores, prefix=None, group=None):
    scores = torch.tensor(scores)
    n, k, _ = scores.shape
    prefix = torch.arange(k).expand(n, k) if prefix is None else torch.tensor(prefix)
    return summary_advantages(scores, prefix, torch.zeros(n).long() if group is None else torch.tensor(group))


def test_four_answers_to_one_prefix():
    assert_close(answers([[[1.0, 0.0, 1.0, 0.0]]]), [[[0.5, -0.5, 0.5, -0.5]]])


def test_sixteen_answers_to_thinking_that_ended_before_the_first_budget():
    """One prefix for all four budgets: one group of 16, the mean 15/16."""
    found = answers([[[1.0] * 4, [1.0, 1.0, 0.0, 1.0], [1.0] * 4, [1.0] * 4]], prefix=[[0, 0, 0, 0]])
    assert_close(found.flatten(), [0.0625] * 6 + [-0.9375] + [0.0625] * 9)


def test_budgets_that_share_a_prefix_share_a_group():
    """Thinking that ended between the first and the second of four budgets: two answers, then six in one group."""
    found = answers([[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]], prefix=[[0, 1, 1, 1]])
    assert_close(found[0], [[0.5, -0.5], [1 / 6, 1 / 6], [-5 / 6, 1 / 6], [1 / 6, 1 / 6]])


def test_prefixes_of_different_traces_are_different():
    assert_close(answers([[[1.0, 1.0]], [[0.0, 0.0]]], prefix=[[0], [0]]), [[[0.0, 0.0]], [[0.0, 0.0]]])


def test_one_answer_is_measured_against_its_siblings_at_the_same_budget():
    found = answers([[[1.0], [0.0]], [[0.0], [0.0]], [[1.0], [1.0]], [[1.0], [1.0]]], group=[0, 0, 1, 1])
    assert_close(found.squeeze(2), [[0.5, 0.0], [-0.5, 0.0], [0.0, 0.0], [0.0, 0.0]])
    shared = answers([[[1.0], [0.0]], [[0.0], [0.0]]], prefix=[[0, 0], [0, 0]])
    assert_close(shared.squeeze(2), [[0.5, 0.0], [-0.5, 0.0]])


def test_ungraded_answers_abstain():
    nan = torch.nan
    assert_close(answers([[[1.0, nan, 0.0]]]), [[[0.5, 0.0, -0.5]]])
    assert_close(answers([[[nan], [nan]], [[1.0], [nan]], [[0.0], [1.0]]]).squeeze(2), [[0, 0], [0.5, 0], [-0.5, 0.0]])


def chosen(advantages, *, first=0, summary_train_rows="all", summary_weight="paper", seed=0):
    rows = [Row([1], [2 + i], [1]) for i in range(len(advantages))]
    return trained(
        rows,
        [0.0] * len(rows),
        advantages,
        first=first,
        summary_train_rows=summary_train_rows,
        summary_weight=summary_weight,
        rng=seeded(seed),
    )


@pytest.mark.parametrize(("weight", "factor"), [("paper", 1 / 8), ("code", 1.0), (0.25, 0.25), (2, 2.0)])
def test_weight_of_an_answer(weight, factor):
    """The paper's is 1/(mA): two budgets with four answers each."""
    found = chosen([0.5, -0.5, 0.5, -0.5, 0.75, -0.25, -0.25, -0.25], summary_weight=weight)
    assert [row.advantage for row in found] == [factor * a for a in (0.5, -0.5, 0.5, -0.5, 0.75, -0.25, -0.25, -0.25)]


def test_of_the_last_budget_only():
    found = chosen([0.5, -0.5, 0.75, -0.25], first=2)
    assert [(row.completion_ids, row.advantage) for row in found] == [([4], 0.375), ([5], -0.125)]


def test_drawn_answers_stand_for_all_that_have_an_advantage():
    """Three of four have one; one is drawn, so it weighs three times as much: 3 * 1/4."""
    found = chosen([0.0, 1.0, 1.0, 1.0], summary_train_rows=1)
    assert [row.advantage for row in found] == [0.75]
    assert [row.advantage for row in chosen([0.0, 1.0, 1.0, 1.0], summary_train_rows=2)] == [0.375] * 2
    assert [row.advantage for row in chosen([0.0, 1.0, 0.0, 1.0], summary_train_rows=3)] == [0.25] * 2
    assert chosen([0.0] * 4, summary_train_rows=1) == [] and len(chosen([0.0] * 4)) == 4


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("n_summaries", 0),
        ("max_new_tokens", 0),
        ("longest", 0),
        ("summary_train_rows", 0),
        ("summary_train_rows", "some"),
        ("summary_train_rows", 1.5),
        ("summary_weight", "half"),
        ("summary_weight", -1.0),
        ("budgets", [4, 2]),
        ("budgets", [0.5, 1.5]),
    ],
)
def test_settings_out_of_range_are_refused(setting, value):
    settings = {"budgets": [2, 4], "longest": 8} | {setting: value}
    with pytest.raises(UserError, match=rf"method\.rows\.brpo\.{setting}: "):
        build({"rows": {"brpo": functools.partial(budget_answers, **settings)}})


# Answers on scripted traces


class Scripted:
    """A sampler whose answers and scores are given, in the order in which they are asked for."""

    ends = frozenset([EOS])

    def __init__(self, scores, template=TEMPLATE, answer=(ANSWER, EOS), weights=(1.0,)):
        self.template, self.answer, self.weights = template, list(answer), torch.tensor(weights)
        self.scores, self.contexts, self.graded, self.asked = list(scores), [], [], {}

    def generate(self, contexts, *, max_new_tokens=None, stops=()):
        self.contexts += contexts
        self.asked = {"max_new_tokens": max_new_tokens, "stops": stops}
        return [Continuation(list(self.answer), None) for _ in contexts]

    def grade(self, inputs, completion_ids):
        self.graded += zip(inputs, completion_ids, strict=True)
        values = torch.tensor([self.scores.pop(0) for _ in inputs])
        return values.view(len(inputs), -1), [{"told": len(self.graded) - len(inputs) + i} for i in range(len(inputs))]

    def decode(self, inputs, completion_ids):
        return [" ".join(map(str, ids)) for ids in completion_ids]

    def total(self, rewards):
        return weighted_sum(rewards, self.weights)

    def most(self, n):
        return n


def ungraded(rows, inputs, group_size, seed, step):
    """A rollout of these rows before any answer is forced."""
    return Rollout(
        inputs=inputs,
        texts=[""] * len(rows),
        rewards=torch.full((len(rows), 1), torch.nan),
        rows=rows,
        progress=Progress(step, 10),
        group_size=group_size,
        seed=seed,
        graded=False,
        extras=[{}] * len(rows),
    )


def rollout_of(traces, group_size, seed=0, step=0):
    """Traces whose prompt is [100, number of the group]."""
    rows = [Row([100, 100 + i // group_size], list(z), [1] * len(z), parent=i) for i, z in enumerate(traces)]
    inputs = [{"prompt": f"p{i // group_size}", "number": i} for i in range(len(rows))]
    return ungraded(rows, inputs, group_size, seed, step)


def run_answers(traces, scores, budgets, *, group_size=None, **settings):
    """(rollout after the stage, sampler): `scores` are those of each trace's K * A answers."""
    sampler = Scripted(itertools.chain(*scores))
    rollout = rollout_of(traces, group_size or len(traces))
    options = {"longest": 16, "n_summaries": 1, "summary_train_rows": "all", "summary_weight": "code"} | settings
    return budget_answers(rollout, sampler, budgets=budgets, **options), sampler


def test_the_golden_scores_from_scripted_answers():
    """Four answers at each of the budgets 4, 8, 12, 16 make the worked table: anytime .515625, final .8125."""
    counts = (SCORES * 4).long().tolist()
    scores = [[float(a < right) for right in row for a in range(4)] for row in counts]
    result, _ = run_answers([[5] * 16] * 4, scores, [4, 8, 12, 16], n_summaries=4)
    assert_close(result.signals["budget_scores"], SCORES.tolist())
    assert torch.equal(result.signals["budgets"], BUDGETS)
    assert result.metrics["anytime_score"] == 0.515625 and result.metrics["final_score"] == 0.8125
    assert [result.metrics[f"budget_scores/{j}"] for j in (1, 2, 3, 4)] == [0.3125, 0.375, 0.5625, 0.8125]
    assert_close(result.rewards.squeeze(1), [1.0, 0.5, 1.0, 0.75])
    assert result.graded and len(result.rows) == 4 + 64


def test_early_thinking_is_answered_once_for_all_budgets_it_ended_before():
    """Ended after 3 of the budgets 2, 4, 6: two answers after the cut at 2, four after the whole thinking."""
    result, sampler = run_answers([[5, 6, END]], [[1.0, 0.0, 1.0, 1.0, 1.0, 0.0]], [2, 4, 6], n_summaries=2)
    cut, whole = [100, 100, 5, 6, ELLIPSIS, END, HEADER], [100, 100, 5, 6, END, HEADER]
    assert sampler.contexts == [cut] * 2 + [whole] * 4
    assert_close(result.signals["budget_scores"], [[0.5, 1.0, 0.5]])
    assert [row.advantage for row in result.rows[1:]] == [0.5, -0.5, 0.25, 0.25, 0.25, -0.75]
    assert [row.reward for row in result.rows[1:]] == [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert [row.train_mask for row in result.rows[1:]] == [[0] * 5 + [1, 1]] * 2 + [[0] * 4 + [1, 1]] * 4
    assert result.rows[0].completion_ids == [5, 6, END] and result.rows[0].train_mask == [1, 1, 1]
    assert result.texts == [f"5 6 {END} {HEADER} {ANSWER} {EOS}"], "the first answer at the last budget"


def test_thinking_is_cut_at_the_last_budget_and_what_follows_it_is_dropped():
    traces = [[5] * 9, [5, 6, END, 7, 8], [5, EOS], [END]]
    result, sampler = run_answers(traces, [[1.0], [1.0], [1.0], [1.0]], [4], group_size=4)
    assert [row.completion_ids for row in result.rows[:4]] == [[5] * 4, [5, 6, END], [5, EOS], [END]]
    assert [context[2:] for context in sampler.contexts] == [
        [5] * 4 + [ELLIPSIS, END, HEADER],
        [5, 6, END, HEADER],
        [5, EOS, ELLIPSIS, END, HEADER],
        [END, HEADER],
    ]
    assert result.signals["budget_scores"].flatten().tolist() == [1.0, 1.0, 0.0, 1.0], "abandoned thinking scores 0"
    assert result.metrics["thinking_closed"] == 0.5 and result.metrics["summaries_well_formed"] == 0.75
    assert result.metrics["summary_tokens"] == 2.0


def test_log_probs_are_cut_with_their_tokens():
    rollout = rollout_of([[5, 6, END, 7]], 1)
    rollout.rows[0].logps = [-1.0, -2.0, -3.0, -4.0]
    result = budget_answers(rollout, Scripted([1.0]), budgets=[2], longest=8, n_summaries=1)
    assert result.rows[0].logps == [-1.0, -2.0]


def test_a_second_end_of_thinking_inside_the_answer_scores_0():
    sampler = Scripted([1.0], answer=(ANSWER, END, ANSWER, EOS))
    result = budget_answers(rollout_of([[5, 6]], 1), sampler, budgets=[2], longest=8, n_summaries=1)
    assert result.signals["budget_scores"].tolist() == [[0.0]] and result.rewards.tolist() == [[0.0]]
    assert result.metrics["summaries_well_formed"] == 0.0


def test_answers_end_at_the_templates_stops_and_the_limit():
    sampler = Scripted([1.0], template=Template(think_end_id=END, cut=(END,), stops=(9,)))
    budget_answers(rollout_of([[5]], 1), sampler, budgets=[1], longest=8, n_summaries=1, max_new_tokens=7)
    assert sampler.asked == {"max_new_tokens": 7, "stops": (9,)}


def test_undecoupled_trains_the_last_budgets_answers_and_scores_them_all():
    scores = [[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    result, _ = run_answers([[5] * 9] * 2, scores, [2, 8], n_summaries=2, decoupled=False, summary_weight="paper")
    assert_close(result.signals["budget_scores"], [[0.5, 0.5], [0.0, 1.0]])
    added = result.rows[2:]
    assert [(row.parent, row.reward, row.advantage) for row in added] == [
        (0, 1.0, 0.25),
        (0, 0.0, -0.25),
        (1, 1.0, 0.0),
        (1, 1.0, 0.0),
    ]


def test_an_answer_without_reward_abstains():
    nan = torch.nan
    result, _ = run_answers([[5] * 9] * 2, [[1.0, nan, 0.0, 0.0], [nan, nan, 1.0, 0.0]], [2, 8], n_summaries=2)
    scores = result.signals["budget_scores"]
    assert scores[0].tolist() == [1.0, 0.0] and scores[1, 0].isnan() and scores[1, 1] == 0.5
    assert result.metrics["budget_scores/1"] == 1.0 and result.metrics["budget_scores/2"] == 0.25
    assert [row.advantage for row in result.rows[2:]] == [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, -0.5]


def test_the_published_reward_is_the_final_score_under_several_reward_functions():
    """One function abstains on one of two answers: both totals must average the same sums."""
    sampler = Scripted([[1.0, torch.nan], [1.0, 1.0]], weights=(1.0, 1.0))
    result = budget_answers(rollout_of([[5] * 9], 1), sampler, budgets=[8], longest=8, n_summaries=2)
    assert result.signals["budget_scores"].tolist() == [[1.5]]
    assert sampler.total(result.rewards).tolist() == [1.5]


def test_the_format_gate_takes_what_helps_and_leaves_what_costs():
    """A reward of negative weight is a penalty: an answer that ends the thinking twice keeps it and loses the other."""
    sampler = Scripted([[1.0, 2.0]], answer=(END, ANSWER, EOS), weights=(1.0, -0.5))
    result = budget_answers(rollout_of([[5] * 9], 1), sampler, budgets=[8], longest=8, n_summaries=1)
    assert result.metrics["summaries_well_formed"] == 0.0
    assert sampler.total(result.rewards).tolist() == [-1.0]


def test_what_rewards_logged_for_the_last_budget_stays_with_its_trace():
    result, _ = run_answers([[5] * 9] * 2, [[0.0] * 4] * 2, [2, 8], n_summaries=2)
    assert [extra["told"] for extra in result.extras] == [2, 6]


def test_only_thinking_is_sampled():
    assert thinking_only(Progress(0, 1), budgets=[0.25, 0.5], longest=64) == {
        "max_completion_length": 32,
        "stop_at_think_end": True,
    }


def test_drawn_budgets_lie_in_their_segments_and_are_those_of_the_prompt():
    drawn = set()
    for step in range(200):
        rollout = rollout_of([[5]] * 4, 2, step=step)
        budgets = [drawn_budgets([2, 4, 9], rollout, row) for row in rollout.rows]
        assert budgets[0] == budgets[1] and budgets[2] == budgets[3]
        drawn.update(map(tuple, budgets))
    assert drawn == set(itertools.product((1, 2), (3, 4), (9,)))


def test_a_model_that_does_not_think_ends_its_thinking_with_the_sequence():
    template = Template(think_end_id=None, cut=(HEADER,), ended=(HEADER,))
    sampler = Scripted([1.0, 1.0], template=template)
    result = budget_answers(rollout_of([[5, 6, EOS], [5, 6, 7]], 2), sampler, budgets=[3], longest=8, n_summaries=1)
    assert [context[2:] for context in sampler.contexts] == [[5, 6, HEADER], [5, 6, 7, HEADER]]
    assert result.signals["budget_scores"].tolist() == [[1.0], [1.0]] and result.metrics["thinking_closed"] == 0.5


# The whole method in plain loops, as a reference


def reference(traces, scores, budgets, prior, answers_each, decay):
    """(scores r[i][j], credit of each thinking token, contexts' tails, advantages of the answers) of one group."""
    m, n = len(budgets), len(traces)
    r, tails, advantages = [], [], []
    for z, given_scores in zip(traces, scores, strict=True):
        cuts = sorted({min(b, len(z)) for b in budgets})
        multiplicity = [sum(min(b, len(z)) == u for b in budgets) for u in cuts]
        dealt, own = list(given_scores), []
        for u, k in zip(cuts, multiplicity, strict=True):
            finished = u == len(z) and z[-1] == END
            forced = [HEADER] if finished else [ELLIPSIS, END, HEADER]
            mine, dealt = dealt[: answers_each * k], dealt[answers_each * k :]
            tails += [z[:u] + forced] * (answers_each * k)
            own += [s - math.fsum(mine) / len(mine) for s in mine]
        assert not dealt
        advantages.append(own)
        r.append([math.fsum(given_scores[j * answers_each : (j + 1) * answers_each]) / answers_each for j in range(m)])
    if answers_each == 1:
        means = [math.fsum(scores[i][j] for i in range(n)) / n for j in range(m)]
        advantages = [[scores[i][j] - means[j] for j in range(m)] for i in range(n)]
    credit = []
    for i, z in enumerate(traces):
        row = []
        for t in range(len(z)):
            j = next(j for j in range(m) if budgets[j] > t)
            ret = [math.fsum(prior[k] * r[who][k] for k in range(j, m)) for who in range(n)]
            v2 = math.fsum(ret) / n
            weights = [decay ** (j - k) for k in range(j)]
            v1 = (
                math.fsum(w * r[i][k] for k, w in enumerate(weights)) / math.fsum(weights) * math.fsum(prior[j:])
                if j
                else 0.0
            )
            row.append(ret[i] - (j / m * v1 + (m - j) / m * v2))
        credit.append(row)
    return r, credit, tails, advantages


@st.composite
def cases(draw):
    """Budgets, the traces of two groups, each up to the last budget and some closed, and all scores."""
    budgets = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=4)))
    answers_each, size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    traces, scores = [], []
    for _ in range(2 * size):
        z = [5] * draw(st.integers(1, budgets[-1]))
        if draw(st.booleans()):
            z[-1] = END
        traces.append(z)
        score = st.sampled_from([0.0, 1.0, 0.25, 0.1])
        scores.append([draw(score) for _ in range(len(budgets) * answers_each)])
    return budgets, answers_each, size, traces, scores


@given(case=cases(), prior=st.sampled_from(["base", "linear", "uniform"]), decay=st.sampled_from([0.5, 1.0, 0.25]))
@settings(max_examples=150, deadline=None)
def test_the_pseudo_code(case, prior, decay):
    budgets, answers_each, size, traces, scores = case
    result, sampler = run_answers(traces, scores, budgets, group_size=size, n_summaries=answers_each)
    weights = {"base": [float(b == budgets[-1]) for b in budgets], "linear": budgets, "uniform": [1.0] * len(budgets)}
    prior_by_hand = [w / sum(weights[prior]) for w in weights[prior]]
    longest = max(map(len, traces))
    found = brpo(
        result.signals["budget_scores"],
        result.signals["budgets"],
        torch.arange(2 * size) // size,
        torch.ones(2 * size, longest),
        prior=prior,
        decay=decay,
    )
    added = result.rows[len(traces) :]
    tails = []
    for start in (0, size):
        group = slice(start, start + size)
        r, credit, group_tails, advantages = reference(
            traces[group], scores[group], budgets, prior_by_hand, answers_each, decay
        )
        tails += group_tails
        assert_close(result.signals["budget_scores"][group], r)
        for row, expected in zip(found[group], credit, strict=True):
            assert_close(row[: len(expected)], expected)
        per_trace = len(budgets) * answers_each
        trained_here = added[start * per_trace : (start + size) * per_trace]
        assert [row.advantage for row in trained_here] == pytest.approx([*itertools.chain(*advantages)], abs=1e-6)
        assert [row.parent for row in trained_here] == [i for i in range(start, start + size) for _ in range(per_trace)]
    assert [context[2:] for context in sampler.contexts] == tails
    assert [example["number"] for example, _ in sampler.graded] == [row.parent for row in added]


# What is drawn, and what stays of earlier stages


class Numbered:
    """A sampler whose i-th answer after a context is the token 100 + i, scored by a function of (context, i)."""

    ends = frozenset([EOS])

    def __init__(self, score, weights=(1.0,)):
        self.template = Template(think_end_id=END, cut=(END, HEADER), ended=(HEADER,))
        self.score, self.weights = score, torch.tensor(weights)

    def generate(self, contexts, *, max_new_tokens=None, stops=()):
        seen, found = {}, []
        for context in contexts:
            seen[tuple(context)] = seen.get(tuple(context), -1) + 1
            found.append(Continuation([100 + seen[tuple(context)]], [-0.5]))
        return found

    def grade(self, inputs, completion_ids):
        raw = [self.score(ids, ids[-1] - 100) for ids in completion_ids]
        return torch.tensor(raw).view(len(raw), -1), [{} for _ in raw]

    def decode(self, inputs, completion_ids):
        return [""] * len(inputs)

    def total(self, rewards):
        return weighted_sum(rewards, self.weights)


def told_apart(traces, group_size, *, seed=0, step=0):
    """Traces that differ by a token of their own, so that no two contexts are alike."""
    rows = [
        Row([9, i // group_size], [40 + i, *z], [1] * (1 + len(z)), [-1.0] * (1 + len(z)), parent=i)
        for i, z in enumerate(traces)
    ]
    return ungraded(rows, [{}] * len(rows), group_size, seed, step)


def drawn(**when):
    """The answers drawn, 4 of 16, for each of two siblings of two prompts; every other one is right."""
    rollout = told_apart([[5] * 3] * 4, 2, **when)
    sampler = Numbered(lambda ids, i: float(i % 2))
    result = budget_answers(rollout, sampler, budgets=[4], longest=4, n_summaries=16, summary_train_rows=4)
    chosen = [[], [], [], []]
    for row in result.rows[4:]:
        chosen[row.parent].append(row.completion_ids[-1] - 100)
    return chosen


def test_siblings_prompts_steps_and_seeds_draw_answers_of_their_own():
    first = drawn(seed=0, step=0)
    assert drawn(seed=0, step=0) == first
    everything = [*first, *drawn(seed=0, step=1), *drawn(seed=1, step=0)]
    assert all(len(set(chosen)) == 4 and chosen == sorted(chosen) for chosen in everything)
    assert len({tuple(chosen) for chosen in everything}) == 12


def test_prompts_steps_and_seeds_draw_budgets_of_their_own():
    found = set()
    for seed, step in itertools.product((0, 1), (0, 1)):
        rollout = told_apart([[5]] * 4, 2, seed=seed, step=step)
        budgets = [tuple(drawn_budgets([1000, 2000, 3000], rollout, row)) for row in rollout.rows]
        assert budgets[0] == budgets[1] and budgets[2] == budgets[3]
        assert budgets == [tuple(drawn_budgets([1000, 2000, 3000], rollout, row)) for row in rollout.rows]
        found.update(budgets)
    assert len(found) == 8


def test_drawn_budgets_are_uniform_on_their_segments():
    """1 or 2, then 3, 4 or 5, then always 9: six pairs, a sixth of 6000 draws each."""
    counts = {}
    for step in range(6000):
        rollout = told_apart([[5]], 1, step=step)
        budgets = tuple(drawn_budgets([2, 5, 9], rollout, rollout.rows[0]))
        counts[budgets] = counts.get(budgets, 0) + 1
    assert counts.keys() == set(itertools.product((1, 2), (3, 4, 5), (9,)))
    assert all(abs(count - 1000) < 5 * (6000 * 5 / 36) ** 0.5 for count in counts.values())


def answered(score, *, traces=([5] * 3,), weights=(1.0,), before=None, **settings):
    sampler = Numbered(score, weights)
    rollout = told_apart(traces, len(traces))
    if before is not None:
        before(rollout)
    options = {"budgets": [2, 4], "longest": 4, "n_summaries": 2, "summary_train_rows": "all"} | settings
    return budget_answers(rollout, sampler, **options)


def test_rows_signals_and_metrics_of_earlier_stages_stay():
    extra = Row([9, 0], [7, 8, 8, 8, 8, 8], [1] * 6, kind="extra", parent=0)

    def before(rollout):
        rollout.rows.append(extra)
        rollout.signals["own"] = torch.ones(1)
        rollout.metrics["own"] = 3.0

    result = answered(lambda ids, i: 1.0, before=before)
    assert [row.kind for row in result.rows] == ["thinking", "extra", *["summary"] * 4]
    assert result.rows[1] == extra
    assert result.signals["own"].tolist() == [1.0] and result.metrics["own"] == 3.0
    assert {"budgets", "budget_scores"} < result.signals.keys()


def test_every_answer_has_its_own_parents_prompt_and_log_probs_only_where_it_was_sampled():
    rollout = told_apart([[5] * 3, [6, END]], 1)
    result = budget_answers(rollout, Numbered(lambda ids, i: 1.0), budgets=[2, 4], longest=4, summary_train_rows="all")
    assert [row.parent for row in result.rows[2:]] == [0] * 8 + [1] * 8
    for row in result.rows[2:]:
        assert row.prompt_ids == [9, row.parent] and row.completion_ids[0] == 40 + row.parent
        assert row.logps == [0.0] * (len(row.completion_ids) - 1) + [-0.5]
        assert row.train_mask == [0] * (len(row.completion_ids) - 1) + [1]


def test_a_malformed_answer_earns_nothing_but_keeps_its_penalty():
    """Two reward functions, one of them a penalty; the trace ended the sequence, so its second budget fails."""
    result = answered(lambda ids, i: [1.0, -0.25], traces=([5, EOS],), weights=(1.0, 1.0))
    assert result.signals["budget_scores"].tolist() == [[0.75, -0.25]]
    assert result.rewards.tolist() == [[0.0, -0.25]]


def test_a_malformed_answer_without_a_reward_still_abstains():
    result = answered(lambda ids, i: torch.nan, traces=([5, EOS],))
    assert result.signals["budget_scores"].isnan().all() and result.rewards.isnan().all()


def test_a_budget_counts_as_much_as_another_however_many_of_its_answers_were_graded():
    """At the first budget one answer of four has a reward: the anytime score is (1 + 0.5) / 2, not 3 / 5."""
    scores = {(1, 0): 1.0, (3, 0): 1.0, (3, 1): 1.0, (3, 2): 0.0, (3, 3): 0.0}
    result = answered(lambda ids, i: scores.get((ids.count(5), i), torch.nan), n_summaries=4, budgets=[2, 4])
    assert result.metrics["budget_scores/1"] == 1.0 and result.metrics["budget_scores/2"] == 0.5
    assert result.metrics["anytime_score"] == 0.75 and result.metrics["final_score"] == 0.5


def test_mean_over_all_answers_at_a_budget_not_over_traces():
    """Two answers of one trace and one of the other have a reward: 2/3 right, not (1/2 + 1) / 2."""
    scores = {(40, 0): 1.0, (40, 1): 0.0, (41, 0): 1.0}
    result = answered(
        lambda ids, i: scores.get((ids[0], i), torch.nan), traces=([5] * 3, [5] * 3), budgets=[4], n_summaries=2
    )
    assert result.metrics["final_score"] == pytest.approx(2 / 3)


def test_thinking_closed_looks_at_the_last_budget():
    result = answered(lambda ids, i: 1.0, traces=([5, 5, END], [5] * 3))
    assert result.metrics["thinking_closed"] == 0.5 and result.metrics["summary_tokens"] == 1.0


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([[1.0, 2.0], [0.0, 4.0]], [0.5, 3.0]),
        ([[1.0, torch.nan], [0.0, 4.0]], [0.5, 2.0]),
        ([[torch.nan, torch.nan], [0.0, 4.0]], [0.0, 4.0]),
    ],
)
def test_final_rewards(raw, expected):
    """The published rewards of one trace with two answers and two functions."""
    assert_close(final_rewards(torch.tensor([raw])), [expected])


def test_final_rewards_keep_a_function_that_never_spoke_apart():
    found = final_rewards(torch.tensor([[[1.0, torch.nan], [0.0, torch.nan]], [[torch.nan] * 2] * 2]))
    assert found[0, 0] == 0.5 and found[0, 1].isnan() and found[1].isnan().all()


# Credit under weights and modes, worked by hand


def test_credit_under_a_prior_of_numbers():
    """P = [.25, .25, 0, .5]. First response: R = [.6875, .625, .5, .5], V1 = [0, .1875, .208333, .375]; V2 over all
    four = [.578125, .5, .40625, .40625]; V = [.578125, .421875, .307292, .382813]."""
    found = brpo(SCORES, BUDGETS, ONE_GROUP, torch.ones(4, 16), prior=[1, 1, 0, 2])
    assert_close(found[0, [0, 4, 8, 12]], [0.109375, 0.203125, 0.192708, 0.117188])
    plain = brpo(SCORES, BUDGETS, ONE_GROUP, torch.ones(4, 16), prior=[1, 1, 0, 2], mode="none")
    assert_close(plain[0, [0, 4, 8, 12]], [0.6875, 0.625, 0.5, 0.5])
    assert_close(plain[3, [0, 4, 8, 12]], [0.4375, 0.4375, 0.375, 0.375])


def test_the_linear_prior_is_that_of_each_prompts_own_budgets():
    """Budgets 1, 3 against 2, 2 (P = 1/4, 3/4 and 1/2, 1/2): returns of scores 1, 0 by group."""
    budgets = torch.tensor([[1, 3], [1, 3], [1, 1], [1, 1]])
    scores = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    found = brpo(scores, budgets, torch.tensor([0, 0, 1, 1]), torch.ones(4, 1), prior="linear", mode="none")
    assert_close(found.squeeze(1), [0.25, 0.0, 0.5, 0.0])


def test_tokens_between_drawn_budgets_have_the_credit_of_the_next_one():
    budgets = torch.tensor([[1, 4], [1, 4], [3, 4], [3, 4]])
    scores = torch.tensor([[1.0, 0.0], [0.0, 0.0]] * 2)
    found = brpo(scores, budgets, torch.tensor([0, 0, 1, 1]), torch.ones(4, 5), mode="v2only")
    assert_close(found[0], [0.25, 0.0, 0.0, 0.0, 0.0])
    assert_close(found[2], [0.25, 0.25, 0.25, 0.0, 0.0])


def test_a_budget_of_weight_0_takes_nothing_from_those_not_graded_there():
    scores = torch.tensor([[1.0, torch.nan], [0.0, 1.0]])
    found = brpo(scores, torch.tensor([[2, 4]] * 2), torch.zeros(2).long(), torch.ones(2, 4), prior=[1, 0])
    assert_close(found[:, 0], [0.5, -0.5])


def test_what_was_dealt_to_the_next_trace_is_another_prefix():
    """Three budgets with distinct prefixes in one trace, one shared prefix in the next: four groups."""
    scores = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]])
    found = summary_advantages(scores, torch.tensor([[0, 1, 2], [0, 0, 0]]), torch.zeros(2).long())
    assert_close(found[0], [[0.5, -0.5], [0.0, 0.0], [0.0, 0.0]])
    assert_close(found[1], [[0.5, 0.5], [0.5, -0.5], [-0.5, -0.5]])
