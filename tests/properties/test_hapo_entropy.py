"""What the parts of heterogeneous HAPO keep: masked tokens never matter, nor does order; all stays bounded."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltoken.methods.hapo_entropy import Redistribution, adaptive_clip, landmarks, level, tempered, token_average

SIGNS = ("intended", "released")
EACH = given(seed=st.integers(0, 10_000))
FEW = settings(max_examples=50, deadline=None)


def window(seed, groups=3, size=3, tokens=6):
    """Random entropies down to nearly 0, ratios, rewards and lengths; at least one trained token per row."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    return {
        "mask": (torch.arange(tokens) < lengths[:, None]).long(),
        "entropy": torch.rand(rows, tokens, generator=generator) ** 12 * 3,
        "ratio": torch.rand(rows, tokens, generator=generator) * 2,
        "rewards": torch.randint(0, 2, (rows,), generator=generator).float(),
        "group": torch.arange(rows) // size,
    }


def weights(signals, sign="intended"):
    """The factor of the advantages, with the adaptive clip range in force."""
    stage = Redistribution(sign=sign)
    low, high = adaptive_clip(signals["entropy"], signals["mask"], sign=sign)
    return stage(signals["ratio"], low, high, stage.observe(signals["entropy"], signals["mask"]))


def per_token(signals, sign="intended"):
    """Everything that the token stages make of a window, [5, B, T]."""
    entropy, mask = signals["entropy"], signals["mask"]
    credit = token_average(signals["rewards"], signals["group"], mask).unsqueeze(1).expand(mask.shape)
    parts = (level(entropy, mask, 0.8, sign), *adaptive_clip(entropy, mask, sign=sign), weights(signals, sign), credit)
    return torch.stack(parts)


@pytest.mark.parametrize("sign", SIGNS)
@EACH
@FEW
def test_masked_tokens_never_matter(sign, seed):
    signals = window(seed)
    trained = signals["mask"].bool()
    dirty = signals | {key: torch.where(trained, signals[key], 1e6) for key in ("entropy", "ratio")}
    assert torch.equal(per_token(signals, sign)[:, trained], per_token(dirty, sign)[:, trained])
    assert landmarks(signals["entropy"], signals["mask"], 0.8) == landmarks(dirty["entropy"], signals["mask"], 0.8)


@pytest.mark.parametrize("sign", SIGNS)
@EACH
@FEW
def test_permuting_rows_permutes_what_they_get(sign, seed):
    signals = window(seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    shuffled = {key: value[order] for key, value in signals.items()}
    torch.testing.assert_close(per_token(shuffled, sign), per_token(signals, sign)[:, order])


@EACH
@FEW
def test_levels_are_between_minus_one_and_one_and_reach_both_ends(seed):
    signals = window(seed)
    trained = signals["mask"].bool()
    intended, released = (level(signals["entropy"], signals["mask"], 0.8, sign)[trained] for sign in SIGNS)
    assert intended.abs().max() <= 1 and (intended == 0).any()
    assert torch.equal(released, intended.abs()), "the released sign differs below the pivot, and there alone"
    marks = landmarks(signals["entropy"], signals["mask"], 0.8)
    assert (intended.max() == 1) == (marks.above > 0) and (intended.min() == -1) == (marks.below > 0)


@EACH
@FEW
def test_levels_do_not_depend_on_the_unit_of_entropy(seed):
    signals = window(seed)
    entropy = signals["entropy"].clamp(min=1e-3)
    nats, bits = (level(entropy * unit, signals["mask"], 0.8, "intended") for unit in (1.0, 1.4427))
    torch.testing.assert_close(nats, bits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sign", SIGNS)
@EACH
@FEW
def test_weights_never_turn_an_advantage_and_at_most_double_it(sign, seed):
    found = weights(window(seed), sign)
    assert found.min() >= 0 and found.max() <= 2


@EACH
@FEW
def test_a_clip_range_is_never_narrowed_and_at_most_doubled(seed):
    signals = window(seed)
    low, high = adaptive_clip(signals["entropy"], signals["mask"])
    assert ((low >= 0.2) & (low <= 0.4)).all() and ((high >= 0.28) & (high <= 0.56)).all()
    assert ((low == 0.2) | (high == 0.28)).all(), "one side at a time"


@EACH
@FEW
def test_token_averages_sum_to_zero_over_the_tokens_of_a_group(seed):
    signals = window(seed)
    advantages = token_average(signals["rewards"].double(), signals["group"], signals["mask"])
    sums = (advantages * signals["mask"].sum(1)).view(3, 3).sum(1)
    torch.testing.assert_close(sums, torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("fallback_at", [None, 5.0])
@given(seed=st.integers(0, 10_000), value=st.floats(-3, 3))
@FEW
def test_equal_rewards_have_no_advantage(fallback_at, seed, value):
    signals = window(seed)
    rewards = torch.full_like(signals["rewards"], value)
    advantages = token_average(rewards, signals["group"], signals["mask"], fallback_at=fallback_at)
    torch.testing.assert_close(advantages, torch.zeros_like(rewards), atol=1e-6, rtol=0)


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.3, 2),
    tau=st.floats(0, 2),
    limit=st.sampled_from([None, 1.0]),
    released=st.booleans(),
)
@FEW
def test_a_change_keeps_the_order_of_tokens_and_sees_each_sequence_alone(seed, temperature, tau, limit, released):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 9, generator=generator) * 8
    logits[0, 3] = -torch.inf
    settings = {"pivot": -1.0, "above": 0.7, "below": -1.3 if released and limit else 1.3, "limit": limit}
    change = functools.partial(tempered, temperature=temperature, tau=tau, **settings)
    together = change(logits)
    assert not together.isnan().any() and torch.equal(together.argsort(1), logits.argsort(1))
    for row in range(5):
        torch.testing.assert_close(change(logits[row : row + 1]), together[row : row + 1])
    if tau == 0:
        assert torch.equal(together, logits)
