"""What each signal is, computed at most once per window and only when a stage names it.

`Signals` is a mapping whose values are made on first use. Rank-local signals describe this rank's rows; `gathered`
gives the same signals for the rows of all ranks, so that a window stage sees whole windows and needs no collective of
its own. Hidden states are never gathered: a stage that names them sees its own rank's rows (whole groups all the same).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rltoken.types import Progress

NEVER_GATHERED = frozenset({"old_hidden"})
SHARED = frozenset({"progress", "rng", "head"})
ROW_INDICES = frozenset({"parent", "group"})
"""Signals that number rows or groups: each rank's are shifted when they are gathered."""


class Signals(Mapping[str, Any]):
    """Lazily made, cached signals; `put` replaces one (a chain hands its result to the next stage)."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._makers, **self._made})

    def __len__(self) -> int:
        return len({**self._makers, **self._made})

    def put(self, name: str, value: Any) -> None:
        """Replace the signal `name`."""
        self._made[name] = value

    def add(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        """Add makers of further signals."""
        self._makers.update(makers)


def gathered(local: Signals, accelerator: Accelerator, gather_list: Callable[[list[Any]], list[Any]]) -> Signals:
    """The same signals for the rows of every rank, in rank order; the local ones themselves on a single process."""
    if accelerator.num_processes == 1:
        return local

    def make(name: str) -> Any:
        """The signal of all ranks."""
        value = local[name]
        if name in SHARED:
            return value
        if isinstance(value, list):
            return gather_list(value)
        if name in ROW_INDICES:
            value = value + accelerator.process_index * value.size(0)
        if value.dim() > 1:
            value = accelerator.pad_across_processes(value, dim=1)
        return accelerator.gather(value)

    return Signals({name: (lambda name=name: make(name)) for name in local if name not in NEVER_GATHERED})


def rows_of(signals: Mapping[str, Any], index: Tensor) -> Signals:
    """The signals of the rows `index` [n] only; a parent that is not among them becomes -1."""

    def make(name: str) -> Any:
        """The signal of the chosen rows."""
        value = signals[name]
        if name in SHARED:
            return value
        if isinstance(value, list):
            return [value[i] for i in index.tolist()]
        if name == "parent":
            place = value.new_full((value.size(0),), -1)
            place[index] = torch.arange(index.numel(), device=index.device)
            return place[value[index]]
        return value[index]

    return Signals({name: (lambda name=name: make(name)) for name in signals})


def prompt_id(example: Mapping[str, Any]) -> str:
    """A hash of the prompt that is the same on every machine and in every run."""
    return hashlib.sha256(json.dumps(example["prompt"], sort_keys=True).encode()).hexdigest()[:16]


def plain_text(completion: Any) -> str:
    """The text of a completion, be it a string or a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def thinking_length(ids: Sequence[int], think_end_id: int | None) -> int:
    """Tokens before the end of thinking; all of them where it never ends or the model does not think."""
    if think_end_id is None or think_end_id not in ids:
        return len(ids)
    return list(ids).index(think_end_id)


def correctness(names: Sequence[str]) -> int:
    """Which reward function decides whether a completion is correct: the one called accuracy, or else the first."""
    return names.index("accuracy") if "accuracy" in names else 0


def window_rng(seed: int, window: int, device: torch.device) -> torch.Generator:
    """A generator that depends on the seed and the window's number only: ranks, and a resumed run, draw alike."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + window)


def sampled_makers(
    inputs: Sequence[Mapping[str, Any]],
    texts: Callable[[], Sequence[Any]],
    ids: Sequence[Sequence[int]],
    group: Sequence[int],
    *,
    think_end_id: int | None,
    ends: frozenset[int],
    classes: Callable[[Sequence[str], Sequence[int]], list[int]] | None,
    progress: Progress,
    rng: torch.Generator,
) -> dict[str, Callable[[], Any]]:
    """Makers of every signal in `rltoken.types.SAMPLED` but what was graded, for the rows of one rank.

    Args:
        inputs, ids, group: per row its data set columns, completion token ids and group number.
        texts: gives the completion of each row, once somebody asks.
        think_end_id: the token that ends thinking, or None.
        ends: the tokens that end a sequence.
        classes: (texts, group numbers) -> number of each final answer within its group, -1 where there is none.
    """
    device = rng.device

    def whole(values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, device=device)

    return {
        "inputs": lambda: list(inputs),
        "texts": lambda: [plain_text(text) for text in texts()],
        "completion_ids": lambda: [list(row) for row in ids],
        "group": lambda: whole(list(group)),
        "prompt_id": lambda: [prompt_id(example) for example in inputs],
        "lengths": lambda: whole([len(row) for row in ids]),
        "thinking_lengths": lambda: whole([thinking_length(row, think_end_id) for row in ids]),
        "truncated": lambda: whole([not row or row[-1] not in ends for row in ids]),
        "answers": lambda: whole(classes([plain_text(text) for text in texts()], group)),
        "progress": lambda: progress,
        "rng": lambda: rng,
    }
