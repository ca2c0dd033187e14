"""The trainer's end of a vLLM server: TRL's client with seeds, patience and weights that are checked.

TRL's client waits for ever, sends one seed for all prompts and can hand weights over between GPUs only. Here every row
is a request with a seed of its own, a server that dies or stands still ends the call (`completions`), and on a CPU the
weights go through a file. What fails is kept in `failure` and returned as empty completions, since the other ranks wait
for them; `rltoken.trl_vllm` raises it on all of them.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from safetensors.torch import save_file
from torch import Tensor
from trl.generation.vllm_client import VLLMClient, parse_logprobs

from rltoken.errors import SamplerLost, UserError, first_line
from rltoken.rollout import logits, vllm_cpu, vllm_worker
from rltoken.rollout.completions import complete

LOOK_SECONDS = 2.0


class Client(VLLMClient):
    """TRL's client of one vLLM server.

    Args:
        patience: seconds without progress after which a call is given up.
        seeds: n -> seeds of a call's n rows.
        changes_logits: whether requests will ask for a change of the logits (`rollout.logits`).
        stock: what TRL makes its client with.

    Attributes:
        failure: why the last call gave nothing, None where it did.
    """

    def __init__(
        self, *, patience: float, seeds: Callable[[int], list[int]], changes_logits: bool = False, **stock: Any
    ) -> None:
        self._patience, self._seeds, self._changes_logits = patience, seeds, changes_logits
        self._folder: Path | None = None
        self._served: dict[str, Any] | None = None
        self.failure: UserError | None = None
        super().__init__(**stock)
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, _Impatient(patience))

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = LOOK_SECONDS) -> None:
        """Wait until the server is up.

        Raises:
            UserError: it is not after `total_timeout` seconds.
        """
        until = time.monotonic() + total_timeout
        while not self._healthy():
            if time.monotonic() >= until:
                raise UserError(
                    f"trainer.vllm_server_base_url: no vLLM server answers at {self.base_url} (waited "
                    f"{total_timeout:g} s, trainer.vllm_server_timeout); start one by the same command with "
                    "rltoken.serve in place of rltoken.train."
                )
            time.sleep(retry_interval)

    def init_communicator(self, device: torch.device | str | int = 0) -> None:
        """Get ready to hand weights over: on a GPU as TRL does, on a CPU through a folder.

        Raises:
            UserError: the server does not answer, or was started without a way to take them, or without what changes
                logits.
        """
        try:
            self._agree(device)
        except UserError:
            raise
        except Exception as error:  # TRL's client raises just that for what the server answers
            raise UserError(
                f"trainer.vllm_server_base_url: the server at {self.base_url} cannot be used "
                f"({type(error).__name__}: {first_line(error).rstrip('.')}); start it by the same command with "
                "rltoken.serve in place of rltoken.train."
            ) from error

    def _agree(self, device: torch.device | str | int) -> None:
        if self._changes_logits:
            self._refuse_plain_logits()
        if torch.device(device).type != "cpu":
            super().init_communicator(device)
        else:
            transfer = self.get_server_info()["weight_transfer_config"]
            if transfer is None or transfer["backend"] != vllm_cpu.TRANSFER:
                raise UserError(
                    f"trainer.vllm_server_base_url: the server at {self.base_url} was not started to take weights from "
                    "a trainer on a CPU; start it by the same command with rltoken.serve in place of rltoken.train."
                )
            self._folder = Path(tempfile.mkdtemp(prefix="rltoken-weights-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            self._post(f"{self.base_url}/init_weight_transfer_engine", json={"init_info": {}})
        self._served = self._ask_worker()

    def served_dtype(self) -> torch.dtype | None:
        """What the server computes in; None if it does not tell (`--worker-extension-cls`)."""
        return getattr(torch, self._served["dtype"]) if self._served else None

    def served_weights(self) -> dict[str, list[float]] | None:
        """The fingerprint of the served weights as they are now; None where the server does not tell."""
        if self._served:
            self._served = self._kept(self._ask_worker) or self._served
        return self._served and self._served["fingerprint"]

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, Tensor]]
    ) -> None:
        """Hand the weights over; what goes wrong is kept in `failure`."""
        send = functools.partial(super().update_named_params, metadata) if self._folder is None else self._send_file
        self._kept(lambda: send(named_params))
        for _ in named_params:  # gathering what is left is a collective of all ranks
            pass

    def reset_prefix_cache(self) -> None:
        """Forget keys and values of earlier weights."""
        self._kept(super().reset_prefix_cache)

    def generate(self, prompts: list[list[int]], features: Any = None, n: int = 1, **settings: Any) -> dict[str, Any]:
        """`n` completions of each prompt, in the form of TRL's client; empty ones with `failure` set if there are none.

        The arguments are TRL's.
        """
        if features is not None:
            raise UserError("trainer.vllm_mode: pictures cannot go through a server here; use vllm_mode=colocate.")
        if settings.pop("structured_outputs_regex", None) is not None:
            raise UserError("trainer.vllm_structured_outputs_regex: not with a server; use vllm_mode=colocate.")
        settings |= settings.pop("generation_kwargs", None) or {}
        settings["vllm_xargs"] = settings.pop("extra_args", None)
        common = {"model": self.model, "return_token_ids": True, "return_tokens_as_token_ids": True, **settings}
        rows = [prompt for prompt in prompts for _ in range(n)]
        payloads = [
            common | {"prompt": row, "seed": seed} for row, seed in zip(rows, self._seeds(len(rows)), strict=True)
        ]
        before = self._served and self._served["fingerprint"]
        found = self._kept(lambda: complete(self.base_url, payloads, patience=self._patience))
        choices, repeated = found or ([], False)
        if repeated and before and self.served_weights() != before:
            choices, self.failure = (
                [],
                SamplerLost(
                    f"trainer.vllm_server_base_url: the server at {self.base_url} was started anew in a window "
                    "and serves other weights"
                ),
            )
        ids = [choice["token_ids"] for choice in choices] or [[] for _ in rows]
        logps, logp_ids = parse_logprobs([choice["logprobs"] for choice in choices]) if choices else (ids, ids)
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": logps, "logprob_token_ids": logp_ids}

    def _refuse_plain_logits(self) -> None:
        found = self.get_server_info()["model_config"]
        if any(found[name] != wanted for name, wanted in logits.ENGINE.items()):
            raise UserError(
                f"trainer.vllm_server_base_url: the server at {self.base_url} was started for a method that changes no "
                "logits; start it by the same command with rltoken.serve in place of rltoken.train."
            )

    def _healthy(self) -> bool:
        try:
            return requests.get(f"{self.base_url}/health", timeout=LOOK_SECONDS).status_code == 200
        except requests.RequestException:
            return False

    def _ask_worker(self) -> dict[str, Any] | None:
        response = self.session.post(f"{self.base_url}/collective_rpc", json={"method": vllm_worker.METHOD})
        return response.json()["results"][0] if response.status_code == 200 else None

    def _send_file(self, named_params: Iterator[tuple[str, Tensor]]) -> None:
        path = self._folder / "weights.safetensors"
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in named_params}, path)
        with self.weight_update():
            self._post(f"{self.base_url}/update_weights", json={"update_info": {"path": str(path)}})

    def _kept(self, call: Callable[[], Any]) -> Any:
        """What the call gives; None where the server fails, which is kept, or has failed before."""
        if self.failure is not None:
            return None
        try:
            return call()
        except UserError as error:
            self.failure = error
        except Exception as error:  # TRL's client raises just that for what the server answers
            self.failure = SamplerLost(
                f"trainer.vllm_server_base_url: weights or requests do not reach the server at {self.base_url} "
                f"({type(error).__name__}: {first_line(error)})"
            )
        return None


class _Impatient(HTTPAdapter):
    """Requests that end after some seconds without an answer, repeated while that time is not over."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        super().__init__()

    def send(self, request: Any, *args: Any, **options: Any) -> Any:
        """Send it, again and again where there is no connection."""
        until, pause = time.monotonic() + self._patience, 1.0
        while True:
            options["timeout"] = max(1.0, until - time.monotonic())
            try:
                return super().send(request, *args, **options)
            except requests.ConnectionError:
                if time.monotonic() + pause > until:
                    raise
            time.sleep(pause)
            pause *= 2
