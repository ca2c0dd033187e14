"""With `trl_vllm`, `trl_saving` and `trl_steps` all that touches a private name of TRL or of transformers' Trainer.

`SeamTrainer` is GRPOTrainer with its private seams under public names: what a subclass overrides (`make_window`,
`step_loss`, `score`, `checkpoint_state`, `restore_state`) and what it calls (`stock_window`, `stock_loss`, `sample`,
`grade`, `decode`, `forward`, ...). It holds no algorithm. tests/trl/test_private_names.py keeps a snapshot of every
name used here and says what changed when TRL does.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers import LogitsProcessorList
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.models.utils import (
    disable_gradient_checkpointing,
    prepare_deepspeed,
    prepare_fsdp,
    unwrap_model_for_generation,
)
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, use_adapter

from rltoken.errors import UserError
from rltoken.rollout import logits, packs, tree
from rltoken.rollout.forced import until_end
from rltoken.rollout.shared_prefix import generate
from rltoken.teachers import Server, Teacher
from rltoken.trl_vllm import VLLMTrainer
from rltoken.types import Head

if TYPE_CHECKING:
    pass

SHAPED = "shaped"
"""Name of the reward column in TRL's metrics and tables that holds the shaped reward."""
REFERENCE_ADAPTER = "ref"
"""TRL's name for the frozen copy of an adapter that is trained further."""

LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)
"""Settings of a model by which TRL's fused head scales or caps logits."""
OF_RANK = "of rank: "
"""Before the name of a metric whose values the ranks do not share, until it is logged."""


@dataclass
class Replay:
    """A finished rollout that TRL's own window code is to see instead of generating and grading.

    `texts`, `completion_ids` and `logps` belong to the original rows, in the order of the inputs; the `all_*` lists to
    every row, the original ones first; `rewards` is [n, F] of this rank; `extras` are the columns that reward functions
    logged for each original row; `ends` are tokens after which a completion does not count as cut, besides those that
    end a sequence.
    """

    texts: list[Any]
    completion_ids: list[list[int]]
    logps: list[list[float]] | None
    all_prompt_ids: list[list[int]]
    all_completion_ids: list[list[int]]
    all_logps: list[list[float]] | None
    all_masks: list[list[int]] | None
    rewards: Tensor
    extras: list[dict[str, Any]]
    ends: tuple[int, ...] = ()


@dataclass
class OldPass:
    """What one pass of the sampling policy over the window gave: [B, T], and where asked for [B, T], [B, T, H], [B]."""

    logps: Tensor
    entropy: Tensor | None
    hidden: Tensor | None
    appended: Tensor | None


class SeamTrainer(VLLMTrainer):
    """GRPOTrainer whose seams are public; by itself it trains exactly as GRPOTrainer does."""

    appended_id: int | None = None
    """The token whose log-probability after the last one a forward gives on demand."""
    teacher: Teacher | None = None
    """What `teacher_pass` asks; to be set before this constructor is called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._replay: Replay | None = None
        self._forward_memo: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._record: frozenset[str] | None = None
        self._recorded: OldPass | None = None
        self._reference: nn.Module | None = None
        self._family: Tensor | None = None
        self._flex = False
        self.sampled_ids: list[list[int]] = []
        model = args[0] if args else kwargs["model"]
        if isinstance(model, PeftModel) and self.needs_reference and kwargs["args"].beta == 0.0:
            keep_reference(model)
        super().__init__(*args, **kwargs)
        if self.teacher is not None:
            self.teacher = dataclasses.replace(self.teacher, model=self._made_ready(self.teacher.model))

    def encode_families_once(self, *, flex: bool = False) -> str | None:
        """Let forwards encode what rows of a family share once; why the model cannot, or None.

        With `flex` by FlexAttention.

        A teacher or reference that cannot sees plain rows.
        """
        models = [self.model, self.ref_model, *self.frozen_models]
        trained, *others = [causal_of(self.accelerator.unwrap_model(model)) for model in models if model is not None]

        def against(model: nn.Module) -> str | None:
            """Why a model cannot; under FSDP it is not yet where it will be."""
            return tree.obstacle(model, flex=flex, device=self.accelerator.device) or tree.trial(model)

        reason = against(trained)
        for model in [] if reason else [trained, *(model for model in others if against(model) is None)]:
            tree.use(model)
        self._flex = flex
        return reason

    # What a subclass overrides

    @property
    def needs_reference(self) -> bool:
        """Whether `reference_pass` will be called; asked before the trainer is made."""
        return False

    @property
    def labels_itself(self) -> bool:
        """Whether `score` gives a reward to completions that no reward function graded."""
        return False

    def make_window(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The tensors of one generation window (training only)."""
        return self.stock_window(inputs)

    def step_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of one micro-batch."""
        return self.stock_loss(model, inputs)

    def score(self, inputs: list[dict[str, Any]], texts: list[Any], ids: list[list[int]], raw: Tensor) -> Tensor | None:
        """[N] shaped rewards of the gathered rows from [N, F] raw ones; None leaves the raw sum (training only)."""
        return None

    # What a subclass calls: rollout

    def stock_window(self, inputs: list[dict[str, Any]], replay: Replay | None = None) -> dict[str, Any]:
        """TRL's own window: padding, old and reference log-probs, rewards, advantages, metrics and tables.

        With `replay`, generation and grading are not run but looked up; all rows of it are padded and scored, while
        metrics and tables stay those of the original rows.
        """
        names, weights = self.reward_func_names, self.reward_weights
        seen, ends = self.state.num_input_tokens_seen, self.eos_token_ids
        self._replay = replay
        if replay is not None:
            self._pending_extra_logs = _columns(replay.extras)
            self.eos_token_ids = [*ends, *replay.ends]
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._replay, self.eos_token_ids = None, ends
            self.reward_func_names, self.reward_weights = names, weights
            if replay is not None:  # every sampled token was counted when it was sampled, kept or not
                self.state.num_input_tokens_seen = seen
                self._metrics["train"]["num_tokens"] = [seen]

    def tokenize(self, inputs: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Prompt token ids, by the chat template where prompts are conversational."""
        return self._tokenize_prompts([copy.deepcopy(example["prompt"]) for example in inputs])[0]

    def sample(
        self,
        prompt_ids: list[list[int]],
        *,
        num_generations: int = 1,
        max_new_tokens: int | None = None,
        stops: Sequence[int] = (),
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Completions (token ids up to and with the first end-of-sequence token) and their sampling log-probs, if any.

        `num_generations` tells vLLM how many successive prompts are one and the same; `stops` are tokens that end a
        completion too.
        """
        with self.completion_limit(max_new_tokens), self._stopping_at(stops):
            ids, logps = super()._generate_single_turn(
                prompt_ids, None, {}, self._siblings(prompt_ids, num_generations)
            )
        self._count_tokens(sum(map(len, prompt_ids)) + sum(map(len, ids)))
        return ids, logps

    def extend(
        self,
        contexts: list[list[int]],
        *,
        max_new_tokens: int | None = None,
        stops: Sequence[int] = (),
        batch_rows: int | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continuations of contexts that were sampled before, and their log-probs, if any; equal contexts cost one.

        `batch_rows` is how many transformers samples at once, of like length (None: all); vLLM decides by itself.
        """
        with self.completion_limit(max_new_tokens), self._stopping_at(stops):
            if self.use_vllm or self.use_transformers_continuous_batching:
                ids, logps = super()._generate_single_turn(contexts, None, {}, 1)
            else:
                ids, logps = self._extend_with_transformers(contexts, batch_rows or len(contexts)), None
        self._count_tokens(sum(map(len, ids)))
        return ids, logps

    def _extend_with_transformers(self, contexts: list[list[int]], batch_rows: int) -> list[list[int]]:
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
        found: list[list[int]] = [[] for _ in contexts]
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            for start in range(0, len(order), batch_rows):
                chosen = order[start : start + batch_rows]
                rows = generate(
                    model, [contexts[i] for i in chosen], self.processing_class.pad_token_id, self.generation_config
                )
                for i, row in zip(chosen, rows.tolist(), strict=True):
                    found[i] = until_end(row, self.eos_token_ids)
        return found

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[nn.Module]:
        """The model, inside the context with all weights on every rank, so that ranks need not sample in step.

        Where FSDP2 or ZeRO-3 splits the weights, every rank must enter and leave.
        """
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            _ranks_not_compared(self.model_wrapped),
        ):
            parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
            for part in parts:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
            try:
                yield model
            finally:
                for part in parts:
                    part.reshard()
                if parts:
                    self._reshard_as_before(model, parts)

    def _reshard_as_before(self, model: nn.Module, parts: Sequence[FSDPModule]) -> None:
        """Let parts give up weights after a forward as accelerate has them: all but the root, the norm and the head."""
        for part in parts:
            part.set_reshard_after_forward(self.accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)
        for kept in (model, model.get_output_embeddings()):  # the head's is one state with the norm's
            kept.set_reshard_after_forward(False, recurse=False)

    def _count_tokens(self, tokens: int) -> None:
        everywhere = self.accelerator.gather(torch.tensor(tokens, device=self.accelerator.device))
        self.state.num_input_tokens_seen += int(everywhere.sum())

    def decode(self, inputs: Sequence[dict[str, Any]], ids: list[list[int]]) -> list[Any]:
        """Completions as TRL hands them to reward functions: strings, or a list with one assistant message."""
        if not ids:  # on this rank; transformers 5.17 decodes no row as one empty text
            return []
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        if is_conversational({"prompt": inputs[0]["prompt"]}):
            return [[{"role": "assistant", "content": text}] for text in texts]
        return texts

    def grade(
        self, inputs: list[dict[str, Any]], texts: list[Any], ids: list[list[int]], *, prefix: str = ""
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """[n, F] raw rewards of this rank's rows, and the columns that reward functions logged for each of them.

        Every rank must pass equally many rows: TRL gathers the rewards. `prefix` goes before the names of the metrics
        that reward functions log.
        """
        pending, self._pending_extra_logs = self._pending_extra_logs, defaultdict(list)
        metrics, self._pending_metrics = self._pending_metrics, defaultdict(list)
        try:
            rewards = self._raw_rewards(inputs, [x["prompt"] for x in inputs], texts, ids)
            extras = _rows_of(self._pending_extra_logs, len(inputs))
            for name, values in self._pending_metrics.items():
                metrics[f"{prefix}{name}"].extend(values)
        finally:
            self._pending_extra_logs, self._pending_metrics = pending, metrics
        start = self.accelerator.process_index * len(inputs)
        return rewards[start : start + len(inputs)], extras

    @contextlib.contextmanager
    def completion_limit(self, max_new_tokens: int | None) -> Iterator[None]:
        """Sample at most so many tokens inside the context; None leaves TRL's limit."""
        if max_new_tokens is None:
            yield
            return
        holder, name = (
            (self.vllm_generation, "max_completion_length")
            if self.use_vllm
            else (self.generation_config, "max_new_tokens")
        )
        before = getattr(holder, name)
        setattr(holder, name, max_new_tokens)
        try:
            yield
        finally:
            setattr(holder, name, before)

    @contextlib.contextmanager
    def changing_logits(self, change: logits.Change | None) -> Iterator[None]:
        """Change the logits of whatever is sampled inside the context, by either back end; None leaves them."""
        if change is None:
            yield
        elif self.use_vllm:
            before = self.vllm_generation.generation_kwargs
            asked = (before.get("extra_args") or {}) | {logits.REQUEST_KEY: logits.told(change)}
            self.vllm_generation.generation_kwargs = before | {"extra_args": asked}
            try:
                yield
            finally:
                self.vllm_generation.generation_kwargs = before
        else:
            # TRL passes no processors on; what it calls is this method of the unwrapped model
            model = self.accelerator.unwrap_model(self.model)
            processors = LogitsProcessorList([logits.EverySequence(change)])
            own = vars(model).get("generate")  # transformers puts one there that FSDP2 knows as a forward
            model.generate = functools.partial(model.generate, logits_processor=processors)
            try:
                yield
            finally:
                if own is None:
                    del model.generate
                else:
                    model.generate = own

    @contextlib.contextmanager
    def _stopping_at(self, stops: Sequence[int]) -> Iterator[None]:
        """Let these tokens end a completion inside the context, as those that end a sequence do."""
        if not stops:
            yield
            return
        ends = self.eos_token_ids
        self.eos_token_ids = [*ends, *stops]
        if self.use_vllm:
            holder, name = self.vllm_generation, "generation_kwargs"
            always = holder.generation_kwargs.get("stop_token_ids") or []
            value = {**holder.generation_kwargs, "stop_token_ids": [*always, *stops]}
        else:
            holder, name, value = self.generation_config, "eos_token_id", self.eos_token_ids
        before = getattr(holder, name)
        setattr(holder, name, value)
        try:
            yield
        finally:
            self.eos_token_ids = ends
            setattr(holder, name, before)

    def log_window_metric(self, name: str, value: float) -> None:
        """Log a number of this window; TRL averages over the windows of a logging step."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def log_rank_metric(self, name: str, value: float) -> None:
        """Log a number of this rank's rows, which other ranks may have none of: the mean over ranks is logged."""
        self.log_window_metric(OF_RANK + name, value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """GRPOTrainer's, which averages what is gathered here of all ranks."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        own = {name: metrics.pop(name) for name in list(metrics) if name.startswith(OF_RANK)}
        for of_rank in gather_list([own]):
            for name, values in of_rank.items():
                metrics[name.removeprefix(OF_RANK)].extend(values)
        super().log(logs, start_time)

    def log_apart(self, logs: dict[str, float]) -> None:
        """Log numbers without what the windows since the last log have gathered: GRPOTrainer would log that too."""
        super(GRPOTrainer, self).log(logs)

    def last_metric(self, name: str) -> float:
        """The value of a metric that the window just made has logged."""
        return self._metrics["train"][name][-1]

    # What a subclass calls: model

    def stock_loss(
        self, model: nn.Module, inputs: dict[str, Any], forward: tuple[Tensor, Tensor, Tensor | None] | None = None
    ) -> Tensor:
        """TRL's own loss; with `forward` (log-probs, entropies, MoE loss) it is handed those instead of running one."""
        self._forward_memo = forward
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._forward_memo = None

    def forward(
        self, model: nn.Module, inputs: dict[str, Any], what: frozenset[str] = frozenset()
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], dict[str, Tensor]]:
        """TRL's training forward of a micro-batch, once: (log-probs, entropies, MoE loss), and what else is asked for.

        Shapes [B, T], [B, T], scalar or None; of `what`, 'hidden' is [B, T, H], the state that produces each completion
        token, and 'appended' [B], the log-probability of `appended_id` after the last one.
        """
        return self._extended(
            model, *_scored(inputs), what=what, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )

    @contextlib.contextmanager
    def families(self, family: Tensor | None) -> Iterator[None]:
        """Rows of the forwards inside the context belong to these families [B], the first row of one being its trunk.

        Models for which `encode_families_once` has found no reason against it encode them as packed rows.
        """
        before, self._family = self._family, family
        try:
            yield
        finally:
            self._family = before

    @contextlib.contextmanager
    def recording(self, what: frozenset[str]) -> Iterator[None]:
        """Keep what TRL's own old-log-prob pass computes inside the context ('entropy', 'hidden', 'appended')."""
        self._record = what if what and self.makes_old_logps else None
        self._recorded = None
        try:
            yield
        finally:
            self._record = None

    def old_pass(self, window: dict[str, Any], what: frozenset[str]) -> OldPass:
        """The sampling policy's pass over the window: the recorded one, or one forward without gradient."""
        if self._recorded is not None:
            recorded, self._recorded = self._recorded, None
            return recorded
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            batch_size = self.args.per_device_train_batch_size
            return self._old_forward(self.model, *_scored(window), what=what, batch_size=batch_size)

    def reference_pass(self, window: dict[str, Any], *, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """[B, T] log-probs under the frozen reference and, if asked for, its [B, T] entropies in nats.

        That is TRL's; the base of a new adapter; a given adapter as it was; the model that is on disk.
        """
        if "ref_per_token_logps" in window and not with_entropy:
            return window["ref_per_token_logps"], None
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            unwrapped = self.accelerator.unwrap_model(self.model)
            if isinstance(unwrapped, PeftModel):
                with use_adapter(unwrapped, REFERENCE_ADAPTER if REFERENCE_ADAPTER in unwrapped.peft_config else None):
                    return self._plain_pass(self.model, window, with_entropy)
            if self._reference is None:
                self._reference = self._reference_model(unwrapped, with_entropy)
            return self._plain_pass(self._reference, window, with_entropy)

    def teacher_pass(self, window: dict[str, Any]) -> Tensor:
        """[B, T] log-probs under the frozen teacher at the trainer's temperature.

        NaN on tokens that end a sequence for the student but not for the teacher, which expects another one there.

        Raises:
            SamplerLost: the teacher's server is gone or stands still, as seen by any rank.
            UserError: it refuses a request of any rank.
        """
        source, ends = self.teacher.model, self.teacher.ends
        if isinstance(source, Server):
            logps = self._asked(source, window)
        elif source is not None:
            with torch.no_grad():
                logps, _ = self._plain_pass(source, window, with_entropy=False)
        else:
            with (
                torch.no_grad(),
                disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
                use_adapter(self.accelerator.unwrap_model(self.model), None),
            ):
                logps, _ = self._plain_pass(self.model, window, with_entropy=False)
        foreign = [token for token in self.eos_token_ids if ends is not None and token not in ends]
        ids = window["completion_ids"]
        return logps.masked_fill(torch.isin(ids, torch.tensor(foreign, dtype=ids.dtype, device=ids.device)), torch.nan)

    def _asked(self, server: Server, window: dict[str, Any]) -> Tensor:
        """[B, T] what the server says of this rank's rows, 0 on padding."""
        shown = window["completion_mask"].bool()
        prompts, completions = (
            [row[kept.bool()].tolist() for row, kept in zip(window[f"{part}_ids"], window[f"{part}_mask"], strict=True)]
            for part in ("prompt", "completion")
        )
        problem, found = None, []
        try:
            found = server.logps(prompts, completions)
        except UserError as error:
            problem = error
        self.raise_together(problem)
        values = torch.tensor([value for row in found for value in row], device=shown.device)
        return torch.zeros(shown.shape, device=shown.device).masked_scatter(shown, values)

    def forget_old_pass(self) -> None:
        """Drop what was recorded and never asked for."""
        self._recorded = None

    @property
    def has_reference(self) -> bool:
        """Whether `reference_pass` can find the reference: TRL's, what an adapter began as, or a folder or hub id."""
        if self.beta != 0.0:
            return True
        model = self.accelerator.unwrap_model(self.model)
        return isinstance(model, PeftModel) or bool(model.config._name_or_path)

    @property
    def frozen_models(self) -> list[nn.Module]:
        """The teacher, where it is a model of its own."""
        return [self.teacher.model] if self.teacher and isinstance(self.teacher.model, nn.Module) else []

    @property
    def head(self) -> Head:
        """The head as TRL's fused forward uses it, without gradient."""
        embeddings = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        bias = embeddings.bias
        return Head(_whole(embeddings.weight), None if bias is None else _whole(bias), self.temperature)

    @property
    def has_plain_head(self) -> bool:
        """Whether `head` can be had: logits linear in the hidden state, and weights that can be put together."""
        config = self.accelerator.unwrap_model(self.model).config.get_text_config()
        changed = any(getattr(config, name, None) not in (None, 1.0) for name in LOGIT_CHANGES)
        return not (changed or is_deepspeed_zero3_enabled())

    @property
    def splits_weights(self) -> bool:
        """Whether each rank holds a part of the weights only."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    @property
    def runs_tools(self) -> bool:
        """Whether TRL generates in several turns or by a function of the user's, which cannot be replayed."""
        return bool(self.tools) or self.rollout_func is not None or self.environment_factories is not None

    @property
    def makes_old_logps(self) -> bool:
        """Whether TRL's window code runs an old-log-prob pass (its own condition)."""
        generate_every = self.args.steps_per_generation * self.num_iterations
        return self.args.gradient_accumulation_steps % generate_every != 0 or (
            self.use_vllm and self.vllm_importance_sampling_correction
        )

    # The seams

    def _save(self, output_dir=None, state_dict=None):
        # Of a checkpoint with a folder of a second adapter transformers 5.17 loads only that one when it resumes. The
        # reference needs no saving: it is read again from where it came from.
        model = self.accelerator.unwrap_model(self.model)
        adapters = getattr(model, "peft_config", {})
        reference = adapters.pop(REFERENCE_ADAPTER, None)
        if reference is not None:  # peft would save the weights of an adapter that it does not know of with the other's
            weights = model.state_dict() if state_dict is None else state_dict
            state_dict = {name: value for name, value in weights.items() if f".{REFERENCE_ADAPTER}." not in f"{name}."}
        try:
            super()._save(output_dir, state_dict)
        finally:
            if reference is not None:
                adapters[REFERENCE_ADAPTER] = reference

    def _generate_and_score_completions(self, inputs):
        if self.model.training:
            window = self.make_window(inputs)
            # TRL shuffles and splits entries: a family is one of them
            return packs.fold(window, len(inputs)) if len(window["completion_ids"]) > len(inputs) else window
        batch = super()._generate_and_score_completions(inputs)
        if SHAPED in self._logs["rewards"]:  # nothing is shaped in evaluation, but the table's columns must keep step
            self._logs["rewards"][SHAPED].extend([float("nan")] * len(inputs) * self.accelerator.num_processes)
        return batch

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if self._replay is not None:
            return self._replay.completion_ids, self._replay.logps
        siblings = self._siblings(prompt_ids, num_generations)
        return super()._generate_single_turn(prompt_ids, images, multimodal_fields, siblings, has_tool_images)

    def _generate(self, prompts):
        result = super()._generate(prompts)
        self.sampled_ids = result[1]
        if self._replay is None:
            return result
        _, _, _, _, _, extra_fields, images, tool_images = result
        replay = self._replay
        return (
            replay.all_prompt_ids,
            replay.all_completion_ids,
            replay.all_masks,
            replay.texts,
            replay.all_logps,
            extra_fields,
            images,
            tool_images,
        )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self._replay is not None:
            raw = self.accelerator.gather(self._replay.rewards)
            ids = self._replay.completion_ids
        else:
            raw = self._raw_rewards(inputs, prompts, completions, completion_ids_list)
            ids = completion_ids_list
        if not self.model.training:
            return raw
        shaped = self.score(inputs, completions, ids, raw)
        if shaped is None:
            return raw
        self.reward_func_names = [*self.reward_func_names, SHAPED]
        only_shaped = torch.zeros(len(self.reward_func_names))
        only_shaped[-1] = 1.0
        self.reward_weights = only_shaped
        return torch.cat([raw, shaped.to(raw).unsqueeze(1)], dim=1)

    def _raw_rewards(self, inputs, prompts, completions, completion_ids_list):
        with _unwarned("All reward functions returned None", self.labels_itself):
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _compute_loss(self, model, inputs):
        return self.step_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self._forward_memo is not None:
            return self._forward_memo
        if self._record is not None and model is self.model:
            what, self._record = self._record, None
            self._recorded = self._old_forward(model, *args, what=what, **kwargs)
            return self._recorded.logps, self._recorded.entropy, None
        return self._per_token(model, *args, **kwargs)[0]

    # Helpers

    def _siblings(self, prompt_ids: list[list[int]], num_generations: int) -> int:
        """How many successive prompts vLLM may take for one and the same: it samples the first of them so often."""
        if not self.use_vllm or num_generations == 1:
            return num_generations
        blocks = [prompt_ids[i : i + num_generations] for i in range(0, len(prompt_ids), num_generations)]
        same = all(len(block) == num_generations and all(ids == block[0] for ids in block) for block in blocks)
        everywhere = self.accelerator.gather(torch.tensor([same], device=self.accelerator.device)).all()
        return num_generations if bool(everywhere) else 1

    def _old_forward(self, model, input_ids, attention_mask, logits_to_keep, *, what, **kwargs) -> OldPass:
        (logps, entropy, _), found = self._extended(
            model, input_ids, attention_mask, logits_to_keep, what=what, compute_entropy="entropy" in what, **kwargs
        )
        return OldPass(logps, entropy, found.get("hidden"), found.get("appended"))

    def _extended(self, model, input_ids, attention_mask, logits_to_keep, *, what, **kwargs):
        """TRL's forward, and of `what` hidden states and the log-probability of an appended token, all of one pass."""
        columns, completion = logits_to_keep, attention_mask[:, -logits_to_keep:]
        lengths = completion.sum(1, keepdim=True)
        if "appended" in what:
            place = input_ids.size(1) - columns + lengths
            input_ids = pad(input_ids, (0, 1)).scatter(1, place, self.appended_id)
            attention_mask = pad(attention_mask, (0, 1)).scatter(1, place, 1)
            logits_to_keep += 1
        (logps, entropy, aux_loss), hidden = self._per_token(
            model, input_ids, attention_mask, logits_to_keep, hidden="hidden" in what, **kwargs
        )
        found = {}
        if hidden is not None:
            found["hidden"] = hidden[:, :columns]
        if "appended" in what:
            found["appended"] = logps.gather(1, lengths).squeeze(1)
            padding = completion == 0  # TRL gives 0 there, and in the column of the appended token too
            logps = logps[:, :columns].masked_fill(padding, 0.0)
            entropy = None if entropy is None else entropy[:, :columns].masked_fill(padding, 0.0)
        return (logps, entropy, aux_loss), found

    def _per_token(self, model, input_ids, attention_mask, logits_to_keep, *, hidden=False, **kwargs):
        """TRL's forward of rows, packed by family where there are any, and the hidden state behind each token."""
        packed = self._family is not None and tree.used_by(causal_of(self.accelerator.unwrap_model(model)))
        with self._capture(model, hidden) as captured:
            if packed:
                values, states = self._packed_forward(
                    model, input_ids, attention_mask, logits_to_keep, captured, **kwargs
                )
            else:
                values = super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, **kwargs
                )
                states = _producing(captured, logits_to_keep) if captured else None
        return values, states

    def _packed_forward(
        self, model, input_ids, attention_mask, logits_to_keep, captured, *, batch_size=None, compute_entropy=False, **_
    ):
        """The forward of packed rows, `batch_size` families at once; logps and entropies are 0 on padding, as TRL's."""
        parts: list[tuple[Tensor, ...]] = []
        chosen = []
        for family in self._family.unique().split(batch_size or len(input_ids)):
            rows = torch.isin(self._family, family).nonzero().squeeze(1)
            ids, attention = input_ids[rows], attention_mask[rows]
            packed = tree.plant(ids, attention, logits_to_keep, self._family[rows], self.compute_dtype, flex=self._flex)
            with self.accelerator.autocast():
                outputs = model(**packed.inputs, shift_labels=packed.labels, fused_lm_head=True)
            asked = [outputs.log_probs] + ([outputs.entropy] if compute_entropy else [])
            padding = attention[:, -logits_to_keep:] == 0
            parts.append(
                tuple(packed.rows_of(value).masked_fill(padding, 0.0) for value in asked)
                + tuple(packed.rows_of(states) for states in captured)
            )
            captured.clear()
            chosen.append(rows)
        back = torch.cat(chosen).argsort()
        logps, *others = (torch.cat(values)[back] for values in zip(*parts, strict=True))
        entropy = others.pop(0) if compute_entropy else None
        return (logps, entropy, None), (others[0] if others else None)

    def _plain_pass(self, model: nn.Module, window: dict[str, Any], with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        (logps, entropy, _), _ = self._per_token(
            model,
            *_scored(window),
            compute_entropy=with_entropy,
            batch_size=self.args.per_device_train_batch_size,
        )
        return logps, entropy

    def _made_ready(self, source: nn.Module | Server | None) -> nn.Module | Server | None:
        """What a teacher is, a model on the device, frozen, with a head at the trainer's temperature."""
        if isinstance(source, Server):
            self.notes_steps = True
        if not isinstance(source, nn.Module):
            return source
        add_fused_lm_head(source, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        return self._placed(source.eval().requires_grad_(False))

    def _reference_model(self, model: nn.Module, with_entropy: bool) -> nn.Module:
        """TRL's reference, whose own head gives no entropies, or one of ours where it has none."""
        add_head = functools.partial(
            add_fused_lm_head,
            temperature=self.temperature,
            cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32,
            outputs=("log_probs", "entropy") if with_entropy else ("log_probs",),
        )
        if self.ref_model is not None:
            add_head(self.accelerator.unwrap_model(self.ref_model))
            return self.ref_model
        reference = create_model_from_path(
            model.config._name_or_path,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            trust_remote_code=self.args.trust_remote_code,
        )
        add_head(reference)
        return self._placed(reference)

    def _placed(self, frozen: nn.Module) -> nn.Module:
        """A model that only scores where TRL would have its reference: on the device, or in parts as the policy is."""
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(frozen, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(frozen, self.accelerator)
        return self.accelerator.prepare_model(frozen, evaluation_mode=True)

    @contextlib.contextmanager
    def _capture(self, model: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
        """Collect the backbone's last hidden state of each call: the fused head never calls lm_head.forward."""
        captured: list[Tensor] = []
        if not wanted:
            yield captured
            return
        causal = causal_of(self.accelerator.unwrap_model(model))
        handle = causal.base_model.register_forward_hook(
            lambda module, args, output: captured.append(output.last_hidden_state)
        )
        try:
            yield captured
        finally:
            handle.remove()


@contextlib.contextmanager
def _ranks_not_compared(model: nn.Module) -> Iterator[None]:
    """Take ZeRO-3's hook before a forward away, which waits for all ranks, and which TRL leaves where it is."""
    offload = getattr(getattr(model, "optimizer", None), "parameter_offload", None)
    handle = getattr(offload, "fwd_pre_hook", None)
    if handle is None:
        yield
        return
    hooks = offload.module._forward_pre_hooks
    hook = hooks.pop(handle.id)
    try:
        yield
    finally:
        hooks[handle.id] = hook


@contextlib.contextmanager
def _unwarned(text: str, wanted: bool) -> Iterator[None]:
    """Leave out what TRL logs with this text in it, where that is wanted."""
    logger = logging.getLogger(GRPOTrainer.__module__)

    def other(record: logging.LogRecord) -> bool:
        return not (wanted and text in record.getMessage())

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def causal_of(model: nn.Module) -> nn.Module:
    """The causal language model in or below an adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _whole(weight: Tensor) -> Tensor:
    """A weight without gradient, of all ranks where FSDP2 has split it: then every rank must ask."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def keep_reference(model: PeftModel) -> None:
    """Give a model whose adapter is trained further a frozen copy of it, as TRL does itself where beta > 0."""
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config["default"])
    set_peft_model_state_dict(model, get_peft_model_state_dict(model), REFERENCE_ADAPTER)


def _scored(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Token ids, attention mask and the number of scored columns, as TRL's forward takes them."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return ids, attention, inputs["completion_ids"].size(1)


def _producing(captured: list[Tensor], completion_columns: int) -> Tensor:
    """The hidden state one position before each completion token."""
    return torch.cat([states[:, -completion_columns - 1 : -1] for states in captured])


def _columns(extras: list[dict[str, Any]]) -> defaultdict[str, list[Any]]:
    names = sorted({name for row in extras for name in row})
    return defaultdict(list, {name: [row.get(name) for row in extras] for name in names})


def _rows_of(columns: dict[str, list[Any]], n: int) -> list[dict[str, Any]]:
    return [{name: values[i] for name, values in columns.items() if len(values) == n} for i in range(n)]


def gather_list(values: list[Any]) -> list[Any]:
    """Concatenate a list over all ranks, in rank order."""
    return gather_object(values)
