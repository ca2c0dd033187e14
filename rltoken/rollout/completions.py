"""Many completions from a server that speaks vLLM's completions API, and a stop where it dies or stands still.

Every request carries its own seed, so that asking again for what was lost gives the same tokens: a request that fails
is repeated with growing pauses. Nothing waits for ever: what counts is progress of the whole call, in completions that
came and in tokens that the server counts in its `/metrics`. Long completions may take as long as they need.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from rltoken.errors import SamplerLost, UserError, first_line

CONNECTIONS = 512
"""Requests on their way at once; the server queues what it cannot run."""
TOO_MANY = 429
"""The status by which a server asks to be asked again later."""
LONGEST_PAUSE = 30.0
CONNECT_SECONDS = 10.0
LOOKS = 20
"""How often within the patience the server's counters are read."""
_COUNTED = re.compile(r"^vllm:(?:generation|prompt)_tokens_total\S* (\S+)$", re.M)


@dataclass
class Watch:
    """What is known of a call's progress.

    Attributes:
        asked: completions asked for; `done` those that came.
        tokens: what the server has counted, prompts included.
        at: when there was progress last, in seconds of `time.monotonic`; `clock` the same as time of day.
        failed: the last error of a request, empty where none failed.
    """

    asked: int
    done: int = 0
    tokens: float = 0.0
    at: float = field(default_factory=time.monotonic)
    clock: str = field(default_factory=lambda: time.strftime("%H:%M:%S"))
    failed: str = ""

    def progressed(self) -> None:
        """Note that something has moved."""
        self.at, self.clock = time.monotonic(), time.strftime("%H:%M:%S")

    def told(self, url: str, patience: float) -> str:
        """Why the call was given up."""
        because = f", last error: {self.failed}" if self.failed else ""
        return (
            f"the server at {url} made no progress for {patience:g} s (rollout.patience): {self.done} of {self.asked} "
            f"completions had come, something last moved at {self.clock}{because}"
        )


def complete(
    url: str, payloads: Sequence[Mapping[str, Any]], *, patience: float, key: str = "trainer.vllm_server_base_url"
) -> tuple[list[dict[str, Any]], bool]:
    """One completion for each payload of `POST URL/v1/completions`.

    Args:
        url: of the server, without `/v1`.
        payloads: requests of one prompt and one sample each, with a seed where sampling is random.
        patience: seconds without any progress after which to give up.
        key: where the URL comes from, for the message.

    Returns:
        The first choice of each answer, and whether any request had to be repeated.

    Raises:
        SamplerLost: the server cannot be reached or made no progress for so long.
        UserError: the server refuses a request.
    """
    found, repeated = answers(f"{url}/v1/completions", payloads, patience=patience, metrics=f"{url}/metrics", key=key)
    return [answer["choices"][0] for answer in found], repeated


def prompt_logps(
    url: str,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    patience: float,
    key: str = "trainer.vllm_server_base_url",
) -> list[list[float]]:
    """The log-probability of each token of each completion after its prompt, at temperature 1.

    Args and errors are those of `complete`; prompts and completions are token ids.
    """
    rows = [[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)]
    # the one token that has to be sampled counts towards the length that is served
    common = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    choices, _ = complete(url, [common | {"prompt": row} for row in rows], patience=patience, key=key)
    return [
        [place[str(token)]["logprob"] for place, token in zip(scored[len(prompt) :], ids, strict=True)]
        for scored, prompt, ids in zip(
            (choice["prompt_logprobs"] for choice in choices), prompts, completions, strict=True
        )
    ]


def answers(
    url: str,
    payloads: Sequence[Mapping[str, Any]],
    *,
    patience: float,
    key: str,
    metrics: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], bool]:
    """One answer to each payload of `POST URL`.

    Args:
        url: what is asked.
        payloads: requests.
        patience: seconds without any progress after which to give up.
        key: where the URL comes from, for the message.
        metrics: where the server counts tokens as vLLM does; None: only answers are progress.
        headers: of every request.

    Returns:
        The answers, and whether any request had to be repeated.

    Raises:
        SamplerLost: the server cannot be reached or made no progress for so long.
        UserError: the server refuses a request, or answers with something else than a completion.
    """
    return asyncio.run(_answers(url, payloads, patience, key, metrics, headers))


async def _answers(
    url: str,
    payloads: Sequence[Mapping[str, Any]],
    patience: float,
    key: str,
    metrics: str | None,
    headers: Mapping[str, str] | None,
) -> tuple[list[Any], bool]:
    watch = Watch(len(payloads))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers, trust_env=True) as session,
        aiohttp.ClientSession(timeout=timeout, trust_env=True) as beside,  # or it would wait behind the requests
    ):
        requests = asyncio.gather(*(_one(session, url, payload, watch, key) for payload in payloads))
        guard = asyncio.create_task(_guard(beside, metrics, watch, patience))
        try:
            await asyncio.wait([requests, guard], return_when=asyncio.FIRST_COMPLETED)
            if not requests.done():
                raise SamplerLost(f"{key}: {watch.told(_server(url), patience)}.")
            return await requests, bool(watch.failed)
        finally:
            guard.cancel()
            requests.cancel()
            await asyncio.gather(requests, guard, return_exceptions=True)


async def _one(
    session: aiohttp.ClientSession, url: str, payload: Mapping[str, Any], watch: Watch, key: str
) -> dict[str, Any]:
    """One answer, asked for again and again; whoever guards the call ends it."""
    pause = 1.0
    while True:
        try:
            async with session.post(url, json=payload) as response:
                body = await response.read()
            if response.status < 500 and response.status != TOO_MANY:
                break
            watch.failed = f"status {response.status}: {_text(body, 200)}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            watch.failed = f"{type(error).__name__} {first_line(error)}".strip()
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    if response.status != 200:
        raise UserError(f"{key}: {_server(url)} refuses a request: {_text(body, 300)}")
    watch.done += 1
    watch.progressed()
    try:
        answer = json.loads(body)
        answer["choices"][0]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{key}: {_server(url)} answers with no completion: {_text(body, 300)}") from error
    return answer


async def _guard(session: aiohttp.ClientSession, metrics: str | None, watch: Watch, patience: float) -> None:
    """Return once there was no progress for `patience` seconds."""
    look = aiohttp.ClientTimeout(total=max(1.0, patience / LOOKS))
    while time.monotonic() - watch.at < patience:
        await asyncio.sleep(patience / LOOKS)
        if metrics is None:
            continue
        try:
            async with session.get(metrics, timeout=look) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError, OSError):
            continue
        tokens = sum(map(float, _COUNTED.findall(text)))
        if tokens > watch.tokens:
            watch.progressed()
        watch.tokens = tokens


def _server(url: str) -> str:
    return url.removesuffix("/v1/completions")


def _text(body: bytes, most: int) -> str:
    return body[:most].decode(errors="replace")
