"""80/20: the tokens that are kept, what that does to the loss, and the control of random tokens."""

import pytest
import torch

from rltoken.methods.forking_tokens import forks, forks_microbatch, forks_random
from rltoken.ops import quantile, token_noise
from tests.methods.configured import sections
from tests.methods.worked import assert_close

ROWS = (torch.arange(10) < torch.tensor([10, 3, 6, 1]).unsqueeze(1)).long()


def test_forks_keep_the_top_share():
    entropy = torch.tensor([[0.1, 2.0, 0.2, 0.3], [0.9, 1.5, 0.4, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    # seven trained tokens; the 0.8 quantile of .1 .2 .3 .4 .9 1.5 2.0 stands at rank 4.8: 0.9 + 0.8 * 0.6 = 1.38
    assert_close(quantile(entropy[mask.bool()], 0.8), 1.38)
    assert_close(forks(entropy, mask, rho=0.2), [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    assert_close(forks_microbatch(entropy, mask, rho=0.2), [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])


@pytest.mark.parametrize(("normaliser", "loss"), [("all", -2 / 7), ("forks", -1.0)])
def test_forks_shrink_the_loss_where_the_divisor_counts_all_tokens(normaliser, loss):
    """-0.2857 and -1.0 are the specification's, of an advantage of 1 at two of seven tokens."""
    entropy, mask = torch.tensor([[0.1, 2.0, 0.2, 0.3, 0.9, 1.5, 0.4, 9.0]]), torch.tensor([[1] * 7 + [0]])
    kept = forks(entropy, mask, rho=0.2, normaliser=normaliser)
    assert_close(-(kept * 1.0).sum() / 7, loss)
    drawn_at_random = forks_random(mask, torch.Generator().manual_seed(0), rho=0.2, normaliser=normaliser)
    assert_close(-(drawn_at_random * 1.0).sum() / 7, loss)


def test_random_tokens_are_the_share_of_the_window_that_forks_are():
    forks, control = sections("forking_tokens"), sections("forking_tokens/random_tokens")
    stage = control["method"]["weights"].pop("forks_random")
    assert stage["rho"] == forks["method"]["weights"].pop("forks")["rho"]
    assert control == forks


def drawn(seed=0, mask=ROWS, rho=0.2):
    return forks_random(mask, torch.Generator().manual_seed(seed), rho=rho)


@pytest.mark.parametrize("rho", [0.1, 0.2, 0.5, 1.0])
def test_it_keeps_as_many_tokens_of_the_window_as_forks_do(rho):
    entropy = torch.rand(4, 10, generator=torch.Generator().manual_seed(5))
    kept = drawn(rho=rho)
    assert kept.sum() == forks(entropy, ROWS, rho=rho).sum() and not kept[ROWS == 0].any()
    assert set(kept.unique().tolist()) <= {0.0, 1.0}


def test_responses_get_their_share_by_chance_only():
    """Of 20 tokens 4 are kept; of the response with a single token it is one in five, and never a set number."""
    draws = torch.stack([drawn(seed) for seed in range(2000)])
    assert (draws.sum((1, 2)) == 4).all()
    share = draws.mean(0)[ROWS > 0]
    assert share.min() > 0.16 and share.max() < 0.24  # 2000 draws: 0.2 with a deviation of 0.009
    assert draws.sum(2)[:, 0].unique().numel() > 3


def test_padding_does_not_change_what_is_drawn():
    wider = torch.nn.functional.pad(ROWS, (0, 5))
    assert drawn(mask=wider)[:, :10].equal(drawn()) and not drawn(mask=wider)[:, 10:].any()
    noise = token_noise(wider, torch.Generator().manual_seed(0))
    assert noise[:, :10].equal(token_noise(ROWS, torch.Generator().manual_seed(0)))


def test_nothing_trained_is_nothing_kept():
    assert not drawn(mask=torch.zeros(2, 3)).any()
