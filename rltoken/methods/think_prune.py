"""ThinkPrune: ever shorter completions, with the limit told in the system prompt.

Paper: Hou et al., "ThinkPrune: Pruning Long Chain-of-Thought of LLMs via Reinforcement Learning", 2025 (arXiv
2504.01296); code: UCSB-NLP-Chang/ThinkPrune.

    r = c 1[n <= L]         L = 4000 tokens, 3000 from step 180 on, then 2000; n counts the whole completion

The authors have no reward of their own: sampling stops at L, and an answer that is not there is graded wrong. Two
stages with the same list of [step, limit]: a control sets the limit, a prompt stage tells it. A shape stage gives the
same reward where the limit is below what is sampled. A limit is a whole number of tokens, or a share of the longest
completion: 1.0, 0.75 and 0.5 of the authors' 4000.

Deviations: the paper has a round of RL per limit, each from the model of the one before; here one run changes its
limit. A step is an optimizer step, theirs a rollout batch of 128 prompts x 16 responses. Step 180 stands in a script of
theirs; when the third limit begins could not be read, and 360 repeats the first interval. Their sentence about the
limit ends a system prompt that also explains the think tags (its words were found in public copies, not in their
repository); here it ends the data set's own, if any. TRL's settings: trainer.max_completion_length=4000
trainer.num_generations=16 trainer.learning_rate=1e-6 trainer.beta=1e-3.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

from torch import Tensor

from rltoken.methods.budget_prompt import has_a_place
from rltoken.ops import gate_by_success
from rltoken.ranges import Count, Range
from rltoken.rollout.forced import tokens_of
from rltoken.types import Progress


def is_limit(limit: float, longest: int) -> None:
    """Let a whole number from 1 to `longest` pass, and a fraction of it that is at least one token."""
    share = isinstance(limit, float) and 0 < limit <= 1
    if not (share or type(limit) is int) or not 1 <= tokens_of(limit, longest) <= longest:
        raise ValueError(
            f"{limit!r} is no limit; set it to 1 to {longest} tokens, the longest completion, or to a fraction of them "
            "up to 1.0"
        )


def are_stages(stages: Sequence[Sequence[float]], longest: int) -> None:
    """Let a list of [step, limit] pass, its steps ascending from 0."""
    told = "set it to pairs of a step and a limit, as in [[0,1.0],[180,0.75]]"
    if isinstance(stages, str) or not stages or any(isinstance(pair, str) or len(pair) != 2 for pair in stages):
        raise ValueError(f"{stages!r} is not possible; {told}")
    for step, limit in stages:
        Range(least=0, whole=True)(step)
        is_limit(limit, longest)
    if stages[0][0] != 0 or any(earlier[0] >= later[0] for earlier, later in pairwise(stages)):
        raise ValueError(f"{stages!r} is not possible, since its steps do not ascend from 0; {told}")


Stages = Annotated[Sequence[Sequence[float]], are_stages]
PAPER = ((0, 1.0), (180, 0.75), (360, 0.5))
LONGEST = 4000


def limit_in_force(progress: Progress, stages: Sequence[Sequence[float]], longest: int) -> int:
    """The completion tokens of the last stage that has begun."""
    return tokens_of([limit for step, limit in stages if step <= progress.step][-1], longest)


def think_prune(progress: Progress, *, stages: Stages = PAPER, longest: Count = LONGEST) -> dict[str, int]:
    """How many completion tokens to sample at most.

    Args:
        stages: pairs of an optimizer step and the limit from it on: completion tokens, or a fraction of `longest`.
        longest: the longest completion, tokens.
    """
    return {"max_completion_length": limit_in_force(progress, stages, longest)}


def limit_prompt(
    inputs: list[dict[str, Any]],
    progress: Progress,
    *,
    stages: Stages = PAPER,
    longest: Count = LONGEST,
    template: Annotated[str, has_a_place] = " The output of the assistant should be within {budget} tokens.",
) -> list[dict[str, Any]]:
    """Tell the limit that is in force at the end of the system prompt, or as the system prompt where there is none.

    Args:
        inputs: one dict per row, with a conversational `prompt`, for a chat template that knows the role system.
        stages, longest: as in `think_prune`; both need the same.
        template: the text to append.
    """
    told = template.format(budget=limit_in_force(progress, stages, longest))

    def with_limit(prompt: list[dict[str, str]]) -> list[dict[str, str]]:
        if prompt[0]["role"] != "system":
            return [{"role": "system", "content": told.strip()}, *prompt]
        return [{**prompt[0], "content": prompt[0]["content"] + told}, *prompt[1:]]

    return [{**example, "prompt": with_limit(example["prompt"])} for example in inputs]


def within_limit(
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    lengths: Tensor,
    *,
    limit: Annotated[float, is_limit] = 0.5,
    longest: Count = LONGEST,
    gated: bool = True,
) -> Tensor:
    """[B] rewards, 0 for completions longer than `limit`.

    Args:
        rewards: [B]; `correct`: [B] bool; `group`: [B].
        lengths: [B] tokens of the whole completion.
        limit: the tokens that a completion may have, or a fraction of `longest`.
        longest: the longest completion, tokens.
        gated: a correct answer that is too long never falls below a wrong one, which matters only where wrong answers
            have a reward; False: as published.
    """
    shaped = rewards * (lengths <= tokens_of(limit, longest))
    return gate_by_success(shaped, rewards, correct, group) if gated else shaped
