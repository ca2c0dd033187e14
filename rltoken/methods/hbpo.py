"""HBPO: subgroups of a group are asked for different budgets, rewarded by theirs, and compared with each other.

Paper: Lyu et al., "Hierarchical Budget Policy Optimization for Adaptive Reasoning", 2025 (arXiv 2507.15844); code:
ZJU-REAL/HBPO. In the order of the code below, for a response of n tokens that was asked for a budget of b tokens:

    prompt     the G responses to a question are split evenly over k ascending budgets
    base(b)  = beta cos(pi b / (2 L))
    R        = beta cos(pi n / (2 L)) - alpha |n - b|  if correct and b < n <= L                     (Eq. 1-3)  shape
             = base(b)                                 if correct and n <= b, n <= L;  0 otherwise
    A_intra  = mean of R over the subgroup - base(b)                                                            credit
    A_inter  = (R - mean of R over the group) / std1 of R over the group                             (Eq. 4)
    A        = A_intra + A_inter                                                                     (Eq. 5)

A_intra is never above 0, and it is base(b) below 0 where a whole subgroup fails: a published trait, not repaired here.

`form='code'` is what the released code does instead: within the budget R is the smaller of base(b) and the first line
(so that a very short answer has a little less), and A_intra is added twice. Its prompt says "with" where the paper says
"within". beta = 4 and alpha = 1/4096 were read in the code, L = 4096 (the longest completion in training) and the
budgets (512, 1024, 2048, 2560) in both; the paper gives no numbers for alpha and beta. std1 + 1e-6 is the code's. Here
the budgets are shares of L, and alpha is 1 / L unless it is set, so that all of them follow the longest completion.

`gated` lifts a correct answer, which the second term can bring below 0, to the highest reward of a wrong one of its
group, whatever budgets the two had; the published form is gated=False. The gate leaves a wrong answer its own reward,
which is 0 with an ordinary grader, as published.

Deviations:
- The sentence belongs behind the opening think tag, in the model's own voice. TRL always ends a prompt with the
  template's generation prompt, so a prompt stage can only append it to the question.
- The code rewards responses without a budget by plain cosine; here every row needs the column `budget`.
- TRL's vLLM server mode samples a whole group from its first prompt, so all would get the first budget: not for that
  mode.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rltoken.methods.budget_prompt import asked, column, has_a_place
from rltoken.ops import gate_by_success, group_mean, group_std
from rltoken.ranges import Count, Range
from rltoken.rollout.forced import in_tokens

Scale = Annotated[float, Range(above=0)]


def up_to_longest(budgets: Sequence[float], longest: int) -> None:
    """Let ascending budgets pass of which none is longer than a completion may be: beyond it base(b) is below 0."""
    last = in_tokens(budgets, longest)[-1]
    if last > longest:
        raise ValueError(f"{last} is more than the longest completion, {longest} tokens; lower it, or give fractions")


def subgroup_prompt(
    inputs: list[dict[str, Any]],
    group: Tensor,
    *,
    budgets: Annotated[Sequence[float], up_to_longest] = (0.125, 0.25, 0.5, 0.625),
    longest: Count = 4096,
    template: Annotated[str, has_a_place] = " I will answer the question within {budget} tokens.",
) -> list[dict[str, Any]]:
    """Append to the last message the budget of the row's subgroup, which is also put into the column `budget`.

    Args:
        inputs: one dict per row, with a conversational `prompt`.
        group: [B]; the first rows of a group get the first budget, and so on, evenly.
        budgets: ascending, one per subgroup: whole numbers are completion tokens, fractions shares of `longest`.
        longest: L, the longest completion, tokens.
        template: the text to append.

    Raises:
        ValueError: a group cannot be split evenly over the budgets.
    """
    points, numbers = in_tokens(budgets, longest), group.tolist()
    sizes, seen = Counter(numbers), Counter()
    changed = []
    for example, number in zip(inputs, numbers, strict=True):
        if sizes[number] % len(points):
            raise ValueError(
                f"budgets: a group of {sizes[number]} cannot be split evenly over {len(points)}; make "
                f"trainer.num_generations a multiple of {len(points)}, or set another number of budgets"
            )
        budget = points[seen[number] * len(points) // sizes[number]]
        seen[number] += 1
        changed.append({**asked(example, template.format(budget=budget)), "budget": budget})
    return changed


def budget_reward(
    rewards: Tensor,
    correct: Tensor,
    lengths: Tensor,
    inputs: Sequence[Mapping[str, Any]],
    group: Tensor,
    *,
    longest: Count = 4096,
    beta: Scale = 4.0,
    alpha: Annotated[float | None, Range(least=0, none=True)] = None,
    form: Literal["paper", "code"] = "paper",
    gated: bool = True,
) -> Tensor:
    """[B] rewards of correct answers by their length and the budget they were asked for.

    Args:
        rewards: [B] float, NaN where nothing was graded, which stays; otherwise only wrong answers keep it, if gated.
        correct: [B] bool.
        lengths: [B] completion tokens.
        inputs: one dict per row, with the column `budget`.
        group: [B].
        longest: L, completion tokens beyond which a correct answer is worth nothing.
        beta: what an answer of no length is worth.
        alpha: what each token beyond the budget costs; None: 1 / longest.
        form: which definition of the reward within the budget (above).
        gated: lift a correct answer to the best wrong one of its group where it is below; False: as published.

    Raises:
        ValueError: a row has no budget.
    """
    n, budgets = lengths.double(), budgets_of(inputs, rewards.device)
    within = base(budgets, longest, beta)
    cost = 1 / longest if alpha is None else alpha
    beyond = base(n, longest, beta) - cost * (n - budgets).abs()
    value = torch.where(n > budgets, beyond, within if form == "paper" else torch.minimum(beyond, within))
    shaped = torch.where(correct & (n <= longest), value, 0.0).to(rewards.dtype)
    shaped = torch.where(rewards.isnan(), rewards, shaped)
    return gate_by_success(shaped, rewards, correct, group) if gated else shaped


def hbpo(
    rewards: Tensor,
    inputs: Sequence[Mapping[str, Any]],
    group: Tensor,
    *,
    longest: Count = 4096,
    beta: Scale = 4.0,
    form: Literal["paper", "code"] = "paper",
) -> Tensor:
    """[B] advantages within subgroups and across them.

    Args:
        rewards: [B] what `budget_reward` made; NaN where nothing was graded, whose advantage is NaN.
        inputs, longest, beta, form: as in `budget_reward`.
        group: [B].

    Raises:
        ValueError: a row has no budget.
    """
    r, budgets = rewards.double(), budgets_of(inputs, rewards.device)
    subgroup = torch.stack([group.double(), budgets], 1).unique(dim=0, return_inverse=True)[1]
    intra = group_mean(r, subgroup) - base(budgets, longest, beta)
    inter = (r - group_mean(r, group)) / (group_std(r, group) + 1e-6)
    return (inter + (intra if form == "paper" else 2 * intra)).to(rewards.dtype)


def base(tokens: Tensor, longest: int, beta: float) -> Tensor:
    """[B] beta cos(pi tokens / (2 longest))."""
    return beta * (math.pi / 2 * tokens / longest).cos()


def budgets_of(inputs: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
    """[B] the column `budget`, in completion tokens.

    Raises:
        ValueError: a row has none.
    """
    return torch.tensor(column(inputs, "budget", "+prompt=hbpo"), dtype=torch.double, device=device)
