"""What evaluation samples with: transformers' `generate`, a vLLM engine, or a vLLM server."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rltoken.errors import UserError
from rltoken.rollout.completions import complete
from rltoken.rollout.forced import until_end

if TYPE_CHECKING:
    from vllm import LLM


class Generator(Protocol):
    """What completes lists of token ids for an evaluation.

    Attributes:
        ends: tokens that end a sequence.
        together: how many completions share one random state, so that they must be sampled together; None where each
            has a random stream of its own.
    """

    ends: frozenset[int]
    together: int | None

    def complete(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: int, stops: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """One continuation each, up to and with the first token that ends the sequence or is one of `stops`.

        Args:
            contexts: token ids of prompts, or of prompts and what was sampled or forced after them.
            max_new_tokens: tokens of a continuation at most.
            stops: tokens that end a continuation, besides `ends`.
            seeds: of the random stream of each, which counts where `together` is None.
        """
        ...


class TransformersGenerator:
    """A model that samples from the random state it is called in, `batch_size` contexts at a time, in their order."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, temperature: float, batch_size: int
    ) -> None:
        self._model, self._tokenizer, self._temperature = model, tokenizer, temperature
        self.ends = ends_of(model.generation_config, tokenizer)
        self.together = batch_size

    def complete(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: int, stops: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """As `Generator` says; the model is in evaluation mode meanwhile."""
        ends = self.ends.union(stops)
        sampled = {"temperature": self._temperature, "top_k": 0, "top_p": 1.0}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=self._temperature > 0,
            **(sampled if self._temperature > 0 else {}),
            eos_token_id=sorted(ends),
            pad_token_id=self._tokenizer.pad_token_id,
            use_cache=True,
        )
        training = self._model.training
        self._model.eval()
        try:
            return [
                until_end(ids, ends)
                for start in range(0, len(contexts), self.together)
                for ids in self._batch(contexts[start : start + self.together], settings)
            ]
        finally:
            self._model.train(training)

    def _batch(self, contexts: Sequence[Sequence[int]], settings: GenerationConfig) -> list[list[int]]:
        encoded = self._tokenizer.pad({"input_ids": contexts}, padding_side="left", return_tensors="pt")
        encoded = encoded.to(self._model.device)
        output = self._model.generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], generation_config=settings
        )
        return output[:, encoded["input_ids"].size(1) :].tolist()


class VllmGenerator:
    """A vLLM engine that samples each request from the stream of its seed; all contexts of a call are in its hands."""

    together = None

    def __init__(self, llm: LLM, ends: frozenset[int], *, temperature: float) -> None:
        self._llm, self._temperature = llm, temperature
        self._longest = llm.llm_engine.model_config.max_model_len
        self.ends = ends

    def complete(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: int, stops: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """As `Generator` says.

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


class ServerGenerator:
    """A vLLM server that samples each request from the stream of its seed.

    Args:
        url: of the server, without `/v1`.
        ends: tokens that end a sequence.
        temperature: 0 is greedy.
        patience: seconds without any progress after which it is given up.
        model: the name that it serves the model under; None: whatever it serves.
    """

    together = None

    def __init__(
        self, url: str, ends: frozenset[int], *, temperature: float, patience: float, model: str | None = None
    ) -> None:
        self._url, self._temperature, self._patience = url, temperature, patience
        self._named = {} if model is None else {"model": model}
        self.ends = ends

    def complete(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: int, stops: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """As `Generator` says.

        Raises:
            SamplerLost: the server is gone or stands still.
            UserError: it refuses a request, as where a context and its completion are longer than it serves.
        """
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # not the model's own defaults
        common = (
            self._named
            | plain
            | {
                "temperature": self._temperature,
                "max_tokens": max_new_tokens,
                "stop_token_ids": sorted(self.ends.union(stops)),
                "return_token_ids": True,
            }
        )
        payloads = [common | {"prompt": list(ids), "seed": seed} for ids, seed in zip(contexts, seeds, strict=True)]
        choices, _ = complete(self._url, payloads, patience=self._patience)
        return [choice["token_ids"] for choice in choices]


def ends_of(declared: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a sequence, by a model's generation settings and its tokenizer."""
    ids = declared.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
    return frozenset([*ids, tokenizer.eos_token_id])
