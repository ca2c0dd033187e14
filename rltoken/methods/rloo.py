"""RLOO: the advantage of a response is its reward less the mean reward of the others to the same prompt.

Paper: Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
LLMs", ACL 2024 (arXiv 2402.14740). For response i of a group of G:

    b_i = sum_{j != i} r_j / (G - 1)
    A_i = r_i - b_i = (r_i - mean of the group) * G / (G - 1)

No division by a standard deviation. Responses without a reward are in nobody's baseline and have no advantage.

Deviations: a response that is alone in its group has no baseline, and advantage 0 (verl leaves it its bare reward). The
paper takes a completion for one action, the ratio and the clipping of which are the trainer's: TRL's.
"""

from torch import Tensor

from rltoken.ops import group_sum


def rloo(rewards: Tensor, group: Tensor) -> Tensor:
    """[B] reward minus the mean reward of the other rows of the group; every token of a row gets the same.

    Args:
        rewards: [B] float, NaN where nothing was graded; their advantage is NaN too.
        group: [B].
    """
    others = group_sum((~rewards.isnan()).double(), group) - 1
    baseline = (group_sum(rewards.double(), group) - rewards) / others.clamp(min=1)
    return ((rewards - baseline) * (others > 0)).to(rewards.dtype)
