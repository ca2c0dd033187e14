"""What evaluation samples and scores with: transformers, a vLLM engine, or a vLLM server."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from rltoken.errors import UserError
from rltoken.rollout.completions import complete, prompt_logps
from rltoken.rollout.forced import until_end

if TYPE_CHECKING:
    from vllm import LLM


POSITIONS = 1024
"""Positions of a batch at which transformers makes logits at once, so that memory does not grow with lengths."""


class Generator(Protocol):
    """What completes lists of token ids for an evaluation, and says how probable a continuation is.

    Attributes:
        ends: tokens that end a sequence.
        together: how many completions share one random state, so that they must be sampled together; None where each
            has a random stream of its own.
        besides: of the last call, the tokens that were sampled for each context besides what was returned; None: none.
        prefilled: of the last call, the tokens of each context that had to be computed, since no cache held their keys
            and values; None where nobody says, or where it hangs on what else a cache held.
    """

    ends: frozenset[int]
    together: int | None
    besides: list[int] | None
    prefilled: list[int] | None

    def complete(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Sequence[int],
        seeds: Sequence[int],
        begun: Sequence[tuple[int, int]] = (),
    ) -> list[list[int]]:
        """One continuation each, up to and with the first token that ends the sequence or is one of `stops`.

        Args:
            contexts: token ids of prompts, or of prompts and what was sampled or forced after them.
            max_new_tokens: tokens of a continuation at most.
            stops: tokens that end a continuation, besides `ends`.
            seeds: of the random stream of each, which counts where `together` is None.
            begun: for each context, which of the last call without it (its context and continuation) it begins as, and
                how many tokens the two share, so that those need not be computed again. Empty: they share nothing.
        """
        ...

    def logps(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """The log-probability of each token of each continuation after its context.

        Args:
            contexts: token ids, at least one each.
            continuations: token ids, at least one each.
            temperature: by which logits are divided; vLLM knows 1 alone.
        """
        ...


@dataclass(frozen=True)
class Encoded:
    """Keys and values of one call's contexts and continuations; each row's begin at its own slot, after padding."""

    cache: DynamicCache
    starts: list[int]


class TransformersGenerator:
    """A model that samples from the random state it is called in, `batch_size` contexts at a time, in their order.

    It has all its weights here: processes sample each for itself, out of step.

    It holds the keys and values of its last call until the next, as much memory as that call needed, so that forcing
    answers at many budgets does not compute the thinking again. Models that do not cache every token do so.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float,
        batch_size: int,
        top_p: float = 1.0,
    ) -> None:
        self._model, self._tokenizer, self._temperature, self._top_p = model, tokenizer, temperature, top_p
        self._encoded: Encoded | None = None
        self.ends = ends_of(model.generation_config, tokenizer)
        self.together, self.besides = batch_size, None
        self.prefilled: list[int] = []

    def complete(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Sequence[int],
        seeds: Sequence[int],
        begun: Sequence[tuple[int, int]] = (),
    ) -> list[list[int]]:
        """As `Generator` says; the model is in evaluation mode meanwhile."""
        ends = self.ends.union(stops)
        sampled = {"temperature": self._temperature, "top_k": 0, "top_p": self._top_p}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=self._temperature > 0,
            **(sampled if self._temperature > 0 else {}),
            eos_token_id=sorted(ends),
            pad_token_id=self._tokenizer.pad_token_id,
            use_cache=True,
            return_dict_in_generate=True,
        )
        known, self._encoded, self.prefilled = (self._encoded if begun else None), None, []
        training = self._model.training
        self._model.eval()
        found: list[list[int]] = []
        try:
            for start in range(0, len(contexts), self.together):
                batch = slice(start, start + self.together)
                output = (
                    self._batch(contexts[batch], settings, keep=not begun and len(contexts) <= self.together)
                    if known is None
                    else self._continued(known, contexts[batch], begun[batch], settings)
                )
                found += [until_end(ids, ends) for ids in output]
            return found
        finally:
            self._model.train(training)

    @torch.no_grad()
    def logps(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """As `Generator` says; the model is in evaluation mode meanwhile."""
        rows = [[*context, *ids] for context, ids in zip(contexts, continuations, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: list[list[float]] = [[]] * len(rows)
        self._encoded = None  # its memory is needed here
        training = self._model.training
        self._model.eval()
        try:
            for start in range(0, len(rows), self.together):
                chosen = order[start : start + self.together]
                values = _token_logps(self._model, [rows[i] for i in chosen], temperature, self._tokenizer.pad_token_id)
                for i, row in zip(chosen, values, strict=True):
                    found[i] = row[len(contexts[i]) - 1 : len(rows[i]) - 1].tolist()
        finally:
            self._model.train(training)
        return found

    def _batch(self, contexts: Sequence[Sequence[int]], settings: GenerationConfig, *, keep: bool) -> list[list[int]]:
        encoded = self._tokenizer.pad({"input_ids": contexts}, padding_side="left", return_tensors="pt")
        encoded = encoded.to(self._model.device)
        width = encoded["input_ids"].size(1)
        output = self._model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            generation_config=settings,
            synced_gpus=False,
        )
        self.prefilled += map(len, contexts)
        cache = output.past_key_values
        if keep and cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers):
            self._encoded = Encoded(cache, [width - len(ids) for ids in contexts])
        return output.sequences[:, width:].tolist()

    def _continued(
        self,
        known: Encoded,
        contexts: Sequence[Sequence[int]],
        begun: Sequence[tuple[int, int]],
        settings: GenerationConfig,
    ) -> list[list[int]]:
        """Continuations of contexts of which the first tokens are known; of each, one at least is computed.

        Slots of the cache that follow what a row shares stay where they are and are masked.
        """
        rows, starts = [row for row, _ in begun], [known.starts[row] for row, _ in begun]
        slots = known.cache.get_seq_length()
        shared = [
            min(tokens, len(ids) - 1, slots - start)
            for ids, (_, tokens), start in zip(contexts, begun, starts, strict=True)
        ]
        width = max(start + tokens for start, tokens in zip(starts, shared, strict=True))
        longest = max(len(ids) - tokens for ids, tokens in zip(contexts, shared, strict=True))
        pad, inputs, mask = settings.pad_token_id, [], []
        for ids, start, tokens in zip(contexts, starts, shared, strict=True):
            rest = list(ids[tokens:])
            hole = width + longest - start - tokens - len(rest)
            inputs.append([pad] * start + list(ids[:tokens]) + [pad] * hole + rest)
            mask.append([0] * start + [1] * tokens + [0] * hole + [1] * len(rest))
            self.prefilled.append(len(rest))
        cache = DynamicCache(config=self._model.config)
        for index, layer in enumerate(known.cache.layers):
            cache.update(layer.keys[rows, :, :width], layer.values[rows, :, :width], index)
        output = self._model.generate(
            input_ids=torch.tensor(inputs, device=self._model.device),
            attention_mask=torch.tensor(mask, device=self._model.device),
            past_key_values=cache,
            generation_config=settings,
            synced_gpus=False,
        )
        return output.sequences[:, width + longest :].tolist()


class VllmGenerator:
    """A vLLM engine that samples each request from the stream of its seed; all contexts of a call are in its hands."""

    together = None
    besides = None
    prefilled = None

    def __init__(self, llm: LLM, ends: frozenset[int], *, temperature: float, top_p: float = 1.0) -> None:
        self._llm, self._temperature, self._top_p = llm, temperature, top_p
        self._longest = llm.llm_engine.model_config.max_model_len
        self.ends = ends

    def complete(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Sequence[int],
        seeds: Sequence[int],
        begun: Sequence[tuple[int, int]] = (),
    ) -> list[list[int]]:
        """As `Generator` says; the engine finds by itself what it knows of a context.

        Raises:
            UserError: a context and its continuation are longer than the engine serves; it would cut what it samples.
        """
        from vllm import SamplingParams

        longest = max(map(len, contexts)) + max_new_tokens
        if longest > self._longest:
            raise UserError(
                f"eval.max_new_tokens: a context and its completion may have {longest} tokens together, and vLLM "
                f"serves {self._longest}; lower it, eval.budgets or eval.max_answer_tokens, or raise "
                "trainer.vllm_max_model_length as far as the model allows."
            )
        settings = [
            SamplingParams(
                temperature=self._temperature,
                top_p=self._top_p,
                max_tokens=max_new_tokens,
                stop_token_ids=sorted(self.ends.union(stops)),
                seed=seed,
                detokenize=False,
            )
            for seed in seeds
        ]
        bar = functools.partial(tqdm, position=1, leave=False) if sys.stderr.isatty() else False
        prompts = [{"prompt_token_ids": list(ids)} for ids in contexts]
        outputs = self._llm.generate(prompts, sampling_params=settings, use_tqdm=bar)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def logps(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """As `Generator` says.

        Raises:
            UserError: a context and its continuation are longer than the engine serves.
        """
        from vllm import SamplingParams

        assert temperature == 1, "vLLM gives log-probabilities of a prompt at temperature 1"
        rows = [[*context, *ids] for context, ids in zip(contexts, continuations, strict=True)]
        longest = 1 + max(map(len, rows), default=0)  # vLLM samples at least one token
        if longest > self._longest:
            raise UserError(
                f"eval.max_new_tokens: to score a completion takes {longest} tokens, two more than it and its prompt "
                f"have, and vLLM serves {self._longest}; lower it, or raise trainer.vllm_max_model_length as far as "
                "the model allows."
            )
        settings = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": row} for row in rows]
        outputs = self._llm.generate(prompts, sampling_params=settings, use_tqdm=False)
        return [
            [place[token].logprob for place, token in zip(output.prompt_logprobs[len(context) :], ids, strict=True)]
            for output, context, ids in zip(outputs, contexts, continuations, strict=True)
        ]


class ServerGenerator:
    """A vLLM server that samples each request from the stream of its seed.

    Args:
        url: of the server, without `/v1`.
        ends: tokens that end a sequence.
        temperature: 0 is greedy.
        top_p: sample from the most probable tokens that hold this share of the probability.
        patience: seconds without any progress after which it is given up.
    """

    together = None
    besides = None
    prefilled = None

    def __init__(
        self, url: str, ends: frozenset[int], *, temperature: float, patience: float, top_p: float = 1.0
    ) -> None:
        self._url, self._temperature, self._top_p, self._patience = url, temperature, top_p, patience
        self.ends = ends

    def complete(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Sequence[int],
        seeds: Sequence[int],
        begun: Sequence[tuple[int, int]] = (),
    ) -> list[list[int]]:
        """As `Generator` says; the server finds by itself what it knows of a context.

        Raises:
            SamplerLost: the server is gone or stands still.
            UserError: it refuses a request, as where a context and its completion are longer than it serves.
        """
        common = {
            "temperature": self._temperature,
            "top_p": self._top_p,
            "top_k": 0,  # these three, or the server would take the model's own defaults
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": max_new_tokens,
            "stop_token_ids": sorted(self.ends.union(stops)),
            "return_token_ids": True,
        }
        payloads = [common | {"prompt": list(ids), "seed": seed} for ids, seed in zip(contexts, seeds, strict=True)]
        choices, _ = complete(self._url, payloads, patience=self._patience)
        return [choice["token_ids"] for choice in choices]

    def logps(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """As `Generator` says.

        Raises:
            SamplerLost: the server is gone or stands still.
            UserError: it refuses a request, as where a context and its continuation are longer than it serves.
        """
        assert temperature == 1, "vLLM gives log-probabilities of a prompt at temperature 1"
        return prompt_logps(self._url, contexts, continuations, patience=self._patience)


def _token_logps(model: PreTrainedModel, rows: Sequence[Sequence[int]], temperature: float, pad: int) -> Tensor:
    """[n, longest - 1] log-probability of each token but a row's first; beyond a row's end without meaning.

    Rows are padded on the right, where causality keeps what follows from what is read, and go through the model a few
    columns at a time, its cache holding those before, so that logits are [n, POSITIONS / n, V] at most.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=model.device)
    cache, found = DynamicCache(config=model.config), []
    for columns in ids[:, :-1].split(max(1, POSITIONS // len(rows)), dim=1):
        done = sum(part.size(1) for part in found)
        output = model(input_ids=columns, past_key_values=cache, use_cache=True)
        logps = (output.logits.float() / temperature).log_softmax(-1)
        found.append(logps.gather(-1, ids[:, done + 1 : done + 1 + columns.size(1), None]).squeeze(-1))
    return torch.cat(found, 1)


def ends_of(declared: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a sequence, by a model's generation settings and its tokenizer."""
    ids = declared.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
    return frozenset([*ids, tokenizer.eos_token_id])
