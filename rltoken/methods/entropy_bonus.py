"""An entropy bonus as an auxiliary loss: coef * H is added to the objective at every trained token.

    L <- L - coef * H_t       reduced as the policy loss of the trainer's loss type

Deviation from TRL's `entropy_coef`, which averages over the micro-batch's tokens whatever the loss type: here the bonus
has the policy loss's own divisor, so that its weight against the policy loss does not depend on micro-batches.
"""

from typing import Annotated

from torch import Tensor

from rltoken.ranges import Range


def entropy_bonus(entropy: Tensor, *, coef: Annotated[float, Range()] = 0.001) -> Tensor:
    """[B, T] unreduced loss from [B, T] live entropies in nats."""
    return -coef * entropy
