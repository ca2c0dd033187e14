"""What the weights of THR and NTHR must keep on any window: no padding, no order, no degenerate group matters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from rltoken.methods.thr import nthr, thr
from rltoken.pipeline import build
from rltoken.running import act, noted
from rltoken.types import Head

VARIANTS = {
    "thr": (thr, {}),
    "explore": (thr, {"p": -0.5, "tau_mode": "mean", "length_norm": False}),
    "others": (thr, {"p": 1.0, "exclude_self": True, "tau_mode": "none"}),
    "sampled": (thr, {"max_tokens": 7}),
    "nthr": (nthr, {}),
    "nthr of the group's tokens": (nthr, {"vocabulary": "group", "eta": "q"}),
}
CASES = ("random", "all right", "all wrong", "one right", "nothing trained", "some ungraded")
TOKENS = ("old_hidden", "old_logps", "ids", "mask")
EACH = given(seed=st.integers(0, 10_000), case=st.sampled_from(CASES))


def window(seed, case="random", rows=9, tokens=6, width=4, vocabulary=7):
    """Random signals of three groups in double precision, some rows without a trained token."""
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(rows, generator=generator) < 0.5
    if case in ("all right", "all wrong"):
        correct = torch.full_like(correct, case == "all right")
    if case == "one right":
        correct = torch.arange(rows) % 3 == 1
    mask = (torch.rand(rows, tokens, generator=generator) < 0.6).long()
    mask[int(torch.randint(rows, (1,), generator=generator))] = 0
    rewards = correct.double()
    if case == "some ungraded":
        rewards[torch.rand(rows, generator=generator) < 0.3] = torch.nan
    head = Head(torch.randn(vocabulary, width, generator=generator, dtype=torch.double), None, 1.0)
    hidden = torch.randn(rows, tokens, width, generator=generator, dtype=torch.double)
    ids = torch.randint(vocabulary, (rows, tokens), generator=generator)
    logits = hidden @ head.weight.T
    return {
        "old_hidden": hidden,
        "old_logps": logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1),
        "ids": ids,
        "mask": mask * (case != "nothing trained"),
        "head": head,
        "correct": correct,
        "rewards": rewards,
        "group": torch.arange(rows) // 3,
    }


def weights(name, signals):
    stage, options = VARIANTS[name]
    return stage(*signals.values(), **options)[0]


def changed(signals, names, change):
    return {key: change(value) if key in names else value for key, value in signals.items()}


@pytest.mark.parametrize("name", VARIANTS)
@EACH
@settings(max_examples=25, deadline=None)
def test_weights_are_finite_and_within_their_range(name, seed, case):
    signals = window(seed, case)
    found = weights(name, signals)
    assert found.shape == signals["mask"].shape and found.isfinite().all()
    assert found.min() >= 0 and found.max() <= 1 + abs(VARIANTS[name][1].get("p", 0.1))
    if case in ("all right", "all wrong", "nothing trained"):
        assert (found == 1).all(), "no contrast, no score"


@pytest.mark.parametrize("name", VARIANTS)
@EACH
@settings(max_examples=15, deadline=None)
def test_masked_tokens_never_matter(name, seed, case):
    signals = window(seed, case)
    other, trained = window(seed + 1), signals["mask"] > 0
    rubbish = {
        "old_hidden": torch.where(trained.unsqueeze(-1), signals["old_hidden"], torch.nan),
        "old_logps": signals["old_logps"].masked_fill(~trained, torch.inf),
        "ids": torch.where(trained, signals["ids"], other["ids"]),
    }
    found, expected = weights(name, signals | rubbish), weights(name, signals)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", VARIANTS)
@EACH
@settings(max_examples=15, deadline=None)
def test_padding_never_matters(name, seed, case):
    signals = window(seed, case)
    wider = changed(signals, TOKENS, lambda value: pad(value, (0, 0, 0, 3) if value.dim() == 3 else (0, 3)))
    assert torch.equal(weights(name, wider)[:, :6], weights(name, signals))


@pytest.mark.parametrize("name", VARIANTS)
@EACH
@settings(max_examples=15, deadline=None)
def test_permuting_rows_permutes_the_weights(name, seed, case):
    signals = window(seed, case)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    moved = changed(signals, signals.keys() - {"head"}, lambda value: value[order])
    torch.testing.assert_close(weights(name, moved), weights(name, signals)[order])


@pytest.mark.parametrize("name", VARIANTS)
@EACH
@settings(max_examples=15, deadline=None)
def test_groups_do_not_see_each_other(name, seed, case):
    """So that it does not matter how groups are spread over ranks."""
    signals = window(seed, case)
    alone = [changed(signals, signals.keys() - {"head"}, lambda value, i=i: value[3 * i : 3 * i + 3]) for i in range(3)]
    torch.testing.assert_close(torch.cat([weights(name, one) for one in alone]), weights(name, signals))


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_rows_of_another_kind_are_not_seen(seed):
    """The head belongs to no row, and stays when the pipeline picks the rows of a kind."""
    signals, kinds = window(seed), ["thinking", "thinking", "summary"] * 3
    (stage,) = build({"weights": {"thr": thr}})["weights"]
    bare, metrics = noted(stage)
    (found,) = act(bare, signals, torch.full(signals["mask"].shape, 5.0).double(), kinds=kinds)
    thinking = torch.tensor([kind == "thinking" for kind in kinds])
    expected, shares = thr(*changed(signals, signals.keys() - {"head"}, lambda value: value[thinking]).values())
    torch.testing.assert_close(found[thinking], expected)
    assert metrics["metrics"] == shares
    assert (found[~thinking] == 5.0).all()
