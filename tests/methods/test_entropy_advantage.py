"""The entropy-shaped advantage, worked by hand."""

import pytest
import torch

from rltoken.methods.entropy_advantage import entropy_advantage
from tests.methods.worked import assert_close


def test_entropy_advantage_never_turns_the_sign():
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.0]])
    entropy = torch.tensor([[0.5, 5.0, 0.9, 5.0, 5.0]])
    assert_close(entropy_advantage(advantages, entropy, alpha=0.4, kappa=2.0), [[1.2, 1.5, -0.64, -0.5, 0.0]])
    with pytest.raises(ValueError, match="kappa"):
        entropy_advantage(advantages, entropy, kappa=1.0)
