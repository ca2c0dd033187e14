"""TokenGRPOTrainer: TRL's GRPOTrainer with a pipeline of stages plugged into its two seams.

    make_window   prompts, controls -> [sample, grade, rows] -> TRL's window, shapes -> credits, marks, bounds,
                  weights, ratios
    step_loss     one forward -> forward bounds, weights, ratios -> TRL's loss -> auxiliary losses

It holds no algorithm: methods live in `rltoken.methods`, what stages see in `rltoken.signals`, TRL's private names in
`rltoken.trl_compat`. With an empty pipeline it trains bit for bit as GRPOTrainer does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from rltoken import combinations
from rltoken.errors import UserError, first_line
from rltoken.launching import NO_FOLLOWING, NO_PACKS
from rltoken.pipeline import Pipeline, Stage, build
from rltoken.rng import forked_rng
from rltoken.rollout import agreement, packs, tree
from rltoken.rollout.logits import Change
from rltoken.rollout.sampler import NO_CLASSES, PromptStream, TrainerSampler, weighted_sum
from rltoken.running import (
    act,
    change_prompts,
    check_controlled,
    check_rollout,
    finite,
    look,
    non_negative,
    noted,
    per_token,
    shape,
)
from rltoken.signals import NEVER_GATHERED, Signals, correctness, gathered, sampled_makers, thinking_length, window_rng
from rltoken.teachers import SIGNAL, Teacher, refuse_missing
from rltoken.trl_compat import Replay, SeamTrainer, gather_list
from rltoken.types import LIVE, PADDING, PUBLISHED, THINKING, LastWindow, Progress, Rollout, Row, Template

logger = logging.getLogger(__name__)

NO_TEMPLATE = Template(think_end_id=None, cut=())
FORWARD = ("mask", "ids", "old_logps", "progress", "head")
"""Window signals that a forward has of itself, so that they need not ride along with the rows."""
CARRIED = "signal_"
"""Prefix of the keys under which the other ones do."""


class TokenGRPOTrainer(SeamTrainer):
    """GRPOTrainer that runs the stages of a pipeline.

    Args (besides GRPOTrainer's):
        pipeline: the method, from `rltoken.pipeline.build`; an empty one is plain GRPO.
        template: the token that ends the model's thinking, and what forces an answer; by default it does not think.
        appended_id: the token of the signals `appended` and `old_appended`.
        pack_tokens: tokens (padding counted) that one forward and backward may hold; None leaves TRL's micro-batches;
            'auto' is that, but per_device_train_batch_size x max_completion_length where there are rows stages, whose
            rows would make TRL's micro-batches many times larger.
        batch_rows: how many answers transformers samples at once where they are forced; None: all of them.
        packing: 'rows'; 'tree' to encode what rows of a family share once (`rltoken.rollout.tree`); 'flex', the same
            by FlexAttention; 'auto' is 'tree' where there are rows stages and the model can.
        normaliser: 'thinking' (row and token divisors count thinking rows, so that added rows add to the numerator
            only) or 'all'.
        max_logp_difference: what vLLM's log-probabilities may differ by from the trainer's, in the mean of a window's
            tokens; 'auto' goes by the dtype, None lets everything pass.
        patience: seconds without any progress of a vLLM server after which `SamplerLost` is raised.
        teacher: what gives the signal `teacher_logps`; needed by stages that name it.
        classes: (texts, group numbers) -> which final answers of a group are one and the same, as
            `rltoken.rewards.math.classes`; needed by stages that name `answers`.
        on_change: 'refuse' or 'accept' to go on from a checkpoint of other data or another number of processes.
        max_skipped_steps: optimizer steps in a row without a finite loss and gradient, which are skipped, that end it.
        evaluation: what `evaluate` measures in place of TRL's evaluation loop, as NAME -> number; called on every rank.
        record: what else checkpoints are to say of whom they belong to (`rltoken.identity.changed`).

    Raises:
        UserError: a combination that makes no sense, before anything is sampled.
    """

    def __init__(
        self,
        *args: Any,
        pipeline: Pipeline | None = None,
        template: Template = NO_TEMPLATE,
        appended_id: int | None = None,
        pack_tokens: int | str | None = None,
        batch_rows: int | None = None,
        packing: str = "auto",
        normaliser: str = "thinking",
        max_logp_difference: float | str | None = "auto",
        patience: float = SeamTrainer.patience,
        teacher: Teacher | None = None,
        classes: Callable[[Sequence[str], Sequence[int]], list[int]] | None = None,
        on_change: str = "refuse",
        max_skipped_steps: int = SeamTrainer.max_skipped_steps,
        evaluation: Callable[[TokenGRPOTrainer], dict[str, float]] | None = None,
        record: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.pipeline = pipeline if pipeline is not None else build({})
        self.template, self.batch_rows, self.normaliser = template, batch_rows, normaliser
        self.patience, self.appended_id, self.teacher = patience, appended_id, teacher
        self.classes, self.on_change, self.record = classes, on_change, record or {}
        self.evaluation, self.max_skipped_steps = evaluation, max_skipped_steps
        self._rng: torch.Generator | None = None
        self._windows = 0
        self._thinking_ends: tuple[int, ...] = ()
        self._last_window: LastWindow | None = None
        self._raw: Tensor | None = None
        self._shaped: Tensor | None = None
        self._relabelled: Tensor | None = None
        self._published: Mapping[str, Tensor] = {}
        self._pack_shares: tuple[float, float] = (1.0, 1.0)
        super().__init__(*args, **kwargs)
        self._function_names = list(self.reward_func_names)
        combinations.check(self.pipeline, self.args)
        combinations.warn_of_one_pass(self.pipeline, self.args, len(self.train_dataset))
        self.pack_tokens = self._auto_pack_tokens() if pack_tokens == "auto" else pack_tokens
        self.packing = self._packing(packing)
        self._check()
        self._most_difference = agreement.limit_of(max_logp_difference, self.compute_dtype)
        self.sampler = TrainerSampler(
            self,
            template=template,
            stream=PromptStream(self.train_dataset, seed=self.args.seed),
        )
        self._configured = {"epsilon": self.epsilon_low, "epsilon_high": self.epsilon_high}
        self._ends = frozenset([*self.eos_token_ids, self.processing_class.pad_token_id])
        self._try_prompts_and_shapes()

    @property
    def needs_reference(self) -> bool:
        """Whether a stage names a signal of the reference."""
        return self._reference_signal is not None

    @property
    def _reference_signal(self) -> str | None:
        """The first signal of the reference that a stage names."""
        return next((name for name in ("ref_logps", "ref_entropy") if self.pipeline.needs(name)), None)

    @property
    def changes_logits(self) -> bool:
        """Whether a control stage may change the logits of what is sampled."""
        return self.pipeline.changes_logits

    @property
    def progress(self) -> Progress:
        """Optimizer steps done and to do."""
        return Progress(self.state.global_step, self.state.max_steps)

    # Window: prompts, controls, rows, shapes, credits and what of the token stages needs no forward

    def make_window(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The tensors of one generation window, on whole groups."""
        self._rng = window_rng(self.args.seed, self._windows, self.accelerator.device)
        self._windows += 1
        rollout = None
        limit, change = self._control_stages()
        with self.completion_limit(limit), self.changing_logits(change):
            if self.pipeline["rows"]:
                rollout = self._rows_stages(inputs)
                inputs, self._published = rollout.inputs, rollout.signals
                ends_thinking = rollout.thinking_only and self.template.think_end_id is not None
                self._thinking_ends = (self.template.think_end_id,) if ends_thinking else ()
            else:
                inputs = self.prompted(inputs)
            rows = rollout.rows if rollout else None
            with self._by_family(rows), self.recording(self._old_parts()):
                window = self.stock_window(inputs, rollout and replay_of(rollout, self._thinking_ends))
        if self.use_vllm and self.vllm_importance_sampling_correction:
            self._check_sampler(window)
        rows = rows or originals_as_rows(self.sampled_ids)
        self._log_rollout(rows, len(inputs), rollout.metrics if rollout else {})
        if len(rows) > len(inputs):
            self._spread_over_added_rows(window, rows, len(inputs))
        slots = ("credits", "marks", "bounds", "weights", "ratios", "aux")
        if self.pipeline.stages(*slots) or self.pipeline.observers:
            local = self._local_signals(window, inputs, rows)
            with self._by_family(rows):
                self._credit_stages(window, local, gathered(local, self.accelerator, gather_list))
                self._carry(window, local, added=len(rows) > len(inputs))
        self.forget_old_pass()
        return window

    def _by_family(self, rows: Sequence[Row] | None) -> contextlib.AbstractContextManager[None]:
        """Forwards of a window's rows go by family inside the context, if there are families and they are packed."""
        if self.packing == "rows" or not rows or all(row.kind == THINKING for row in rows):
            return contextlib.nullcontext()
        return self.families(torch.tensor([row.parent for row in rows], device=self.accelerator.device))

    @property
    def labels_itself(self) -> bool:
        """Whether a shape stage has labels of its own."""
        return any(stage.relabels for stage in self.pipeline["shapes"])

    def score(self, inputs: list[dict[str, Any]], texts: list[Any], ids: list[list[int]], raw: Tensor) -> Tensor | None:
        """Run the shape stages on the gathered rewards of a graded rollout."""
        self._raw, self._shaped, self._relabelled = raw, None, None
        if not self.pipeline["shapes"]:
            return None
        group = [i // self.num_generations for i in range(len(inputs))]
        makers = self._sampled_makers(inputs, lambda: texts, ids, group)
        local = Signals(makers | self._published_makers(list(range(len(inputs)))))
        world = gathered(local, self.accelerator, gather_list)
        world.put("rewards", weighted_sum(raw, self.reward_weights))
        world.put("correct", self._correct())
        for stage in self.pipeline["shapes"]:
            for name, value in shape(stage, world).items():
                self.log_window_metric(name, value)
            if stage.relabels:
                self._relabelled = world["rewards"] > 0.5
                world.put("correct", self._relabelled)
        self._shaped = world["rewards"]
        return self._shaped

    def prompted(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run the prompt stages on the prompts of every rank, so that what they draw does not depend on the ranks."""
        if not self.pipeline["prompts"]:
            return inputs
        everyone = inputs if self.accelerator.num_processes == 1 else gather_list(inputs)
        group = torch.arange(len(everyone)) // self.num_generations
        for stage in self.pipeline["prompts"]:
            everyone = change_prompts(stage, everyone, group, self.progress, self._rng)
        start = self.accelerator.process_index * len(inputs)
        return everyone[start : start + len(inputs)]

    def _try_prompts_and_shapes(self) -> None:
        """Run copies of these stages on made-up completions of a few prompts: what they refuse is told before training.

        Raises:
            UserError: what a stage raises, or a prompt that the chat template cannot take.
        """
        if not (self.pipeline["prompts"] or self.pipeline["shapes"]):
            return
        rows, rng = 2 * self.num_generations, window_rng(self.args.seed, 0, self.accelerator.device)
        group = torch.arange(rows, device=rng.device) // self.num_generations
        inputs = [dict(self.train_dataset[number % len(self.train_dataset)]) for number in group.tolist()]
        for stage in self.pipeline["prompts"]:
            inputs = change_prompts(stage.copy(), inputs, group, Progress(0, self.args.max_steps), rng)
            try:
                self.tokenize(inputs)
            except TemplateError as error:
                raise UserError(
                    f"{stage.key}: the model's chat template does not take its prompts "
                    f"({first_line(error).rstrip('.')}); leave the stage out, or change model.path."
                ) from error
        ids = [self.eos_token_ids[:1] * (1 + i) for i in range(rows)]
        self._rng = rng
        tried = Signals(self._sampled_makers(inputs, lambda: [""] * rows, ids, group.tolist()))
        tried.put("correct", torch.arange(rows, device=rng.device) % 2 == 0)
        tried.put("rewards", tried["correct"].float())
        for stage in self.pipeline["shapes"]:
            if PUBLISHED.keys().isdisjoint(stage.needs):
                shape(stage.copy(), tried)

    def _control_stages(self) -> tuple[int | None, Change | None]:
        """Apply what the control stages set; the tokens to sample at most and the change of logits, if one sets it."""
        settings: dict[str, Any] = {}
        for stage in self.pipeline["controls"]:
            chosen = stage.run({"progress": self.progress, "last_window": self._last_window})
            check_controlled(stage, chosen, self.max_completion_length)
            settings |= chosen
        self.sampler.thinking_only = bool(settings.pop("stop_at_think_end", False))
        change = settings.pop("logits", None)
        of_logits = {f"logits/{name}": value for name, value in (change.keywords if change else {}).items()}
        for name, value in (settings | of_logits).items():
            if isinstance(value, int | float):
                self.log_window_metric(f"control/{name}", float(value))
        settings = self._configured | settings
        self.epsilon_low, self.epsilon_high = settings["epsilon"], settings["epsilon_high"]
        return settings.get("max_completion_length"), change

    def _rows_stages(self, inputs: list[dict[str, Any]]) -> Rollout:
        rollout = self.sampler.roll(inputs)
        for stage in self.pipeline["rows"]:
            rollout = stage.run({"rollout": rollout, "sampler": self.sampler})
            check_rollout(stage, rollout, len(inputs))
        if not rollout.graded:
            raise UserError(
                f"{self.pipeline['rows'][0].key}: sampling stops at the end of thinking and no rows stage graded an "
                "answer; leave out the control stage that sets stop_at_think_end."
            )
        self._refuse_unpublished(rollout.signals)
        return dataclasses.replace(rollout, rows=self._in_families(rollout.rows, len(inputs)))

    def _in_families(self, rows: Sequence[Row], originals: int) -> list[Row]:
        """The thinking rows, then those grown from the first, from the second ...: equally many for each, on all ranks.

        Where one has fewer, rows of one masked token take the places.
        """
        grown: list[list[Row]] = [[] for _ in range(originals)]
        for row in rows[originals:]:
            grown[row.parent].append(row)
        most = self.sampler.most(max(map(len, grown)))
        padding = Row(rows[0].prompt_ids[-1:], [self.eos_token_ids[0]], [0], [0.0], PADDING)
        for parent, family in enumerate(grown):
            family.extend([dataclasses.replace(padding, parent=parent)] * (most - len(family)))
        return [*rows[:originals], *itertools.chain.from_iterable(grown)]

    def _log_rollout(self, rows: Sequence[Row], originals: int, metrics: Mapping[str, float]) -> None:
        thinking = [thinking_length(row.completion_ids, self.template.think_end_id) for row in rows[:originals]]
        mean = self.accelerator.gather(torch.tensor(thinking, device=self.accelerator.device)).float().mean().item()
        self.log_window_metric("thinking_tokens", mean)
        self.log_window_metric("rows_per_prompt", len(rows) / originals * self.num_generations)
        if metrics:
            values = torch.tensor([list(metrics.values())], device=self.accelerator.device)
            for name, value in zip(metrics, self.accelerator.gather(values).nanmean(0).tolist(), strict=True):
                self.log_window_metric(name, value)
        self._last_window = LastWindow(
            mean_length=self.last_metric("completions/mean_length"),
            truncated=self.last_metric("completions/clipped_ratio"),
            reward=weighted_sum(self._raw, self.reward_weights).nanmean().item(),
        )

    def _check_sampler(self, window: dict[str, Any]) -> None:
        """Refuse samples of another policy; log what TRL's correction of small differences lets through."""
        difference = self.last_metric("sampling/sampling_logp_difference/mean")
        agreement.refuse_disagreement(difference, self._most_difference, self.state.global_step)
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        kept = agreement.kept_by_length(window["importance_sampling_ratio"], packs.loss_mask(window), low, high)
        for name, share in kept.items():
            self.log_window_metric(f"sampling/kept/{name}", share)

    def _spread_over_added_rows(self, window: dict[str, Any], rows: Sequence[Row], originals: int) -> None:
        """Give added rows their parent's advantage, and keep them out of the divisors unless they are to count."""
        device = self.accelerator.device
        window["advantages"] = window["advantages"][torch.tensor([row.parent for row in rows], device=device)]
        for i, row in enumerate(rows):
            if row.advantage is not None:
                window["advantages"][i] = row.advantage
        counted = originals if self.normaliser == "thinking" else sum(row.kind != PADDING for row in rows)
        window["row_scale"] = torch.tensor(len(rows) / counted, device=device)
        if self.normaliser == "thinking":
            tokens = packs.loss_mask(window)[:originals].sum()
            window["num_items_in_batch"] = self.accelerator.gather(tokens).sum()

    def _credit_stages(self, window: dict[str, Any], local: Signals, world: Signals) -> None:
        """Run what acts on the scored window: credits, marks, bounds, weights, ratios, and what looks at it."""
        for stage in self.pipeline["credits"]:
            (advantages,) = self._on_window(stage, local, world, "advantages", neutral=0.0)
            self._refuse_token_credit_per_sequence(stage, advantages, local["mask"])
            window["advantages"] = advantages
        for stage in self.pipeline["marks"]:
            self._mark(stage, local, world)
        for stage in self.pipeline.stages("bounds", live=False):
            window["eps_low"], window["eps_high"] = self._on_window(stage, local, world, "eps_low", "eps_high")
        for stage in self.pipeline.stages("weights", live=False):
            for signals in (local, world):
                signals.put("weight", torch.ones_like(signals["advantages"]))
            bare, found = noted(stage)
            weights = non_negative(stage, *self._on_window(bare, local, world, "weight", neutral=1.0))
            self._log_metrics(found)
            window["advantages"] = per_token(window["advantages"], weights) * weights
            if self.pipeline.needs("weight"):
                window[CARRIED + "weight"] = window.get(CARRIED + "weight", 1.0) * weights
        for stage in self.pipeline.stages("ratios", live=False):
            (window["replaced_logps"],) = self._on_window(stage, local, world, "replaced_logps")
        for stage in self.pipeline.stages():
            if stage.observer and stage.live:
                for signals in (local, world):
                    signals.put(stage.observed, torch.zeros_like(signals["advantages"]))
                self._on_window(stage.observer, local, world, stage.observed, neutral=0.0)
            elif stage.observer:
                look(stage.observer, world)

    def _mark(self, stage: Stage, local: Signals, world: Signals) -> None:
        """Make the signal of a mark: 0 in rows on which it does not act."""
        bare, found = noted(stage, one_each=True)
        both = (local,) if world is local else (local, world)
        for signals in both:
            signals.put(stage.name, torch.zeros_like(signals["advantages"]))
        self._on_window(bare, local, world, stage.name)
        if found.get("per_row"):
            for signals in both:
                signals.put(stage.name, signals[stage.name][:, 0])

    def _on_window(
        self, stage: Stage, local: Signals, world: Signals, *names: str, neutral: float | None = None
    ) -> list[Tensor]:
        """Let a stage replace the signals `names`, each [B, T], on the rows it acts on; this rank's part of them.

        It sees the window of all ranks, unless it names what is never gathered. With `neutral`, that is what stands on
        tokens that are not trained and in rows without a reward, where a stage may well divide by zero (one that names
        published signals takes its rewards from there).
        """
        alone = not NEVER_GATHERED.isdisjoint(stage.needs)
        seen = local if alone else world
        values = act(stage, seen, *(seen[name] for name in names), kinds=seen["kind"])
        if neutral is not None:
            trained = seen["mask"] > 0
            if PUBLISHED.keys().isdisjoint(stage.needs):
                trained = trained & ~seen["rewards"].isnan().unsqueeze(1)
            values = tuple(finite(stage, value.masked_fill(~trained, neutral)) for value in values)
        rows, columns = local["mask"].shape
        start = 0 if seen is local else self.accelerator.process_index * rows
        mine = [value[start : start + rows, :columns].clone() for value in values]
        for name, value, own in zip(names, values, mine, strict=True):
            local.put(name, own)
            if world is not local:
                everyone = self.accelerator.pad_across_processes(value, dim=1) if alone else value
                world.put(name, self.accelerator.gather(everyone) if alone else value.clone())
        return mine

    def _refuse_token_credit_per_sequence(self, stage: Stage, advantages: Tensor, mask: Tensor) -> None:
        if self.importance_sampling_level == "sequence":
            highest = advantages.masked_fill(mask == 0, -torch.inf).amax(1)
            lowest = advantages.masked_fill(mask == 0, torch.inf).amin(1)
            if (highest > lowest).any():
                raise UserError(
                    f"trainer.importance_sampling_level: 'sequence' erases the per-token credit of {stage.key}; set it "
                    "to 'token' and add '+ratio=gspo_token'."
                )

    def _carry(self, window: dict[str, Any], local: Signals, *, added: bool) -> None:
        """Let the window signals that forward stages name ride along with the rows."""
        live = self.pipeline.stages(live=True)
        names = {name for stage in live for name in stage.needs if name not in LIVE and name not in FORWARD}
        for name in sorted(names | ({"kind"} if added and live else set())):
            window[CARRIED + name] = local[name]

    # Signals

    def _old_parts(self) -> frozenset[str]:
        """What the old-log-prob pass must give: forward stages have old log-probs of their own on-policy."""
        window_stages = self.pipeline.stages(live=False) + self.pipeline.observers
        parts = {part for part in ("entropy", "hidden", "appended") if self.pipeline.needs(f"old_{part}")}
        return frozenset(parts | {"logps" for stage in window_stages if "old_logps" in stage.needs})

    def _sampled_makers(self, inputs: Any, texts: Any, ids: Any, group: Any) -> dict[str, Callable[[], Any]]:
        return sampled_makers(
            inputs,
            texts,
            ids,
            group,
            think_end_id=self.template.think_end_id,
            ends=self._ends.union(self._thinking_ends),
            classes=self.classes,
            progress=self.progress,
            rng=self._rng,
        )

    def _published_makers(self, parents: list[int]) -> dict[str, Callable[[], Tensor]]:
        """What rows stages have published, for rows of these parents."""
        device = self.accelerator.device
        return {name: (lambda value=value: value.to(device)[parents]) for name, value in self._published.items()}

    def _refuse_unpublished(self, published: Mapping[str, Tensor]) -> None:
        for stage in self.pipeline.stages():
            for name in sorted(PUBLISHED.keys() & set(stage.needs) - published.keys()):
                raise UserError(
                    f"{stage.key}: no rows stage published '{name}'; add one that does with '+rows=...', or choose "
                    "the method whole with '+exp=...'."
                )

    def _local_signals(
        self,
        window: dict[str, Any],
        inputs: list[dict[str, Any]],
        rows: Sequence[Row],
    ) -> Signals:
        """Every signal of a scored window, for this rank's rows; an added row has its parent's published ones."""
        device = self.accelerator.device
        parents = [row.parent for row in rows]
        row_inputs = [inputs[parent] for parent in parents]
        ids = [row.completion_ids for row in rows]
        group = [parent // self.num_generations for parent in parents]
        old = Signals({"pass": lambda: self.old_pass(window, self._old_parts())})
        reference = Signals(
            {"pass": lambda: self.reference_pass(window, with_entropy=self.pipeline.needs("ref_entropy"))}
        )
        texts = functools.cache(lambda: self.decode(row_inputs, ids))
        makers = self._sampled_makers(row_inputs, texts, ids, group)
        return Signals(
            makers
            | self._published_makers(parents)
            | {
                "rewards": lambda: self._row_rewards(rows, len(inputs)),
                "correct": lambda: self._of_this_rank(self._correct(), len(inputs))[parents],
                "kind": lambda: [row.kind for row in rows],
                "parent": lambda: torch.tensor(parents, device=device),
                "ids": lambda: window["completion_ids"],
                "mask": lambda: packs.loss_mask(window),
                "advantages": lambda: per_token(window["advantages"], window["completion_ids"]),
                "old_logps": lambda: old["pass"].logps,
                "old_entropy": lambda: old["pass"].entropy,
                "old_hidden": lambda: old["pass"].hidden,
                "old_appended": lambda: old["pass"].appended,
                "ref_logps": lambda: reference["pass"][0],
                "ref_entropy": lambda: reference["pass"][1],
                SIGNAL: lambda: self.teacher_pass(window),
                "head": lambda: self.head,
                # what the token stages replace
                "eps_low": lambda: torch.full(window["completion_ids"].shape, float(self.epsilon_low), device=device),
                "eps_high": lambda: torch.full(window["completion_ids"].shape, float(self.epsilon_high), device=device),
                "replaced_logps": lambda: (
                    window["old_per_token_logps"] if "old_per_token_logps" in window else old["pass"].logps
                ),
            }
        )

    def _row_rewards(self, rows: Sequence[Row], originals: int) -> Tensor:
        """[B] reward of each row of this rank: an added row's own if it has one, else its (shaped) thinking row's."""
        totals = self._shaped if self._shaped is not None else weighted_sum(self._raw, self.reward_weights)
        own = self._of_this_rank(totals, originals)
        values = [float(own[row.parent]) if row.reward is None else row.reward for row in rows]
        return torch.tensor(values, dtype=totals.dtype, device=totals.device)

    def _correct(self) -> Tensor:
        """[N] whether each graded completion of the window, of every rank, is correct: by gold, or what replaces it."""
        if self._relabelled is not None:
            return self._relabelled
        return self._raw[:, correctness(self._function_names)] > 0.5

    def _of_this_rank(self, values: Tensor, originals: int) -> Tensor:
        start = self.accelerator.process_index * originals
        return values[start : start + originals]

    # Forward: live token stages, TRL's loss, auxiliary losses

    def step_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss of a micro-batch with the pipeline's bounds, weights, ratios and auxiliary losses."""
        scale = inputs.get("row_scale", 1.0) if self.loss_type in combinations.ROW_LOSSES else 1.0
        live = self.pipeline.stages(live=True) if model.training else []
        if not live and inputs.keys().isdisjoint(("eps_low", "replaced_logps")):
            loss = self.stock_loss(model, inputs)
            return loss * scale if "row_scale" in inputs else loss
        asked = {part for part in ("hidden", "appended") for stage in live if part in stage.needs}
        memo, found = self.forward(model, inputs, frozenset(asked))
        signals = self._live_signals(inputs, memo, found)
        inputs = self._token_stages(inputs, signals)
        bounds = self.epsilon_low, self.epsilon_high
        if "eps_low" in inputs:
            self.epsilon_low, self.epsilon_high = inputs["eps_low"], inputs["eps_high"]
        try:
            loss = self.stock_loss(model, inputs, memo) * scale
        finally:
            self.epsilon_low, self.epsilon_high = bounds
        for stage in self.pipeline["aux"]:
            loss = loss + self._auxiliary_loss(stage, signals, inputs)
        return loss

    def _live_signals(
        self, inputs: dict[str, Any], memo: tuple[Tensor, Tensor, Tensor | None], found: dict[str, Tensor]
    ) -> Signals:
        """Every signal of a micro-batch; `found` are those that its forward gave on demand."""
        logps, entropy, _ = memo
        old_logps = inputs.get("old_per_token_logps", logps.detach())
        carried = {
            name.removeprefix(CARRIED): (lambda value=value: value)
            for name, value in inputs.items()
            if name.startswith(CARRIED)
        }
        return Signals(
            {
                "kind": lambda: None,
                "mask": lambda: packs.loss_mask(inputs),
                "ids": lambda: inputs["completion_ids"],
                "advantages": lambda: per_token(inputs["advantages"], logps),
                "old_logps": lambda: old_logps,
                "progress": lambda: self.progress,
                "head": lambda: self.head,
                "logps": lambda: logps,
                "entropy": lambda: entropy,
                "hidden": lambda: found["hidden"],
                "appended": lambda: found["appended"],
                "ratio": lambda: torch.exp(logps - old_logps),
                "eps_low": lambda: inputs.get("eps_low", torch.full_like(logps.detach(), self.epsilon_low)),
                "eps_high": lambda: inputs.get("eps_high", torch.full_like(logps.detach(), self.epsilon_high)),
                "weight": lambda: torch.ones_like(logps.detach()),
            }
            | carried
        )

    def _token_stages(self, inputs: dict[str, Any], signals: Signals) -> dict[str, Any]:
        """Run the live bounds, weights and ratios; the micro-batch as TRL's loss is to see it."""
        inputs = dict(inputs)
        kinds = signals["kind"]
        for stage in self.pipeline.stages("bounds", live=True):
            for name, bound in zip(
                ("eps_low", "eps_high"),
                act(stage, signals, signals["eps_low"], signals["eps_high"], kinds=kinds),
                strict=True,
            ):
                inputs[name] = bound
                signals.put(name, bound)
        for stage in self.pipeline.stages("weights", live=True):
            bare, found = noted(stage)
            (weights,) = act(bare, signals, torch.ones_like(signals["logps"]), kinds=kinds)
            self._log_metrics(found)
            weights = weights.detach().masked_fill(signals["mask"] == 0, 1.0)
            weights = non_negative(stage, finite(stage, weights))
            inputs["advantages"] = per_token(inputs["advantages"], weights) * weights
            signals.put("weight", signals["weight"] * weights)
        replaced = inputs.get("replaced_logps", signals["old_logps"])
        for stage in self.pipeline.stages("ratios", live=True):
            (replaced,) = act(stage, signals, replaced, kinds=kinds)
        inputs["old_per_token_logps"] = replaced.detach()
        return inputs

    def _auxiliary_loss(self, stage: Stage, signals: Signals, inputs: dict[str, Any]) -> Tensor:
        """A scalar: the stage's unreduced loss, reduced as TRL reduces the policy loss, divided by the full mask."""
        bare, found = noted(stage, one_each=True)
        (values,) = act(bare, signals, torch.zeros_like(signals["logps"]), kinds=signals["kind"])
        self._log_metrics(found)
        steps = self.current_gradient_accumulation_steps
        if found.get("per_row"):
            row_share, loss_share = self._pack_shares
            return values[:, 0].mean() * inputs.get("row_scale", 1.0) * row_share / loss_share / steps
        window_tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        loss = packs.reduce_loss(
            values,
            signals["mask"],
            self.loss_type,
            max_length=self.max_completion_length,
            window_tokens=window_tokens / self.args.steps_per_generation,
        )
        scale = inputs.get("row_scale", 1.0) if self.loss_type in combinations.ROW_LOSSES else 1.0
        return loss * scale / steps

    def _log_metrics(self, found: Mapping[str, Any]) -> None:
        """Log what a stage gave beside its tensor, as `noted` puts it aside."""
        for name, value in found.get("metrics", {}).items():
            self.log_rank_metric(name, float(value))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch; with `pack_tokens`, of its last pack, the others having had their backward."""
        inputs, width = packs.unfold(inputs)
        family = torch.arange(len(inputs["completion_ids"]), device=self.accelerator.device) // width
        if self.packing == "rows" or width == 1:
            family = None
        if self.pack_tokens is None or not model.training:
            with self.families(family):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        *first, last = self._packs(inputs, 1 if family is None else width)
        total = 0.0
        for rows in first:
            with self.accelerator.no_sync(model):
                loss = self._pack_loss(model, rows, inputs, family)
                self.accelerator.backward(loss)
            total = total + loss.detach()
        return self._pack_loss(model, last, inputs, family) + total

    def _packs(self, inputs: dict[str, Any], width: int) -> list[Tensor]:
        """The rows of each pack, equally many on every rank; each `width` rows in succession stay together."""
        prompts, completions = packs.row_lengths(inputs)
        lengths = torch.stack([prompts, completions], 1)
        if width > 1:
            sizes = tree.sizes(inputs["completion_ids"], inputs["completion_mask"], width)
            lengths = torch.cat([prompts[::width].unsqueeze(1) + sizes[:, :1], sizes[:, 1:]], 1)
        order = lengths.sum(1).sort(descending=True, stable=True).indices
        longest = self.accelerator.gather(lengths[order]).view(-1, *lengths.shape).amax(0)
        within = torch.arange(width, device=order.device)
        return [
            (order[start:end].unsqueeze(1) * width + within).flatten()
            for start, end in packs.boundaries(*longest.T.tolist(), self.pack_tokens)
        ]

    def _pack_loss(self, model: nn.Module, rows: Tensor, whole: dict[str, Any], family: Tensor | None) -> Tensor:
        pack = packs.take(whole, rows)
        share = packs.share(self.loss_type, pack, whole)
        self._pack_shares = (len(rows) / whole["completion_ids"].size(0), share)
        try:
            with self.families(None if family is None else family[rows]):
                return super().compute_loss(model, pack) * share
        finally:
            self._pack_shares = (1.0, 1.0)

    # Evaluation, state, checks

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`evaluation`, or GRPOTrainer's loop, under a random state of its own: it never changes what is trained."""
        with forked_rng(self.args.seed):
            if self.evaluation is None:
                return super().evaluate(*args, **kwargs)
            found = {f"eval_{name}": value for name, value in self.evaluation(self).items()}
        self.log_apart(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def checkpoint_state(self) -> dict[str, Any]:
        """Stage state, the prompt stream's cursor, and what control stages have set and know of the last window."""
        last = dataclasses.asdict(self._last_window) if self._last_window else None
        return super().checkpoint_state() | {
            "stages": self.pipeline.state_dict(),
            "cursor": self.sampler.stream.cursor,
            "last_window": last,
            "clip": [self.epsilon_low, self.epsilon_high],
            "windows": self._windows,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Restore what `checkpoint_state` gave."""
        super().restore_state(state)
        self.pipeline.load_state_dict(state["stages"], on_change=self.on_change)
        self.sampler.stream.cursor = state["cursor"]
        self.epsilon_low, self.epsilon_high = state["clip"]
        self._windows = state["windows"]
        self._last_window = LastWindow(**state["last_window"]) if state["last_window"] else None

    def _packing(self, packing: str) -> str:
        """How rows are encoded: 'rows', 'tree' or 'flex'.

        Raises:
            UserError: an unknown word, or packed rows for a model that cannot.
        """
        if packing not in ("auto", "rows", "tree", "flex"):
            raise UserError(f"rollout.packing: '{packing}' is unknown; use 'auto', 'rows', 'tree' or 'flex'.")
        if packing == "rows" or not self.pipeline["rows"]:
            return "rows"
        flex = packing == "flex"
        reason = self.encode_families_once(flex=flex)
        if reason and packing != "auto":
            fix = "tree" if flex and self.encode_families_once() is None else "rows"
            raise UserError(f"rollout.packing: the model cannot encode packed rows: {reason}; set it to {fix}.")
        if reason:
            if self.accelerator.is_main_process:
                logger.warning("rollout.packing=auto: each added row is encoded whole (=rows), since %s.", reason)
            return "rows"
        return "flex" if flex else "tree"

    def _auto_pack_tokens(self) -> int | None:
        if not self.pipeline["rows"] or self.is_deepspeed_enabled:
            return None
        return self.args.per_device_train_batch_size * self.args.max_completion_length

    def _check(self) -> None:
        if self.normaliser not in ("thinking", "all"):
            raise UserError(f"rollout.normaliser: '{self.normaliser}' is unknown; use 'thinking' or 'all'.")
        if self.pack_tokens is not None and self.pack_tokens < 1:
            raise UserError(f"rollout.pack_tokens: {self.pack_tokens} holds no row; use a positive number or null.")
        if self.pack_tokens is not None and (
            self.top_entropy_quantile < 1 or self.entropy_coef or self.use_adaptive_entropy
        ):
            raise UserError(
                "rollout.pack_tokens: TRL's top_entropy_quantile and entropy_coef are statistics of a whole "
                "micro-batch; use '+weight=forks' and '+aux=entropy_bonus' instead, or set rollout.pack_tokens=null."
            )
        if self.pack_tokens is not None and self.is_deepspeed_enabled:
            raise UserError(NO_PACKS)
        if self.args.sync_ref_model and self.splits_weights:
            raise UserError(NO_FOLLOWING)
        if self.pipeline["rows"] and self.runs_tools:
            raise UserError(f"{self.pipeline['rows'][0].key}: rows stages cannot replay tools or rollout functions.")
        if self.needs_reference and not self.has_reference:
            raise UserError(
                f"trainer.beta: a stage names '{self._reference_signal}', and the reference of a model made in memory "
                "is known with beta > 0 only; set trainer.beta=1e-6, or load the model from a folder."
            )
        if self.teacher is None:
            refuse_missing(self.pipeline)
        if self.pipeline.needs("head") and not self.has_plain_head:
            raise UserError(
                "model.path: a stage names 'head', but this model caps or scales its logits, or ZeRO-3 splits its head "
                "over ranks; leave the stage out, or choose another model, or FSDP2."
            )
        if self.aux_loss_enabled and (self.pack_tokens is not None or self.pipeline["rows"]):
            raise UserError(
                "trainer.router_aux_loss_coef: the router loss of a mixture of experts would be counted once per pack "
                "and for added rows too; set it to 0, or leave out rollout.pack_tokens and rows stages."
            )
        if self.appended_id is None and (self.pipeline.needs("appended") or self.pipeline.needs("old_appended")):
            raise UserError(
                "model.appended: a stage names the signal 'appended' or 'old_appended'; set a token of the tokenizer "
                "that the model never writes, such as '<|vision_start|>' of Qwen's."
            )
        if self.pipeline.needs("answers") and self.classes is None:
            raise UserError(NO_CLASSES)
        if {"image", "images"} & set(self.train_dataset.column_names or ()):
            raise UserError(
                "data: the data set has an image column, and rltoken trains on text only; remove the column."
            )


def replay_of(rollout: Rollout, ends: tuple[int, ...]) -> Replay:
    """What TRL's window code is to see of a finished rollout; `ends` complete a completion too."""
    rows, originals = rollout.rows, len(rollout.inputs)
    masks = [row.train_mask for row in rows]
    logps = None if rows[0].logps is None else [row.logps or [None] * len(row.completion_ids) for row in rows]
    return Replay(
        texts=rollout.texts,
        completion_ids=[row.completion_ids for row in rows[:originals]],
        logps=None if logps is None else logps[:originals],
        all_prompt_ids=[row.prompt_ids for row in rows],
        all_completion_ids=[row.completion_ids for row in rows],
        all_logps=logps,
        all_masks=None if all(map(all, masks)) else masks,
        rewards=rollout.rewards,
        extras=rollout.extras,
        ends=ends,
    )


def originals_as_rows(completion_ids: Sequence[list[int]]) -> list[Row]:
    """The rows of a window that no rows stage has seen."""
    return [Row([], ids, [1] * len(ids), parent=i) for i, ids in enumerate(completion_ids)]
