"""80/20: the tokens that are kept, what that does to the loss, and the control of random tokens."""

import torch

from rltoken.methods.forking_tokens import forks, forks_microbatch
from rltoken.ops import quantile
from tests.methods.configured import sections
from tests.methods.worked import assert_close


def test_forks_keep_the_top_share():
    entropy = torch.tensor([[0.1, 2.0, 0.2, 0.3], [0.9, 1.5, 0.4, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    # seven trained tokens; the 0.8 quantile of .1 .2 .3 .4 .9 1.5 2.0 stands at rank 4.8: 0.9 + 0.8 * 0.6 = 1.38
    assert_close(quantile(entropy[mask.bool()], 0.8), 1.38)
    assert_close(forks(entropy, mask, rho=0.2), [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    assert_close(forks_microbatch(entropy, mask, rho=0.2), [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])


def test_forks_shrink_the_loss_since_the_divisor_counts_all_tokens():
    kept = forks(torch.tensor([[0.1, 2.0, 0.2, 0.3, 0.9, 1.5, 0.4]]), torch.ones(1, 7, dtype=torch.long), rho=0.2)
    assert_close(-(kept * 1.0).sum() / 7, -2 / 7)


def test_random_tokens_are_as_many_as_forks_and_divided_alike():
    forks, control = sections("forking_tokens"), sections("forking_tokens/random_tokens")
    stage = control["method"]["weights"].pop("random_tokens")
    assert stage["rho"] == forks["method"]["weights"].pop("forks")["rho"] and stage["normaliser"] == "all"
    assert control == forks
