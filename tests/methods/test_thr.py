"""THR and NTHR: the specification's numbers, numbers worked by hand, the dense definition, and what is allocated."""

import functools
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rltoken.errors import UserError
from rltoken.methods.thr import evenly_sampled, influence, nthr, thr, threshold
from rltoken.pipeline import build
from rltoken.types import Head
from tests.methods.configured import sections

IDS = torch.tensor([[0, 1], [0, 3], [0, 2]])
MASK = torch.tensor([[1, 1], [1, 0], [1, 1]])
CORRECT, GROUP = torch.tensor([True, True, False]), torch.zeros(3, dtype=torch.long)
ADVANTAGES = torch.tensor([[0.707107], [0.707107], [-1.414214]], dtype=torch.double)
OPTIONS = {
    "length_norm": True,
    "exclude_self": False,
    "vocabulary": "full",
    "max_tokens": None,
    "elements": 2**24,
}


def old_logps(hidden, head, ids):
    every = torch.arange(head.weight.size(0))
    logits = head.logits(hidden.flatten(0, 1), every).view(*ids.shape, -1)
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


@pytest.fixture
def golden():
    """A group of two correct responses and a wrong one with V = 4, H = 2.

    The specification gives the results only. The states and the head were solved for from its scores.
    """
    hidden = [
        [[0.562967, 0.236441], [-0.46862, -0.486476]],
        [[0.892766, -0.104411], [5.0, 5.0]],
        [[0.566686, 0.215434], [-0.449457, -0.394126]],
    ]
    weight = [[0.711414, -0.119695], [-0.440053, -0.81872], [-0.971301, -0.528571], [1.004402, 0.457847]]
    hidden, head = torch.tensor(hidden).double(), Head(torch.tensor(weight).double(), None, 1.0)
    return hidden, old_logps(hidden, head, IDS), IDS, MASK, head, CORRECT, CORRECT.double(), GROUP


def trained(values):
    """The values of the golden group's trained tokens, in order."""
    return values[MASK.bool()].tolist()


def assert_close(values, expected):
    assert values == pytest.approx(expected, abs=2e-6)


def test_nthr_scores_threshold_eta_and_advantages(golden):
    scores = influence(*golden, **OPTIONS | {"length_norm": False})
    assert_close(trained(scores), [0.60743, 0.354941, 0.862251, 0.607095, -0.12505])
    assert_close(threshold(scores, CORRECT, GROUP, tau_mode="min", beta=1.0).tolist(), [0.481185] * 3)
    weights, _ = nthr(*golden)
    assert_close(trained(weights), [1, 1, 1, 0.333333, 1])
    assert_close(trained(weights * ADVANTAGES), [0.707107, 0.707107, 0.707107, -0.471405, -1.414214])


def test_nthr_over_the_tokens_of_the_group(golden):
    scores = influence(*golden, **OPTIONS | {"length_norm": False, "vocabulary": "group"})
    assert_close(scores[2].tolist(), [0.466064, -0.09624])


def test_thr_scores_and_threshold(golden):
    scores = influence(*golden, **OPTIONS)
    signed = torch.where(CORRECT.unsqueeze(1), scores, -scores)
    assert_close(trained(signed), [0.460287, 0.197428, 0.685722, -0.461492, 0.052203])
    assert_close(threshold(scores, CORRECT, GROUP, tau_mode="min", beta=1.0).tolist(), [0.328857] * 3)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.1, [0.777817, 0, 0.777817, -1.272792, 0]),
        (-0.1, [0.636396, 0, 0.636396, -1.555635, 0]),
        (0.0, [0.707107, 0, 0.707107, -1.414214, 0]),
    ],
)
def test_thr_advantages(golden, p, expected):
    assert_close(trained(thr(*golden, p=p)[0] * ADVANTAGES), expected)


def test_without_a_threshold_p_acts_on_every_token(golden):
    assert_close(trained(thr(*golden, tau_mode="none")[0]), [1.1, 1.1, 1.1, 0.9, 1.1])


@pytest.fixture
def even():
    """Two groups under a head of zeros: pi = 1/2, so <g, g'> is 1/2 for equal tokens and -1/2 for others.

    The first has two correct responses, h = 1, 2 and 3, and a wrong one, h = 1 and 1; the second one of each.
    """
    hidden = torch.tensor([[[1.0], [2.0]], [[3.0], [9.0]], [[1.0], [1.0]], [[2.0], [9.0]], [[1.0], [9.0]]])
    ids = torch.tensor([[0, 1], [0, 9], [0, 1], [1, 9], [1, 9]]).clamp(max=1)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0], [1, 0]])
    head = Head(torch.zeros(2, 1), None, 0.7)
    correct = torch.tensor([True, True, False, True, False])
    group = torch.tensor([4, 4, 4, 2, 2])
    return [hidden, torch.full((5, 2), 0.5).log(), ids, mask, head, correct, correct.float(), group]


def test_scores_by_hand(even):
    # M h = h (sum of +-h/2 over the correct tokens): 1/2 (1 - 2) + 3 = 2.5, halved: 1.25 for token 0, else -1.25
    scores = influence(*even, **OPTIONS)
    assert scores[:3].tolist()[0] == [1.25, -2.5] and scores[1, 0] == 3.75 and scores[2].tolist() == [1.25, -1.25]
    # summed: (1 - 2 + 3) / 2 = 1
    summed = influence(*even, **OPTIONS | {"length_norm": False})
    assert summed[0].tolist() == [1.0, -2.0] and summed[1, 0] == 3.0 and summed[2].tolist() == [1.0, -1.0]
    # the other correct response alone: 3 / 2 for the first, 1/2 (1 - 2) / 2 = -1/4 for the second
    others = influence(*even, **OPTIONS | {"exclude_self": True})
    assert others[0].tolist() == [1.5, -3.0] and others[1, 0] == -0.75 and others[2].tolist() == [1.25, -1.25]
    # 2 * 2 / 2 and 2 * 1 / 2; the only correct response has no other
    assert scores[3:, 0].tolist() == [2.0, 1.0]
    assert others[3].isnan().all() and others[4, 0] == 1.0
    assert scores[even[3] == 0].isnan().all()


def test_thresholds_by_hand(even):
    scores, correct, group = influence(*even, **OPTIONS), even[5], even[7]
    # means of the correct responses: (1.25 - 2.5) / 2 = -0.625 and 3.75; 2 in the other group
    least = threshold(scores, correct, group, tau_mode="min", beta=2.0)
    assert least.tolist() == [-1.25] * 3 + [4.0] * 2
    mean = threshold(scores, correct, group, tau_mode="mean", beta=1.0)
    assert mean.tolist() == [1.5625] * 3 + [2.0] * 2
    # 1.25 and 2.5 against 1.5625, and 3.75; THR of the wrong response is -1.25 and 1.25; the last group's 2 and -1
    weights, _ = thr(*even, p=0.5, tau_mode="mean")
    assert weights[:3].tolist() == [[0.0, 0.5], [1.5, 1.0], [0.0, 0.0]]
    assert weights[3:, 0].tolist() == [0.0, 0.0]


def test_a_correct_response_without_others_keeps_its_weight_and_sets_no_threshold(even):
    weights, _ = thr(*even, exclude_self=True)
    assert weights[3, 0] == 1.0 and weights[4, 0] == pytest.approx(0.9)


@pytest.mark.parametrize(("eta", "expected"), [("2|0.5-q|", 1 / 3), ("1-q", 1 / 3), ("q", 2 / 3)])
def test_etas(golden, eta, expected):
    assert nthr(*golden, eta=eta)[0][2].tolist() == pytest.approx([expected, 1.0])


def test_ungraded_rows_are_neither_right_nor_wrong(even):
    even[6] = torch.tensor([1.0, 1.0, torch.nan, 1.0, 0.0])
    assert influence(*even, **OPTIONS)[:3].isnan().all(), "nothing graded is wrong in the first group"
    even[6] = torch.tensor([1.0, torch.nan, 0.0, 1.0, 0.0])
    # 1/2 (1 - 2) / 2 = -1/4 of the first response alone; q = 1/2, so eta = 0
    assert influence(*even, **OPTIONS)[2].tolist() == [-0.25, 0.25]
    assert nthr(*even, tau_mode="none")[0][2].tolist() == [0.0, 0.0]


def test_a_cap_samples_evenly_and_leaves_the_others_alone(even):
    mask = (torch.arange(12) < torch.tensor([12, 6, 1, 0]).unsqueeze(1)).long()
    mask[0, 3] = 0
    sampled = evenly_sampled(mask.bool(), 9)
    # 18 tokens for 9: 11 * 9 // 18 = 5, 3, and one at least
    assert sampled.sum(1).tolist() == [5, 3, 1, 0] and not (sampled & (mask == 0)).any()
    # the middles of equal stretches
    assert sampled[1].nonzero().flatten().tolist() == [0, 2, 4] and sampled[2, 0]
    assert torch.equal(evenly_sampled(mask.bool(), 18), mask.bool())
    # three of five tokens: one of each response; the sampled token of the first (h = 1) counts for both
    capped = influence(*even, **OPTIONS | {"max_tokens": 3})
    assert capped.isnan().sum(1).tolist() == [1, 1, 1, 1, 1]
    kept = capped[0].isfinite()
    expected = (0.5 * 1 + 1.5) if kept[0] else (-0.5 * 2 + 1.5)
    assert capped[1, 0] == pytest.approx(3 * expected)
    # and for both where responses count by their sums: 2 * 1 / 2 or -2 * 2 / 2, and 3 / 2 of the second response
    summed = influence(*even, **OPTIONS | {"max_tokens": 3, "length_norm": False})
    assert summed[1, 0] == pytest.approx(3 * ((1 if kept[0] else -2) + 1.5))
    weights, _ = thr(*even, max_tokens=3)
    assert (weights[capped.isnan()] == 1).all()


def random_window(seed, vocabulary=11, width=5, tokens=6, dtype=torch.double):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(8, tokens, width, generator=generator, dtype=dtype)
    head = Head(
        torch.randn(vocabulary, width, generator=generator, dtype=dtype),
        torch.randn(vocabulary, generator=generator, dtype=dtype),
        0.8,
    )
    ids = torch.randint(vocabulary, (8, tokens), generator=generator)
    mask = (torch.rand(8, tokens, generator=generator) < 0.7).long()
    correct, group = torch.tensor([True, False, True, False, True, True, False, False]), torch.arange(8) // 4
    return [hidden, old_logps(hidden, head, ids), ids, mask, head, correct, correct.to(dtype), group]


def dense(hidden, _, ids, mask, head, correct, rewards, group, *, length_norm, exclude_self, vocabulary, **__):
    """The definition with every pair of tokens and whole distributions."""
    errors = torch.nn.functional.one_hot(ids, head.weight.size(0)).to(hidden.dtype)
    errors = errors - ((hidden @ head.weight.T + head.bias) / head.temperature).softmax(-1)
    scores = torch.full(ids.shape, torch.nan, dtype=hidden.dtype)
    for j, t in mask.nonzero().tolist():
        same = [i for i in range(len(group)) if group[i] == group[j]]
        chosen = torch.cat([ids[i][mask[i] > 0] for i in same]).unique() if vocabulary == "group" else slice(None)
        total = 0.0
        for i in same:
            if correct[i] and not (exclude_self and i == j):
                pairs = [
                    (errors[i, k, chosen] @ errors[j, t, chosen]) * (hidden[i, k] @ hidden[j, t])
                    for k in mask[i].nonzero().flatten().tolist()
                ]
                total += sum(pairs) / (len(pairs) if length_norm else 1)
        scores[j, t] = total
    return scores


@pytest.mark.parametrize(
    ("length_norm", "exclude_self", "vocabulary"),
    list(itertools.product([True, False], [True, False], ["full", "group"])),
)
def test_slices_and_blocks_are_exact(length_norm, exclude_self, vocabulary):
    window = random_window(0)
    options = {"length_norm": length_norm, "exclude_self": exclude_self, "vocabulary": vocabulary}
    expected = dense(*window, **options)
    for elements in (1, 30, 100, 2**24):
        found = influence(*window, **OPTIONS | options | {"elements": elements})
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        sizes = [value.numel() for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_a_large_vocabulary_is_never_whole():
    window = random_window(0, vocabulary=150_000, width=4, tokens=64, dtype=torch.float32)
    with Largest() as largest:
        scores = influence(*window, **OPTIONS | {"elements": 2**18})
    # the largest tensor there is without it is the head, 600 000 numbers; 8 * 64 * 150 000 are 77 million
    assert largest.elements <= 600_000 and scores.isfinite().sum() == window[3].sum()


def test_half_precision_is_computed_in_single():
    window = random_window(0, dtype=torch.float32)
    halves = [window[0].bfloat16(), *window[1:4], Head(window[4].weight.bfloat16(), None, 0.8), *window[5:]]
    halves[1] = old_logps(halves[0], halves[4], halves[2])
    same = [halves[0].float(), *halves[1:4], Head(halves[4].weight.float(), None, 0.8), *halves[5:]]
    assert halves[1].dtype == torch.float32
    torch.testing.assert_close(influence(*halves, **OPTIONS), influence(*same, **OPTIONS), equal_nan=True)


@pytest.mark.parametrize(
    ("stage", "setting", "value", "told"),
    [
        (thr, "p", 1.5, "a number from -1 and up to 1"),
        (thr, "tau_mode", "median", "choose one of: min, mean, none"),
        (thr, "beta", float("inf"), "set it to a number"),
        (thr, "length_norm", 1, "neither true nor false"),
        (thr, "max_tokens", 0, "a whole number from 1, or to null"),
        (thr, "vocabulary", "top", "choose one of: full, group"),
        (nthr, "eta", "half", "choose one of"),
        (nthr, "elements", 0, "a whole number from 1"),
    ],
)
def test_settings_out_of_range_are_refused(stage, setting, value, told):
    with pytest.raises(UserError, match=rf"method\.weights\.mine\.{setting}: .*{told}"):
        build({"weights": {"mine": functools.partial(stage, **{setting: value})}})


def test_explore_is_thr_with_the_other_sign():
    thr, explore = sections("thr"), sections("thr/explore")
    assert explore["method"]["weights"]["thr"].pop("p") == -thr["method"]["weights"]["thr"].pop("p") == -0.1
    assert explore == thr


def test_asymmetric_has_the_factors_that_thr_gives_where_its_sign_is_that_of_the_response():
    thr, control = sections("thr"), sections("thr/asymmetric")
    p, stage = thr["method"]["weights"].pop("thr")["p"], control["method"]["credits"].pop("signed_advantage")
    assert (stage["positive"], stage["negative"]) == (1 + p, 1 - p)
    assert control == thr
