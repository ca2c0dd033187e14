"""Evaluation through any server with OpenAI's chat completions: messages go out, texts and counts of tokens come back.

No token ids come back, so that nothing can be cut and no answer can be forced.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rltoken.errors import UserError
from rltoken.rollout.completions import answers
from rltoken.signals import thinking_length


@dataclass(frozen=True)
class Reply:
    """A completion as text, its lengths in tokens, whether it was cut, and what the server counted.

    Attributes:
        text: thinking, the end of thinking and the answer, also where the server tells thinking and answer apart.
        thinking_tokens, completion_tokens: by the tokenizer where there is one, else by the server.
        sampled, prefilled: tokens that the server sampled, and that it computed of the prompt.
    """

    text: str
    thinking_tokens: int
    completion_tokens: int
    truncated: bool
    sampled: int
    prefilled: int


class ChatGenerator:
    """A server that is asked by messages; each request carries a seed, which not every server heeds.

    Args:
        url: of the server, as OpenAI's clients take it: with `/v1`. A key is read from $OPENAI_API_KEY.
        model: the name that it serves the model under.
        tokenizer: counts tokens; None: the server's counts are taken, the whole completion as thinking where it does
            not count that apart.
        think_end: the marker that ends thinking; None for a model that does not think.
        patience: seconds without any completion after which it is given up.
    """

    together = None

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase | None,
        think_end: str | None,
        *,
        temperature: float,
        top_p: float,
        patience: float,
    ) -> None:
        self._url, self._tokenizer, self._think_end, self._patience = url, tokenizer, think_end, patience
        self._common = {"model": model, "temperature": temperature, "top_p": top_p}

    def replies(
        self, prompts: Sequence[Sequence[Mapping[str, str]]], max_new_tokens: int, seeds: Sequence[int]
    ) -> list[Reply]:
        """One reply to each conversation.

        Raises:
            SamplerLost: the server is gone or stands still.
            UserError: it refuses a request, or answers with something else than a message.
        """
        payloads = [
            self._common | {"messages": list(messages), "max_tokens": max_new_tokens, "seed": seed % 2**31}
            for messages, seed in zip(prompts, seeds, strict=True)
        ]
        secret = os.environ.get("OPENAI_API_KEY")
        found, _ = answers(
            f"{self._url}/chat/completions",
            payloads,
            patience=self._patience,
            headers={"Authorization": f"Bearer {secret}"} if secret else {},
            key="server",
        )
        return [self._reply(answer) for answer in found]

    def _reply(self, answer: Mapping[str, Any]) -> Reply:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        message = choice.get("message") if isinstance(choice, Mapping) else None
        if not isinstance(message, Mapping):
            raise UserError(f"server: {self._url} answers with no message: {str(choice)[:200]}")
        thinking = message.get("reasoning_content") or message.get("reasoning") or ""
        content = message.get("content") or ""
        if not (isinstance(thinking, str) and isinstance(content, str)):
            raise UserError(f"server: {self._url} answers with a message that is no text: {str(message)[:200]}")
        ended = self._think_end if thinking and content else None
        text = f"{thinking}{ended or ''}{content}"
        sampled, prompt = usage.get("completion_tokens") or 0, usage.get("prompt_tokens") or 0
        if self._tokenizer is None:
            if usage.get("completion_tokens") is None:
                raise UserError(
                    f"tokenizer: the server at {self._url} counts no tokens; set tokenizer=FOLDER_OR_HUB_ID to count "
                    "them here."
                )
            length = sampled
            thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or length
        else:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            end = None if self._think_end is None else self._tokenizer.convert_tokens_to_ids(self._think_end)
            length, thought = len(ids), thinking_length(ids, end)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Reply(text, thought, length, choice.get("finish_reason") == "length", sampled, prompt - cached)
