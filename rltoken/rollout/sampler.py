"""The sampler that rows stages draw from: the trainer's own generation and graders, in batched calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rltoken.errors import UserError
from rltoken.signals import plain_text
from rltoken.types import Continuation, Progress, Rollout, Row, Template

if TYPE_CHECKING:
    from datasets import Dataset

    from rltoken.trainer import TokenGRPOTrainer


FORCED = "forced/"
"""What stands before the names of metrics that reward functions log while forced answers are graded."""
NO_CLASSES = (
    "reward.classes: a stage compares final answers; set a function (texts, group) -> number of each answer in its "
    "group, such as rltoken.rewards.math.classes."
)
"""Told where that function is missing."""


class PromptStream:
    """Prompts of a data set in an order of its own, shuffled anew each epoch, with a cursor that checkpoints keep.

    The cursor is the same on every rank. What they ask for in one call they get in rank order, so that the prompts of a
    window do not depend on how many ranks there are.
    """

    def __init__(self, dataset: Dataset, *, seed: int) -> None:
        self._dataset, self._seed = dataset, seed
        self.cursor = 0
        self._epoch_order: tuple[int, Tensor] | None = None

    def draw(self, asked: Sequence[int], rank: int) -> list[dict[str, Any]]:
        """The prompts of one rank, where rank r asks for `asked[r]` of them."""
        start = self.cursor + sum(asked[:rank])
        self.cursor += sum(asked)
        return [self._dataset[index] for index in self._indices(range(start, start + asked[rank]))]

    def _indices(self, places: Sequence[int]) -> Iterator[int]:
        for place in places:
            epoch, offset = divmod(place, len(self._dataset))
            if self._epoch_order is None or self._epoch_order[0] != epoch:
                generator = torch.Generator().manual_seed(self._seed * 7_919 + epoch)
                self._epoch_order = (epoch, torch.randperm(len(self._dataset), generator=generator))
            yield int(self._epoch_order[1][offset])


class TrainerSampler:
    """`rltoken.types.Sampler` over a trainer's generation back end and reward functions."""

    def __init__(self, trainer: TokenGRPOTrainer, *, template: Template, stream: PromptStream) -> None:
        self._trainer, self.template, self.stream = trainer, template, stream
        self.ends = frozenset(trainer.eos_token_ids)
        self.thinking_only = False

    def generate(
        self, contexts: Sequence[Sequence[int]], *, max_new_tokens: int | None = None, stops: Sequence[int] = ()
    ) -> list[Continuation]:
        """One continuation per context, in one batched call."""
        asked = self.most(len(contexts))
        if not asked:
            return []
        filler = [
            contexts[0] if contexts else self._trainer.eos_token_ids[:1] * 2
        ]  # one before the one that is decoded
        padded = [*contexts, *(filler * (asked - len(contexts)))]
        ids, logps = self._trainer.extend(
            [list(context) for context in padded],
            max_new_tokens=max_new_tokens,
            stops=stops,
            batch_rows=self._trainer.batch_rows,
        )
        return [
            Continuation(row, logps[i] if logps is not None else None) for i, row in enumerate(ids[: len(contexts)])
        ]

    def grade(
        self, inputs: Sequence[dict[str, Any]], completion_ids: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """[n, F] raw rewards of completions to the prompts of `inputs`, and what reward functions logged for each."""
        asked = self.most(len(inputs))
        padding = asked - len(inputs)
        inputs = [*inputs, *([inputs[0] if inputs else self._trainer.train_dataset[0]] * padding)]
        ids = [*map(list, completion_ids), *([self._trainer.eos_token_ids[:1]] * padding)]
        raw, extras = self._trainer.grade(inputs, self._trainer.decode(inputs, ids), ids, prefix=FORCED)
        return raw[: asked - padding], extras[: asked - padding]

    def roll(self, inputs: Sequence[dict[str, Any]]) -> Rollout:
        """Completions of the prompts of `inputs`, changed by the prompt stages, one each, graded.

        With `thinking_only`, they stop at the end of thinking and are not graded: there is no answer yet.

        Ranks may ask for different numbers: the shorter ones repeat rows and drop the results, since reward functions
        and back ends are called in step.
        """
        trainer, inputs = self._trainer, list(inputs)
        asked = self.most(len(inputs))
        filler = inputs[:1] or [trainer.train_dataset[0]]
        padded = trainer.prompted(inputs + filler * (asked - len(inputs)))
        size = trainer.num_generations
        prompt_ids = trainer.tokenize(padded)
        ids, logps = trainer.sample(
            prompt_ids, num_generations=size if asked % size == 0 else 1, stops=self.thinking_stops
        )
        texts = trainer.decode(padded, ids)
        n = len(inputs)
        if self.thinking_only:
            functions = len(trainer.reward_weights)
            rewards, extras = (
                torch.full((n, functions), torch.nan, device=trainer.accelerator.device),
                [{} for _ in range(n)],
            )
        else:
            rewards, extras = trainer.grade(padded, texts, ids)
        rows = [
            Row(prompt_ids[i], ids[i], [1] * len(ids[i]), logps[i] if logps is not None else None, parent=i)
            for i in range(n)
        ]
        progress = Progress(trainer.state.global_step, trainer.state.max_steps)
        return Rollout(
            inputs=padded[:n],
            texts=texts[:n],
            rewards=rewards[:n],
            rows=rows,
            progress=progress,
            group_size=size,
            seed=trainer.args.seed,
            graded=not self.thinking_only,
            thinking_only=self.thinking_only,
            extras=extras[:n],
        )

    @property
    def thinking_stops(self) -> tuple[int, ...]:
        """What a thinking pass stops at besides the end of the sequence."""
        ends_thinking = self.thinking_only and self.template.think_end_id is not None
        return (self.template.think_end_id,) if ends_thinking else ()

    def decode(self, inputs: Sequence[dict[str, Any]], completion_ids: Sequence[Sequence[int]]) -> list[Any]:
        """Completions as reward functions see them."""
        return self._trainer.decode(inputs, [list(ids) for ids in completion_ids])

    def classes(self, texts: Sequence[Any], group: Sequence[int]) -> list[int]:
        """Number of each final answer within its group, by `reward.classes`.

        Raises:
            UserError: there is no such function.
        """
        if self._trainer.classes is None:
            raise UserError(NO_CLASSES)
        return self._trainer.classes([plain_text(text) for text in texts], list(group))

    def draw(self, n: int) -> list[dict[str, Any]]:
        """The next `n` prompts of the sampler's own stream."""
        return self.stream.draw(self._of_all(n), self._trainer.accelerator.process_index)

    def total(self, rewards: Tensor) -> Tensor:
        """[n] weighted sum of [n, F] raw rewards; NaN where every function returned None."""
        return weighted_sum(rewards, self._trainer.reward_weights)

    def most(self, n: int) -> int:
        """The largest `n` over the ranks."""
        return max(self._of_all(n))

    def _of_all(self, n: int) -> list[int]:
        """The `n` of each rank."""
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return [n]
        return accelerator.gather(torch.tensor([n], device=accelerator.device)).tolist()


def weighted_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """[n] weighted sum of [n, F] raw rewards as TRL forms it: NaN left out, NaN where there is nothing else."""
    total = (rewards * weights.to(rewards).unsqueeze(0)).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)
