"""What BRPO draws, what it leaves of earlier stages' work, and its credit under weights and modes worked by hand."""

import itertools

import pytest
import torch

from rltoken.methods.brpo import brpo, budget_answers, drawn_budgets, final_rewards, summary_advantages
from rltoken.rollout.forced import in_tokens
from rltoken.rollout.sampler import weighted_sum
from rltoken.types import Continuation, Progress, Rollout, Row, Template

EOS, END, HEADER = 1, 4, 20
SCORES = torch.tensor([[0.25, 0.5, 1, 1], [0, 0, 0.25, 0.5], [1, 0.75, 1, 1], [0, 0.25, 0, 0.75]])
BUDGETS = torch.tensor([[4, 8, 12, 16]] * 4)


def assert_close(found, expected, atol=2e-6):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=atol)


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


def rollout_of(traces, group_size, *, seed=0, step=0):
    """Traces that differ by a token of their own, so that no two contexts are alike."""
    rows = [
        Row([9, i // group_size], [40 + i, *z], [1] * (1 + len(z)), [-1.0] * (1 + len(z)), parent=i)
        for i, z in enumerate(traces)
    ]
    return Rollout(
        inputs=[{}] * len(rows),
        texts=[""] * len(rows),
        rewards=torch.full((len(rows), 1), torch.nan),
        rows=rows,
        progress=Progress(step, 10),
        group_size=group_size,
        seed=seed,
        graded=False,
    )


def drawn(**when):
    """The answers drawn, 4 of 16, for each of two siblings of two prompts; every other one is right."""
    rollout = rollout_of([[5] * 3] * 4, 2, **when)
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
        rollout = rollout_of([[5]] * 4, 2, seed=seed, step=step)
        budgets = [tuple(drawn_budgets([1000, 2000, 3000], rollout, row)) for row in rollout.rows]
        assert budgets[0] == budgets[1] and budgets[2] == budgets[3]
        assert budgets == [tuple(drawn_budgets([1000, 2000, 3000], rollout, row)) for row in rollout.rows]
        found.update(budgets)
    assert len(found) == 8


def test_drawn_budgets_are_uniform_on_their_segments():
    """1 or 2, then 3, 4 or 5, then always 9: six pairs, a sixth of 6000 draws each."""
    counts = {}
    for step in range(6000):
        rollout = rollout_of([[5]], 1, step=step)
        budgets = tuple(drawn_budgets([2, 5, 9], rollout, rollout.rows[0]))
        counts[budgets] = counts.get(budgets, 0) + 1
    assert counts.keys() == set(itertools.product((1, 2), (3, 4, 5), (9,)))
    assert all(abs(count - 1000) < 5 * (6000 * 5 / 36) ** 0.5 for count in counts.values())


def test_shares_of_the_longest_thinking_are_rounded():
    """0.29 * 100 is 28.999... in floating point."""
    assert in_tokens([0.29, 1.0], 100) == [29, 100]
    assert in_tokens([0.25, 0.5], 11) == [3, 6]


def answered(score, *, traces=([5] * 3,), weights=(1.0,), before=None, **settings):
    sampler = Numbered(score, weights)
    rollout = rollout_of(traces, len(traces))
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
    rollout = rollout_of([[5] * 3, [6, END]], 1)
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


# Credit worked by hand


def test_credit_under_a_prior_of_numbers():
    """P = [.25, .25, 0, .5]. First response: R = [.6875, .625, .5, .5], V1 = [0, .1875, .208333, .375]; V2 over all
    four = [.578125, .5, .40625, .40625]; V = [.578125, .421875, .307292, .382813]."""
    found = brpo(SCORES, BUDGETS, torch.zeros(4).long(), torch.ones(4, 16), prior=[1, 1, 0, 2])
    assert_close(found[0, [0, 4, 8, 12]], [0.109375, 0.203125, 0.192708, 0.117188])
    plain = brpo(SCORES, BUDGETS, torch.zeros(4).long(), torch.ones(4, 16), prior=[1, 1, 0, 2], mode="none")
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
