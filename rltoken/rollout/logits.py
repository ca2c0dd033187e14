"""A change of the next token's logits while a window is sampled: the same function for every back end.

A change is a `functools.partial` of a function of a module in `rltoken.methods` whose only positional parameter is
`logits`, [n, V] float32 -> [n, V]; its settings are plain values. It sees what the model gives, before temperature,
top-k, top-p and min-p, which all back ends apply afterwards. transformers calls it (`EverySequence`); to an engine of
vLLM, which takes no functions with a request, its name and settings go as text, and the engine looks it up
(`rltoken.rollout.processors`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from typing import Any

from torch import Tensor

Change = functools.partial
HOME = "rltoken.methods."
"""Where the functions have to stand: a server must not call whatever a request names."""
REQUEST_KEY = "rltoken_logits"
"""The key of a change in `SamplingParams.extra_args`, which is `vllm_xargs` in the body of a request to a server."""
PROCESSOR = "rltoken.rollout.processors:ChangedLogits"
LOGPROBS = "raw_logprobs"
ENGINE = {"logits_processors": [PROCESSOR], "logprobs_mode": LOGPROBS}
"""What an engine of vLLM is to be made with. Raw log-probabilities are the policy's own, whatever a request changes, so
that they can be compared with the trainer's; TRL's processed ones would be those of the changed distribution."""


def told(change: Change) -> str:
    """A change as text, from which `found` makes it again, to the last bit of every number.

    Raises:
        ValueError: it is no partial of such a function, or a setting is no plain value.
    """
    function = getattr(change, "func", None)
    if not isinstance(change, functools.partial) or change.args:
        raise ValueError(f"{change!r} is no functools.partial with settings alone")
    try:
        text = json.dumps({"function": f"{function.__module__}:{function.__qualname__}", "settings": change.keywords})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{change!r} cannot be written down: {error}") from error
    found(text)
    return text


@functools.lru_cache(maxsize=64)
def found(text: str) -> Change:
    """The change that `told` wrote down.

    Raises:
        ValueError: the text is none, or names no public function of `rltoken.methods` that changes logits.
    """
    try:
        parts = json.loads(text)
        module, _, name = parts["function"].partition(":")
        settings = dict(parts["settings"])
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{REQUEST_KEY}: {text!r} is no change of the logits") from error
    try:
        function: Any = getattr(importlib.import_module(module), name) if module.startswith(HOME) else None
    except (ImportError, AttributeError):
        function = None
    if not inspect.isfunction(function) or function.__module__ != module or name.startswith("_"):
        raise ValueError(f"{REQUEST_KEY}: '{module}:{name}' is no public function of a module in rltoken.methods")
    _check_signature(function, settings)
    return functools.partial(function, **settings)


def _check_signature(function: Any, settings: dict[str, Any]) -> None:
    """Refuse a function that does not take logits and exactly these settings."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    missing = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    unknown = settings.keys() - {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    if positional != ["logits"] or unknown or not settings.keys() >= set(missing):
        raise ValueError(
            f"{REQUEST_KEY}: {function.__name__}{inspect.signature(function)} is not to be called with the logits "
            f"and {sorted(settings)}"
        )


class EverySequence:
    """A change as transformers' `generate` takes it among its `logits_processor`: for each sequence of the batch."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[n, V] changed logits from [n, V] ones."""
        return self.change(scores)
