"""Hawkeye: thinking may take a share of what it took before training; what goes beyond costs its square.

Paper: She et al., "Hawkeye: Efficient Reasoning with Model Collaboration", 2025 (arXiv 2504.00424). The formula comes
from the project's README; the weight was not found, and the code of the reward was not read.

    r_i <- c_i - weight max(0, n_i - share n0)^2          unit: tokens (published)
    r_i <- c_i - weight max(0, n_i / n0 - share)^2        unit: ratio (ours)

c_i is the reward, n_i the tokens of the thinking, n0 those of the untrained model's thinking on the same problem, which
the data set must bring in a column. share = 0.3. The weight of the published form has to be tiny: at 1e-5, 100 tokens
too many cost 0.1; that of the ratio is about 1.

Deviations: the authors grade the answer that a small frozen model writes from the thinking, which keeps the policy from
answering without thinking; here c_i is whatever the reward functions grade, by default the policy's own answer. As
published, wrong answers pay too, and a long correct one falls far below them.
"""

from typing import Annotated, Any, Literal

from torch import Tensor

from rltoken.methods.budget_prompt import column
from rltoken.ops import gate_by_success
from rltoken.ranges import Range


def hawkeye(
    inputs: list[dict[str, Any]],
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    thinking_lengths: Tensor,
    *,
    weight: Annotated[float, Range(least=0)] = 1e-5,
    share: Annotated[float, Range(least=0)] = 0.3,
    unit: Literal["tokens", "ratio"] = "tokens",
    original: str = "original_tokens",
    gated: bool = True,
) -> Tensor:
    """[B] rewards less the squared excess of thinking.

    Args:
        inputs: one dict per row, with the column `original`.
        rewards: [B]; `correct`: [B] bool; `group`: [B].
        thinking_lengths: [B] thinking tokens.
        weight: of the squared excess.
        share: of the original thinking, free of charge.
        unit: measure the excess in tokens, or as a ratio of the original thinking.
        original: the column with the original number of thinking tokens, above 0.
        gated: shape correct answers only, and never to below a wrong one; False: all, as published.

    Raises:
        ValueError: a prompt without that column.
    """
    before = rewards.new_tensor(column(inputs, original, "it to the data set: thinking tokens before training"))
    excess = (thinking_lengths - share * before).clamp(min=0)
    if unit == "ratio":
        excess = excess / before
    shaped = rewards - weight * excess**2
    return gate_by_success(shaped, rewards, correct, group) if gated else shaped
