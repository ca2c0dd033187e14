"""What BRPO's credit must keep, and that training a few drawn answers is right in expectation."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rltoken.methods.brpo import PRIORS, brpo, budget_advantages, prior_of, summary_advantages, trained
from rltoken.rng import seeded
from rltoken.tiny.model import build_model
from rltoken.tiny.tokenizer import build_tokenizer
from rltoken.tiny.world import World
from rltoken.types import Row

SEEDS = st.integers(0, 10_000)
M = st.integers(1, 5)
MODES = ("brpo", "v1only", "v2only", "none")


def window(seed, m, groups=2, size=4):
    """Random scores in [0, 1], ascending budgets of each prompt, and groups."""
    generator = torch.Generator().manual_seed(seed)
    budgets = torch.stack([torch.randperm(12, generator=generator)[:m].sort().values + 1 for _ in range(groups)])
    group = torch.arange(groups * size) // size
    return torch.rand(groups * size, m, generator=generator), budgets[group], group


def prefix_numbers(seed, n, m):
    """[n, m] numbers of the distinct prefixes: some successive budgets share one."""
    steps = torch.randint(0, 2, (n, m), generator=torch.Generator().manual_seed(seed))
    return steps.cumsum(1) - steps[:, :1]


def credit(scores, budgets, group, prior="uniform", mode="brpo"):
    return brpo(scores, budgets, group, torch.ones(len(scores), 14), prior=prior, mode=mode)


def each(argument, values):
    return pytest.mark.parametrize(argument, values)


@each("prior", PRIORS)
@given(seed=SEEDS, m=M)
@settings(max_examples=30, deadline=None)
def test_v2only_is_centred_within_each_group_at_every_budget(prior, seed, m):
    scores, budgets, group = window(seed, m)
    found = budget_advantages(scores, prior_of(budgets, prior), group, mode="v2only")
    assert_close(found.view(2, 4, m).mean(1), torch.zeros(2, m), rtol=0, atol=1e-6)


@given(seed=SEEDS, m=M)
@settings(max_examples=30, deadline=None)
def test_base_and_v2only_is_dr_grpo_on_the_final_score(seed, m):
    scores, budgets, group = window(seed, m)
    final = scores[:, -1].view(2, 4)
    expected = (final - final.mean(1, keepdim=True)).view(8, 1)
    found = credit(scores, budgets, group, "base", "v2only")
    for row, own, budget in zip(found, expected, budgets[:, -1], strict=True):
        assert_close(row[:budget], own.expand(budget))
        assert torch.equal(row[budget:], torch.zeros(14 - budget))


@each("prior", PRIORS)
@each("mode", ["brpo", "v2only"])
@given(seed=SEEDS, m=M, shift=st.floats(-3, 3))
@settings(max_examples=20, deadline=None)
def test_a_constant_added_to_all_scores_changes_nothing(mode, prior, seed, m, shift):
    scores, budgets, group = window(seed, m)
    assert_close(
        credit(scores + shift, budgets, group, prior, mode),
        credit(scores, budgets, group, prior, mode),
        rtol=0,
        atol=1e-5,
    )


@given(seed=SEEDS, m=M, shift=st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_v1only_is_unmoved_by_a_constant_from_the_second_budget_on(seed, m, shift):
    """There is no baseline at the first one: V1 is an empty sum."""
    scores, budgets, group = window(seed, m)
    prior = prior_of(budgets, "linear")
    before, after = (budget_advantages(s, prior, group, mode="v1only") for s in (scores, scores + shift))
    assert_close(after[:, 1:], before[:, 1:], rtol=0, atol=1e-5)
    assert_close(after[:, 0], before[:, 0] + shift, rtol=0, atol=1e-5)


@each("prior", PRIORS)
@given(seed=SEEDS, m=M)
@settings(max_examples=30, deadline=None)
def test_the_first_budget_depends_on_v2_only(prior, seed, m):
    scores, budgets, group = window(seed, m)
    weights = prior_of(budgets, prior)
    mixed, v2only = (budget_advantages(scores, weights, group, mode=mode)[:, 0] for mode in ("brpo", "v2only"))
    assert torch.equal(mixed, v2only)


@each("mode", MODES)
@given(seed=SEEDS, m=M)
@settings(max_examples=20, deadline=None)
def test_permuting_a_group_permutes_its_credit(mode, seed, m):
    scores, budgets, group = window(seed, m)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    found = credit(scores, budgets, group, "linear", mode)
    assert_close(credit(scores[order], budgets[order], group[order], "linear", mode), found[order])


@each("mode", ["brpo", "v2only"])
@each("prior", PRIORS)
@given(seed=SEEDS, m=M, value=st.floats(-2, 2))
@settings(max_examples=20, deadline=None)
def test_all_equal_scores_give_no_credit(prior, mode, seed, m, value):
    _, budgets, group = window(seed, m)
    found = credit(torch.full((8, m), value), budgets, group, prior, mode)
    assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-6)


@given(seed=SEEDS, m=M, a=st.integers(1, 4), value=st.sampled_from([0.0, 1.0, -1.0, 0.5]))
@settings(max_examples=50, deadline=None)
def test_all_equal_answers_have_no_advantage(seed, m, a, value):
    found = summary_advantages(torch.full((8, m, a), value), prefix_numbers(seed, 8, m), torch.arange(8) // 4)
    assert torch.equal(found, torch.zeros(8, m, a))


@given(seed=SEEDS, value=st.sampled_from([0.1, 0.3, 0.7, 1 / 3]), a=st.sampled_from([3, 5, 6, 7]))
@settings(max_examples=30, deadline=None)
def test_all_equal_answers_train_nothing_whatever_the_score(seed, value, a):
    """A mean of equal numbers may be off by a rounding: such answers must not count as worth training."""
    scores = torch.full((1, 1, a), value)
    advantages = summary_advantages(scores, torch.zeros(1, 1).long(), torch.zeros(1).long())
    rows = [Row([1], [2], [1])] * a
    assert draw(rows, advantages.flatten().tolist(), summary_train_rows=1, rng=seeded(seed)) == []


@each("mode", MODES)
@each("prior", PRIORS)
@given(seed=SEEDS, m=M, missing=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_credit_is_finite_whatever_is_missing(prior, mode, seed, m, missing):
    scores, budgets, group = window(seed, m)
    holes = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed + 1)) < missing
    found = credit(scores.masked_fill(holes, torch.nan), budgets, group, prior, mode)
    assert found.shape == (8, 14) and found.isfinite().all()


@each("mode", MODES)
@given(seed=SEEDS, m=M, gone=st.sets(st.integers(0, 7), max_size=7))
@settings(max_examples=30, deadline=None)
def test_responses_without_scores_abstain(mode, seed, m, gone):
    scores, budgets, group = window(seed, m)
    kept = torch.tensor([i not in gone for i in range(8)])
    found = credit(scores.masked_fill(~kept[:, None], torch.nan), budgets, group, "linear", mode)
    assert torch.equal(found[~kept], torch.zeros_like(found[~kept]))
    assert_close(found[kept], credit(scores[kept], budgets[kept], group[kept], "linear", mode))


@given(seed=SEEDS, m=M, a=st.integers(2, 4))
@settings(max_examples=50, deadline=None)
def test_answers_without_a_score_abstain(seed, m, a):
    """The others are as if those were not there."""
    generator = torch.Generator().manual_seed(seed)
    prefix = prefix_numbers(seed, 3, m)
    scores = torch.rand(3, m, a, generator=generator)
    holes = torch.rand(3, m, a, generator=generator) < 0.3
    found = summary_advantages(scores.masked_fill(holes, torch.nan), prefix, torch.zeros(3).long())
    assert torch.equal(found[holes], torch.zeros_like(found[holes]))
    for i, number in itertools.product(range(3), range(m)):
        there = scores[i][prefix[i] == number][~holes[i][prefix[i] == number]]
        own = found[i][prefix[i] == number][~holes[i][prefix[i] == number]]
        assert_close(own, there - there.mean() if there.numel() else there)


# Drawing the answers that are trained


class Chooses(random.Random):
    """A generator whose next sample is the given one."""

    def __init__(self, positions):
        super().__init__(0)
        self.positions = positions

    def sample(self, population, k):
        assert len(self.positions) == k
        return [population[i] for i in self.positions]


def draw(rows, advantages, *, summary_train_rows, rng, summary_weight="paper", first=0):
    return trained(
        rows,
        [0.0] * len(rows),
        advantages,
        first=first,
        summary_train_rows=summary_train_rows,
        summary_weight=summary_weight,
        rng=rng,
    )


def every_draw(rows, advantages, summary_train_rows, **settings):
    """All equally likely draws."""
    candidates = sum(a != 0 for a in advantages[settings.get("first", 0) :])
    k = min(summary_train_rows, candidates)
    for positions in itertools.combinations(range(candidates), k):
        yield draw(rows, advantages, summary_train_rows=summary_train_rows, rng=Chooses(positions), **settings)


ADVANTAGES = st.lists(st.sampled_from([0.0, 0.5, -0.5, 0.25, -0.75]), min_size=1, max_size=7)


@each("summary_train_rows", [1, 2, 3])
@each("summary_weight", ["paper", "code", 0.3])
@given(advantages=ADVANTAGES, data=st.data())
@settings(max_examples=40, deadline=None)
def test_drawn_answers_are_all_of_them_in_expectation(summary_weight, summary_train_rows, advantages, data):
    first = data.draw(st.integers(0, len(advantages) - 1))
    rows = [Row([1], [10 + i], [1]) for i in range(len(advantages))]
    settings = {"summary_weight": summary_weight, "first": first}
    mean = torch.zeros(len(rows), dtype=torch.float64)
    draws = list(every_draw(rows, advantages, summary_train_rows, **settings))
    for drawn in draws:
        for row in drawn:
            mean[row.completion_ids[0] - 10] += row.advantage / len(draws)
    whole = torch.zeros_like(mean)
    for row in draw(rows, advantages, summary_train_rows="all", rng=random.Random(0), **settings):
        whole[row.completion_ids[0] - 10] = row.advantage
    assert_close(mean, whole)


@each("summary_train_rows", [1, 2])
def test_seeds_draw_every_answer_equally_often(summary_train_rows):
    rows, advantages = [Row([1], [10 + i], [1]) for i in range(5)], [0.5, 0.0, -0.5, 0.25, -0.25]
    counts = torch.zeros(5)
    for seed in range(8000):
        drawn = draw(rows, advantages, summary_train_rows=summary_train_rows, rng=seeded(seed, 3, [7, 8], 0))
        assert len(drawn) == summary_train_rows
        for row in drawn:
            counts[row.completion_ids[0] - 10] += 1
    expected = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]) * 8000 * summary_train_rows / 4
    assert_close(counts, expected, rtol=0, atol=5 * (8000 * 3 / 16) ** 0.5)


def policy_gradient(model, rows):
    """Gradient of -sum of advantage * log-probability over the trained tokens of the rows, one number per weight."""
    model.zero_grad()
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        mask = torch.tensor(row.train_mask)
        (-row.advantage * (logps[len(row.prompt_ids) - 1 :] * mask).sum()).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.flatten() for grad in grads]).clone()


@each("summary_train_rows", [1, 2])
def test_the_gradient_of_drawn_answers_is_that_of_all_in_expectation(summary_train_rows):
    """Over all joint draws of two traces, on the rows themselves: every weight of a tiny model."""
    model = build_model(build_tokenizer(World()), seed=0).double()
    rng = random.Random(5)
    traces = []
    for advantages in ([0.5, -0.5, 0.0, 0.5, -0.5], [0.0, 0.75, -0.25, -0.5]):
        kept = [rng.randrange(5, 50) for _ in range(4)]
        rows = []
        for _ in advantages:
            answer = [rng.randrange(5, 50) for _ in range(rng.randint(1, 3))]
            rows.append(Row([5, 31, 21, 3], [*kept, 4, *answer], [0] * 5 + [1] * len(answer)))
        traces.append((rows, advantages))
    whole = policy_gradient(
        model, [row for rows, own in traces for row in draw(rows, own, summary_train_rows="all", rng=random.Random(0))]
    )
    joint = list(itertools.product(*(every_draw(rows, own, summary_train_rows) for rows, own in traces)))
    assert len(joint) == (12 if summary_train_rows == 1 else 18)
    mean = sum(policy_gradient(model, [row for drawn in draws for row in drawn]) for draws in joint) / len(joint)
    assert whole.norm() > 1e-3
    assert (mean - whole).norm() < 1e-5 * whole.norm()
    assert (policy_gradient(model, [row for drawn in joint[0] for row in drawn]) - whole).norm() > 0.1 * whole.norm()
