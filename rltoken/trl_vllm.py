"""vLLM behind TRL's trainer: how the engine or the client is made, seeds of requests, and the weights it serves.

On a GPU it is TRL's own engine, with an explicit dtype; on a CPU it is `rollout.vllm_cpu`'s; a server is spoken to by
`trl_vllm_client`. After each hand-over the weights that are served are compared with those that were sent, and a
server that is lost ends the run on every rank alike.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, set_seed
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig
from trl.generation import vllm_generation

from rltoken import adapters
from rltoken.errors import UserError
from rltoken.rng import request_seed
from rltoken.rollout import fingerprint, logits
from rltoken.rollout.vllm_worker import Fingerprinted
from rltoken.trl_saving import SavingTrainer

if TYPE_CHECKING:
    from vllm import LLM

LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""What TRL sets as a launcher would; left there, a later run or a child would take itself for one of several ranks."""

NOT_COMPARED = (
    "The weights that vLLM serves cannot be compared with the trainer's (quantised, spread over workers, or on a "
    "server without --worker-extension-cls); the log-probabilities that both give still are."
)

logger = logging.getLogger(__name__)


class VLLMTrainer(SavingTrainer):
    """GRPOTrainer whose vLLM samples the weights that are trained, from a seed for each request."""

    patience = 300.0
    """Seconds without any progress of a server after which the run saves and leaves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._calls: tuple[tuple[str, int], int] = (("", -1), 0)
        self._sent: fingerprint.Fingerprint = {}
        self._problem: UserError | None = None
        with self._made_here(kwargs.get("args")):
            super().__init__(*args, **kwargs)
        if not self.use_vllm:
            return
        if self.vllm_mode == "colocate":
            set_seed(self.args.seed, device_specific=True)  # the engine has set every generator to its rank
            self._seed_requests()
        if self._can_merge_apart():
            self._merge_apart()
        self._check_weights()
        if self.vllm_mode == "server":
            self.notes_steps = True
            self.vllm_generation.generate = self._raising(self.vllm_generation.generate)

    @property
    def changes_logits(self) -> bool:
        """Whether requests will ask for a change of the logits (`rollout.logits`); asked before an engine is made."""
        return False

    def close(self) -> None:
        """Shut down a vLLM engine of this process: vLLM keeps it from the garbage collector."""
        if self.use_vllm and self.vllm_mode == "colocate":
            self.vllm_generation.llm.llm_engine.engine_core.shutdown()

    @property
    def compute_dtype(self) -> torch.dtype:
        """What forward passes are computed in."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype

    @contextlib.contextmanager
    def _made_here(self, args: GRPOConfig | None) -> Iterator[None]:
        """Let TRL's constructor make our engine or our client, where that is what it is about to make."""
        if not (args and args.use_vllm):
            yield
            return
        alone = LAUNCHED - os.environ.keys()
        if args.vllm_mode == "server":
            from rltoken.trl_vllm_client import Client

            name, made = (
                "VLLMClient",
                functools.partial(
                    Client, patience=self.patience, seeds=self._request_seeds, changes_logits=self.changes_logits
                ),
            )
        else:
            # TRL would take 29500 wherever it is free, and so would another run that starts at the same moment.
            os.environ.setdefault("MASTER_PORT", str(get_free_port()))
            name, made = "LLM", functools.partial(self._engine, vllm_generation.LLM, on_cpu=args.device.type == "cpu")
        stock = getattr(vllm_generation, name)
        setattr(vllm_generation, name, made)
        try:
            yield
        finally:
            setattr(vllm_generation, name, stock)
            for variable in alone:
                os.environ.pop(variable, None)

    def _engine(self, stock: Callable[..., Any], *, on_cpu: bool, **settings: Any) -> Any:
        """TRL's engine in the trainer's dtype: left alone, vLLM takes that of the folder, and bfloat16 for float32."""
        settings |= logits.ENGINE if self.changes_logits else {}
        if not on_cpu:
            return stock(dtype=self.compute_dtype, **settings)
        from rltoken.rollout import vllm_cpu

        return vllm_cpu.engine(self.compute_dtype, **settings)

    # For requests that are not training's

    @property
    def serves_alone(self) -> bool:
        """Whether this process has a vLLM engine that serves the whole model, so that `serving` may be used."""
        return self.use_vllm and self.vllm_mode == "colocate" and self.args.vllm_tensor_parallel_size == 1

    @property
    def server_url(self) -> str | None:
        """Where the vLLM server is that this trainer samples from, if any; every rank may ask it."""
        if not (self.use_vllm and self.vllm_mode == "server"):
            return None
        found = self.vllm_generation
        return found.server_base_url or f"http://{found.server_host}:{found.server_port}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[LLM]:
        """The engine of this process with the weights as they stand, for requests that bring their own seeds.

        Every rank must enter it. Training goes on as if nothing had been asked: no token is counted, no request takes a
        seed of training's, and what was cached for other requests is forgotten.
        """
        holder, llm = self.vllm_generation, self.vllm_generation.llm
        self.hand_over()
        if holder.enable_sleep_mode:
            llm.wake_up(tags=["kv_cache"])
        seeded = vars(llm).pop("generate")
        try:
            yield llm
        finally:
            llm.generate = seeded
            llm.reset_prefix_cache()
            if holder.enable_sleep_mode:
                llm.sleep(level=2)
                holder._llm_weights_sleeping = True

    def hand_over(self) -> None:
        """Give vLLM the weights as they stand; every rank must call it."""
        self.vllm_generation.sync_weights()
        self._last_loaded_step = self.state.global_step  # or training would hand over the same weights once more

    # Seeds

    def _seed_requests(self) -> None:
        """Let every request of the engine in this process sample from a stream of its own.

        TRL seeds the engine with the rank, whatever the run's seed, and all requests share the generator that training
        draws from: a dropout or another batch in between would change every later completion.
        """
        llm = self.vllm_generation.llm
        generate = llm.generate

        def seeded(prompts: list[Any], sampling_params: Any, **options: Any) -> Any:
            """vLLM's `generate` with a copy of the settings for each prompt."""
            each = [sampling_params.clone() for _ in prompts]
            for params, seed in zip(each, self._request_seeds(len(prompts)), strict=True):
                params.seed = seed
            return generate(prompts, sampling_params=each, **options)

        llm.generate = seeded

    def _request_seeds(self, n: int) -> list[int]:
        """Seeds of a call's requests; ranks that share an engine's work must come to the same ones."""
        place = ("train" if self.model.training else "eval", self.state.global_step)
        self._calls = (place, self._calls[1] + 1 if self._calls[0] == place else 0)
        together = self.args.vllm_tensor_parallel_size if self.vllm_mode == "colocate" else 1
        first = self.accelerator.process_index // together * n
        return [request_seed(self.args.seed, *place, self._calls[1], first + i) for i in range(n)]

    # Weights

    def _can_merge_apart(self) -> bool:
        """Whether the model has adapters on whole weights that are stored as they are."""
        model = self.accelerator.unwrap_model(self.model)
        return (
            isinstance(model, PeftModel)
            and not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled())
            and all(value.is_floating_point() for value in model.parameters())
        )

    def _merge_apart(self) -> None:
        """Let TRL's walk over the weights give merged ones without merging into the base.

        TRL merges all adapters into the base and takes them out again, which leaves the rounding of both in weights
        that are not trained, at every hand-over: in half precision they drift, and no resumed run finds them again.
        """
        generation, model = self.vllm_generation, self.accelerator.unwrap_model(self.model)
        walk = generation._iter_named_params
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }

        def apart() -> Iterator[tuple[str, Tensor]]:
            """TRL's walk, with its own merging switched off; layer by layer the merged weights instead."""
            model.merge_adapter = model.unmerge_adapter = lambda *args, **options: None
            try:
                for name, value in walk():
                    layer, _, kind = name.rpartition(".")
                    yield name, adapters.merged(layers[layer], kind) if layer in layers else value
            finally:
                del model.merge_adapter, model.unmerge_adapter

        generation._iter_named_params = apart

    def _check_weights(self) -> None:
        """Compare what is served with what was sent after every hand-over, where the sampler can tell."""
        generation = self.vllm_generation
        sync, whole = generation.sync_weights, generation._iter_named_params
        dtype, served = self._served()

        def noted() -> Iterator[tuple[str, Tensor]]:
            """TRL's walk over the weights, each of which is added to what was sent."""
            self._sent = {}
            yield from fingerprint.noted(whole(), self._sent, dtype)

        def checked() -> None:
            """TRL's hand-over, and a look at what has arrived."""
            sync()
            found = served()
            if found is None:
                logger.warning(NOT_COMPARED)
                generation._iter_named_params, generation.sync_weights = whole, self._raising(sync)
            elif part := fingerprint.difference(self._sent, found):
                self._problem = UserError(
                    f"rollout: after the hand-over of step {self.state.global_step} vLLM serves other weights than "
                    f"were sent ({part}); see 'When a run stops' in docs/rollouts.md."
                )

        if dtype is not None:
            generation._iter_named_params = noted
        generation.sync_weights = self._raising(sync if dtype is None else checked)

    def _served(self) -> tuple[torch.dtype | None, Callable[[], fingerprint.Fingerprint | None]]:
        """What this process's sampler computes in, and what asks it for the fingerprint of its weights.

        The dtype is None where there is nothing to ask: a server that does not tell, or that another rank asks.
        """
        if self.vllm_mode == "colocate":
            engine = self.vllm_generation.llm
            return engine.llm_engine.model_config.dtype, lambda: engine.collective_rpc(_fingerprint_of)[0]
        if not self.accelerator.is_main_process:
            return None, lambda: None
        client = self.vllm_generation.vllm_client
        if client.served_dtype() is None:
            logger.warning(NOT_COMPARED)
        return client.served_dtype(), client.served_weights

    def _raising(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, after which a problem of one rank is raised on all of them."""

        def called(*args: Any, **kwargs: Any) -> Any:
            """The call, then a look at every rank's problems."""
            result = call(*args, **kwargs)
            client = getattr(self.vllm_generation, "vllm_client", None)
            # what is served of a lost hand-over is no news
            self.raise_together((client and client.failure) or self._problem)
            return result

        return called

    def raise_together(self, problem: UserError | None) -> None:
        """Raise a problem of one rank on all of them, or nothing; every rank must call it."""
        if self.accelerator.num_processes > 1:
            problem = next((found for found in gather_object([problem]) if found), None)
        if problem:
            raise problem


def _fingerprint_of(worker: Any) -> fingerprint.Fingerprint | None:
    """What vLLM runs in its worker of this process."""
    return Fingerprinted.served_weights(worker)["fingerprint"]
