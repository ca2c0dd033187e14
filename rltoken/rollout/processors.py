"""What vLLM's engine runs to change logits by request: one class for every method, each request with its own change.

vLLM's V1 engine takes no function with a request. It takes classes when it is made, and hands each request's
`extra_args` to them. A server loads this one by `--logits-processors rltoken.rollout.processors:ChangedLogits` (with
`--logprobs-mode raw_logprobs`) and finds the change in the body's `vllm_xargs`; an engine in the training process is
made with `rltoken.rollout.logits.ENGINE`. Only runs with a method that changes logits load it.

Importing this module imports vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from rltoken.rollout.logits import REQUEST_KEY, Change, found

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class ChangedLogits(LogitsProcessor):
    """Applies to each row of the batch the change that its request asks for, and touches no other row.

    What is kept is the text of each request's change, by its place in the batch; requests that come, go and move carry
    theirs along. Requests of one and the same change are computed together.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request whose change cannot be found.

        Raises:
            ValueError: from `rltoken.rollout.logits.found`.
        """
        text = _change_of(sampling_params)
        if text is not None:
            found(text)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._texts: dict[int, str] = {}
        self._changes: list[tuple[Change, Tensor]] = []

    def is_argmax_invariant(self) -> bool:
        """False: a change may be any, and vLLM applies such processors before the temperature, as transformers does."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that were added, removed or moved since the last token."""
        if not process_dict_updates(self._texts, batch_update, lambda params, *_: _change_of(params)):
            return
        rows: dict[str, list[int]] = {}
        for row, text in sorted(self._texts.items()):
            rows.setdefault(text, []).append(row)
        self._changes = [(found(text), torch.tensor(places, device=self._device)) for text, places in rows.items()]

    def apply(self, logits: Tensor) -> Tensor:
        """[requests, V] logits, changed in place where a request asks for it."""
        for change, rows in self._changes:
            logits[rows] = change(logits[rows])
        return logits


def _change_of(params: SamplingParams) -> Any:
    return (params.extra_args or {}).get(REQUEST_KEY)
