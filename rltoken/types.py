"""What the parts of rltoken hand each other, and the names that a stage may ask for.

Shape letters, here and everywhere: B rows, G group size, T completion tokens, F reward functions, H hidden size,
V vocabulary, K budgets, A summaries per budget. Lengths count completion tokens, never characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

THINKING = "thinking"
"""The kind of a row that TRL sampled itself; what the divisors of the loss count."""
PADDING = "padding"
"""The kind of a row that only evens out the number of rows; its train mask is zero."""

SAMPLED = {
    "inputs": "list of B dicts: the data set's columns of each row's prompt",
    "texts": "list of B str: each row's decoded completion",
    "completion_ids": "list of B lists of int: each row's completion tokens, without padding",
    "rewards": "[B] float: weighted sum of the reward functions, as left by the shape stages before",
    "correct": "[B] bool: the reward function called accuracy, or else the first one, gave more than 0.5; after a "
    "shape with labels of its own (ttrl), the reward is above 0.5",
    "group": "[B] long: rows of one group share a number",
    "prompt_id": "list of B str: a stable hash of the prompt",
    "lengths": "[B] long: completion tokens",
    "thinking_lengths": "[B] long: completion tokens before the end of thinking (all of them where it never ends)",
    "truncated": "[B] bool: the completion did not end with an end-of-sequence token",
    "answers": "[B] long: equivalence class of the final answer within the group; -1 where there is none",
    "progress": "Progress: the optimizer step and the last one",
    "rng": "torch.Generator: seeded by (seed, window), the same on every rank; not for live stages",
}
"""Signals that are known once the rollout is graded, before the model has scored it."""

SCORED = {
    "kind": "list of B str: 'thinking', or what a rows stage called the rows it added",
    "parent": "[B] long: the row this one was grown from (itself for a thinking row)",
    "ids": "[B, T] long: completion tokens, padded on the right",
    "mask": "[B, T] long: 1 on tokens that are trained",
    "advantages": "[B, T] float: the credit so far",
    "old_logps": "[B, T] float: log-probabilities under the policy that sampled, at the sampling temperature",
    "old_entropy": "[B, T] float: its entropy in nats",
    "old_hidden": "[B, T, H]: its hidden state that produces each token (after the final norm)",
    "old_appended": "[B] float: its log-probability of model.appended right after the last token",
    "ref_logps": "[B, T] float: log-probabilities under the frozen reference model",
    "head": "Head: makes logits of hidden states, with the weights as they are now",
    "ref_entropy": "[B, T] float: its entropy in nats",
    "teacher_logps": "[B, T] float: log-probabilities under the frozen teacher; NaN where it ends a sequence otherwise",
}
"""Signals of a scored window: whole groups, before TRL shuffles the rows."""

PUBLISHED = {
    "budgets": "[B, K] long: thinking budgets of each row, ascending, in tokens",
    "budget_scores": "[B, K] float: mean score of the answers forced at each budget; NaN where none was graded",
    "episodes": "[B, K + 1] long: thinking tokens before the first and up to each episode's end, padded with the last",
    "episode_scores": "[B, K + 1] float: mean score of the answers forced at each of these",
    "episode_progress": "[B] float: score after the episode that follows a shared prefix, less the score at the prefix",
    "extra_answers": "[B, N] long: answers of N completions that only vote, numbered as `answers`; -1 for none",
}
"""Signals that exist only where a rows stage puts them into `Rollout.signals`; for shapes and all that follows."""

LIVE = {
    "logps": "[B, T] float with gradient: log-probabilities under the current policy",
    "entropy": "[B, T] float with gradient: its entropy in nats (detach it before using it as a weight)",
    "hidden": "[B, T, H] with gradient: its hidden state that produces each token",
    "appended": "[B] float with gradient: its log-probability of model.appended right after the last token",
    "ratio": "[B, T] float with gradient: exp(logps - old_logps), 1 on-policy",
    "eps_low": "[B, T] float: the lower clip range in force",
    "eps_high": "[B, T] float: the upper clip range in force (cispo: the absolute cap)",
    "weight": "[B, T] float: product of the weight stages, 1 where none acts; for aux stages only",
}
"""Signals that exist only inside a training forward. Naming one makes a stage a forward stage."""


@dataclass(frozen=True)
class Progress:
    """Where training stands, in optimizer steps."""

    step: int
    max_steps: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(1.0, self.step / max(1, self.max_steps))


@dataclass(frozen=True)
class Head:
    """The language model head: logits = (weight h + bias) / temperature.

    `weight` is [V, H], `bias` [V] or None, neither with gradient; `temperature` is that of sampling.
    """

    weight: Tensor
    bias: Tensor | None
    temperature: float

    def logits(self, hidden: Tensor, entries: Tensor) -> Tensor:
        """[n, v] logits of the vocabulary's `entries` [v] from hidden states [n, H], in float32 or better."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        made = hidden.to(dtype) @ self.weight[entries].to(dtype).T
        return (made if self.bias is None else made + self.bias[entries].to(dtype)) / self.temperature

    def logit(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """[n] logit of the token `ids` [n] that each hidden state [n, H] gave, in float32 or better."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        made = (hidden.to(dtype) * self.weight[ids].to(dtype)).sum(-1)
        return (made if self.bias is None else made + self.bias[ids].to(dtype)) / self.temperature


@dataclass(frozen=True)
class LastWindow:
    """What a control stage may know of the generation window before this one.

    `mean_length` is in completion tokens, `truncated` the share of completions that were cut, `reward` the mean of the
    weighted raw rewards.
    """

    mean_length: float
    truncated: float
    reward: float


@dataclass
class Row:
    """One sequence of the training batch.

    `prompt_ids` and `completion_ids` are token ids; `train_mask` has one 0 or 1 per completion token (0: in context,
    never trained); `logps` are the sampler's log-probabilities, if it gives any; `parent` is the index of the thinking
    row it was grown from; `reward` is the score of an added row (thinking rows have theirs in `Rollout.rewards`), and
    `advantage` the credit of each of its tokens (None: its parent's), until a credit stage that acts on its kind.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    train_mask: list[int]
    logps: list[float] | None = None
    kind: str = THINKING
    parent: int = -1
    reward: float | None = None
    advantage: float | None = None


@dataclass
class Rollout:
    """The graded completions of one rank for one window, and the rows that will be trained.

    The first `len(inputs)` rows are the thinking rows, in the order of `inputs`, `texts` and `rewards` [B, F]; rows
    that a stage adds come after them. `group_size` rows in succession share a prompt. `seed` is the run's.

    With `thinking_only`, thinking rows end with their thinking: that is then no cut. `graded` is False, and `rewards`
    are NaN, where a control stage stopped sampling there: a rows stage has to add answers and grade those. `extras` are
    the columns that reward functions logged for each thinking row, `signals` what a rows stage publishes for later
    stages ([n, ...] per thinking row; `PUBLISHED` has the names), `metrics` what it has logged (a mean over this rank;
    all ranks log the same names).
    """

    inputs: list[dict[str, Any]]
    texts: list[Any]
    rewards: Tensor
    rows: list[Row]
    progress: Progress
    group_size: int
    seed: int = 0
    graded: bool = True
    thinking_only: bool = False
    extras: list[dict[str, Any]] = field(default_factory=list)
    signals: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Template:
    """The tokens that make a model answer where its thinking stops.

    `cut` follows thinking that was cut (ellipsis, end of thinking, answer header), `ended` thinking that ended by
    itself (header only); `stops` end an answer as an end-of-sequence token does. `think_end_id` is None for a model
    that does not think: its thinking is what it writes before it ends the sequence.
    """

    think_end_id: int | None
    cut: tuple[int, ...]
    ended: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Continuation:
    """Sampled tokens (without the context) and, where the back end gives them, their log-probabilities."""

    ids: list[int]
    logps: list[float] | None


class Sampler(Protocol):
    """What a rows stage samples and grades with. Every rank calls each method equally often."""

    template: Template
    ends: frozenset[int]
    """Tokens that end a sequence."""

    def generate(
        self, contexts: Sequence[Sequence[int]], *, max_new_tokens: int | None = None, stops: Sequence[int] = ()
    ) -> list[Continuation]:
        """One continuation per context (prompt and completion token ids so far), in one batched call.

        Each goes up to and with the first token that ends a sequence or is one of `stops`.
        """

    def grade(
        self, inputs: Sequence[dict[str, Any]], completion_ids: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """[n, F] raw rewards of completions (token ids) to the prompts of `inputs`, each NaN where there is none.

        And the columns that reward functions logged for each. What they log as metrics goes under `forced/`.
        """

    def decode(self, inputs: Sequence[dict[str, Any]], completion_ids: Sequence[Sequence[int]]) -> list[Any]:
        """Completions (token ids) as reward functions see them: strings, or lists of messages."""

    def roll(self, inputs: Sequence[dict[str, Any]]) -> Rollout:
        """Completions of the prompts of `inputs` (one each: repeat a prompt to sample a group), graded."""

    def classes(self, texts: Sequence[Any], group: Sequence[int]) -> list[int]:
        """Number of each final answer within its group, in order of appearance; -1 where there is none."""

    def draw(self, n: int) -> list[dict[str, Any]]:
        """The next `n` prompts of a stream of its own: shuffled by seed, disjoint over ranks, kept in checkpoints."""

    def total(self, rewards: Tensor) -> Tensor:
        """[n] weighted sum of [n, F] raw rewards, as TRL sums them."""

    def most(self, n: int) -> int:
        """The largest `n` over the ranks: what a loop must agree on."""
