"""Checkpoints that are whole or absent, and a resume as if nothing had happened: the private names that this takes.

A checkpoint is written into a scratch folder by transformers' own code, gets a file of each rank with what transformers
and TRL leave out (the window and its step phase, sums since the last log, stage state), then its manifest, then its
place (`rltoken.resume`). A failure on one rank ends the save on all of them.

`WholeCheckpoints` is what any trainer needs for that, `SavingTrainer` and `SupervisedTrainer` add what TRL's GRPO and
SFT trainers keep besides.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer, SFTTrainer
from trl.trainer.utils import RepeatSampler

from rltoken import identity, resume, rng
from rltoken.errors import UserError, first_line
from rltoken.trl_steps import FiniteSteps

# With several processes on CPUs transformers loads the optimizer to "cpu:0", a place that torch does not know.
torch.serialization.register_package(
    50, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)

REFERENCE = "rltoken_reference.pt"
"""The file of a reference model that follows the policy (trainer.sync_ref_model)."""
SAMPLED = 1000
"""About so many numbers of each weight tell it from another: reading all would take seconds at every start."""
TABLES = ("prompt", "completion", "advantages")
"""Columns of TRL's table of completions; reward functions' own stand below `rewards` and `extra`."""


class _Calls(TrainerCallback):
    """Calls functions when training begins (after a checkpoint is loaded transformers clears sums) and each step."""

    def __init__(self, at_train_begin: Callable[[], None], at_step_begin: Callable[[], None]) -> None:
        self._at_train_begin, self._at_step_begin = at_train_begin, at_step_begin

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Call the one."""
        self._at_train_begin()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Call the other, before the step's first window."""
        self._at_step_begin()


class WholeCheckpoints:
    """What makes the checkpoints of a trainer of TRL, the next class in line, whole or absent."""

    on_change = "refuse"
    """'refuse' or 'accept' a checkpoint of other data or of another number of processes."""
    record: Mapping[str, Any] = {}
    """What else a checkpoint says of whom it belongs to (`rltoken.identity.changed`)."""
    notes_steps = False
    """Whether `save_last_step` is to be possible: in the middle of a step more has changed than a checkpoint holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._scratch: Path | None = None
        self._sums: Mapping[str, Any] | None = None
        self._noted: dict[str, Any] | None = None
        self._rewound: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_Calls(self._begin, self._note_step))

    @property
    def frozen_models(self) -> list[nn.Module]:
        """Models besides TRL's reference that the numbers of a run depend on and that are never trained."""
        return []

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this rank besides TRL's state: tensors and plain containers."""
        return {}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Restore what `checkpoint_state` gave."""

    def _begin(self) -> None:
        self._restore_sums()
        settle_buckets(self.model_wrapped)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """TRL's model card, with folders where TRL, for want of hub ids, writes None."""
        try:
            self._write_model_card(model_name, dataset_name, tags)
        except OSError:  # a full disk is told by what is saved after the card: rank 0 must come to the same collectives
            if self._scratch is None:
                raise

    def _write_model_card(self, *arguments: Any) -> None:
        super().create_model_card(*arguments)
        path = Path(self.args.output_dir) / "README.md"
        if self.accelerator.is_main_process and path.exists():
            text = path.read_text(encoding="utf-8")
            source = self.model.config._name_or_path or "a model made in memory"
            text = text.replace("[None](https://huggingface.co/None)", f"`{source}`")
            path.write_text(text.replace('model="None"', f'model="{path.parent / "final"}"'), encoding="utf-8")

    def save_last_step(self) -> None:
        """Save the last finished step from the middle of the next one, as if that had not begun.

        Every rank must call it. Before the first step there is nothing to save.
        """
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self._noted is None or self.state.global_step == 0 or (folder / resume.MANIFEST).exists():
            return
        rng.put_back(self._noted["rng"])
        self.state.num_input_tokens_seen, self._rewound = self._noted["tokens"], self._noted["left_out"]
        self._save_checkpoint(self.model, trial=None)

    # Saving

    def _note_step(self) -> None:
        """Note what the step that begins will change besides weights; stage state is changed in place, so copied."""
        if self.notes_steps:
            self._noted = {
                "rng": rng.states(),
                "tokens": self.state.num_input_tokens_seen,
                "left_out": self._left_out() | {"extra": copy.deepcopy(self.checkpoint_state())},
            }

    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial=trial))
        final = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        scratch = run / resume.SCRATCH / final.name
        with self._all_or_none(final):
            if self.args.should_save:
                resume.prepare(scratch)
        with self._all_or_none(final), self._saving_in(scratch.parent):
            super()._save_checkpoint(model, trial)
            self._save_what_is_left_out(scratch)
        self._note_best(final)
        with self._all_or_none(final):
            if self.args.should_save:
                self.state.save_to_json(str(scratch / TRAINER_STATE_NAME))
                facts = {"versions": identity.versions(), "weights_only": self.args.save_only_model}
                resume.write_manifest(
                    scratch,
                    step=self.state.global_step,
                    processes=self.accelerator.num_processes,
                    **facts | self.belongings | self.record,
                )
                resume.publish(scratch, final)
                best = self.state.best_model_checkpoint
                resume.rotate(run, self.args.save_total_limit, [final, *([Path(best)] if best else [])])
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _left_out(self) -> dict[str, Any]:
        """What transformers and TRL leave out of a checkpoint, as it is now."""
        return {"sums": self._sums_since_the_last_log(), "extra": self.checkpoint_state()}

    def _save_what_is_left_out(self, folder: Path) -> None:
        state = self._rewound or self._left_out()
        (folder / self._state_file).write_bytes(_loadable(state))

    @contextlib.contextmanager
    def _all_or_none(self, final: Path) -> Iterator[None]:
        """A part of a save that every rank has done when the context ends; a failure on one ends it on all of them."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        told = resume.not_written(failure, final, final.parent) if failure else None
        failed = torch.tensor([failure is not None], device=self.accelerator.device)
        if not bool(self.accelerator.gather(failed).any()):
            return
        if self.args.should_save:
            shutil.rmtree(final.parent / resume.SCRATCH, ignore_errors=True)
        if failure is None:
            raise UserError(f"runs_dir: {final} could not be written by another process, whose message says why.")
        if told is None:
            raise failure
        raise told from failure

    @contextlib.contextmanager
    def _saving_in(self, folder: Path) -> Iterator[None]:
        """Let transformers take a folder for the run directory, know of no best step to wait for, remove nothing."""
        best, limit = self.state.best_global_step, self.args.save_total_limit
        self._scratch, self.state.best_global_step, self.args.save_total_limit = folder, None, None
        try:
            yield
        finally:
            self._scratch, self.state.best_global_step, self.args.save_total_limit = None, best, limit

    def _note_best(self, final: Path) -> None:
        """Note the folder of the best step, if that was saved, as transformers does before it saves the state."""
        if self.state.best_global_step:
            best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._scratch is None else str(self._scratch)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._scratch is None:  # what is uploaded must stay where it is
            super()._push_from_checkpoint(checkpoint_folder)

    def _sums_since_the_last_log(self) -> dict[str, Any]:
        """What the next log will average over or show, as plain values."""
        return {
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "loss": self._tr_loss.item(),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
        }

    # Resuming

    def _run_epoch(self, **kwargs):
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:  # resumed from the last step: transformers would train one more where the epoch has more
            self.control.should_training_stop = True

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            self._load_what_is_left_out(Path(checkpoint))

    def _issue_warnings_after_load(self, load_result):
        tied = getattr(self.model, "all_tied_weights_keys", {})  # saved once, under the name of what they are tied to
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_what_is_left_out(self, folder: Path) -> None:
        best = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.exists():  # the run directory may have been moved
            self.state.best_model_checkpoint = str(best)
        if not (folder / resume.MANIFEST).exists():  # a checkpoint of plain TRL
            return
        manifest, now = resume.read_manifest(folder), dict(self.belongings)
        if self.on_change == "refuse":  # else it was told when the checkpoint was chosen
            now["processes"] = self.accelerator.num_processes
        identity.accept_or_refuse(str(folder), identity.changed(manifest, now), self.on_change)
        ranks = manifest["processes"]
        same = ranks == self.accelerator.num_processes
        state = self._load(folder / (self._state_file if same else "rltoken_0.pt"))
        if same:
            self._put_back(state)
        self.restore_state(state["extra"])

    def _put_back(self, state: Mapping[str, Any]) -> None:
        """Restore what `_left_out` gave on this rank."""
        self._sums = state["sums"]

    def _load(self, path: Path) -> Any:
        return torch.load(path, map_location=self.accelerator.device, weights_only=True)

    def _restore_sums(self) -> None:
        """Put back what `_sums_since_the_last_log` gave, once."""
        sums, self._sums = self._sums, None
        if sums is None:
            return
        self._metrics["train"].update(sums["metrics"])
        self._tr_loss += sums["loss"]
        self._total_loss_scalar, self._globalstep_last_logged = sums["logged_loss"], sums["logged_step"]
        self._restore_other_sums(sums)

    def _restore_other_sums(self, sums: Mapping[str, Any]) -> None:
        """Put back what a trainer adds to these sums."""

    @property
    def _state_file(self) -> str:
        return f"rltoken_{self.accelerator.process_index}.pt"

    @property
    def _references(self) -> list[nn.Module]:
        """Models that are trained from, and do not change."""
        return []

    @functools.cached_property
    def belongings(self) -> dict[str, str | None]:
        """Digests of what a checkpoint does not hold: the data, and weights that are not trained.

        `problems`, those evaluated before and after, are of the record, where it has them.
        """
        apart = self.eval_dataset
        data = {"data": [self.train_dataset], "eval_data": [*apart.values()] if isinstance(apart, dict) else [apart]}
        digests = {
            name: identity.digest_of_rows(itertools.chain(*parts))
            if all(isinstance(p, Dataset) for p in parts)
            else None
            for name, parts in data.items()
        }
        return digests | {"frozen": self._frozen_digest(), "problems": self.record.get("problems")}

    def _frozen_digest(self) -> str | None:
        """What identifies an adapter's base, a teacher, a reference that does not follow; None in shards."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return None
        frozen = [value for value in self.model.parameters() if not value.requires_grad]
        frozen += [value for model in [*self._references, *self.frozen_models] for value in model.parameters()]
        return sampled_digest(frozen)

    def digest_of_weights(self) -> str:
        """What identifies the weights that this rank has loaded, before they are split over ranks."""
        return sampled_digest(self.model.parameters())


def sampled_digest(weights: Iterable[Tensor]) -> str:
    """A digest of up to `SAMPLED` evenly spaced numbers of each tensor."""
    digest = hashlib.sha256()
    for value in weights:
        some = value.detach().flatten()[:: max(1, value.numel() // SAMPLED)]
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class SavingTrainer(FiniteSteps, WholeCheckpoints, GRPOTrainer):
    """GRPOTrainer whose checkpoints are whole or absent and resume exactly, and whose steps are finite."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._order: Any = None
        super().__init__(*args, **kwargs)

    def _left_out(self) -> dict[str, Any]:
        return {"step": self._step, "window": self._buffered_inputs, **super()._left_out()}

    def _put_back(self, state: Mapping[str, Any]) -> None:
        super()._put_back(state)
        self._step, self._buffered_inputs = state["step"], state["window"]

    def _save_what_is_left_out(self, folder: Path) -> None:
        super()._save_what_is_left_out(folder)
        if self.args.sync_ref_model and self.args.should_save:
            torch.save(self.accelerator.unwrap_model(self.ref_model).state_dict(), folder / REFERENCE)

    def _load_what_is_left_out(self, folder: Path) -> None:
        self._skip_finished_epochs(TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).epoch)
        super()._load_what_is_left_out(folder)
        if (folder / REFERENCE).exists():
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(self._load(folder / REFERENCE))

    def _sums_since_the_last_log(self) -> dict[str, Any]:
        tables = {name: list(self._logs[name]) for name in TABLES}
        for name in ("rewards", "extra"):
            tables[name] = {column: [_plain(value) for value in values] for column, values in self._logs[name].items()}
        return super()._sums_since_the_last_log() | {"tables": tables if self.log_completions else None}

    def _restore_other_sums(self, sums: Mapping[str, Any]) -> None:
        for name, values in (sums["tables"] or {}).items():
            if isinstance(values, dict):
                for column, column_values in values.items():
                    self._logs[name][column].extend(column_values)
            else:
                self._logs[name].extend(values)

    def _get_train_sampler(self, dataset=None):
        self._order = super()._get_train_sampler(dataset)
        return self._order

    def _skip_finished_epochs(self, epochs: float) -> None:
        """Draw the orders of the epochs that are over: TRL's sampler draws one per pass, and begins with the first."""
        if isinstance(self._order, RepeatSampler) and self._order.shuffle:
            for _ in range(int(epochs)):
                torch.randperm(self._order.num_samples, generator=self._order.generator)

    @property
    def _references(self) -> list[nn.Module]:
        if self.ref_model is None or self.args.sync_ref_model:
            return []
        return [self.accelerator.unwrap_model(self.ref_model)]


class SupervisedTrainer(FiniteSteps, WholeCheckpoints, SFTTrainer):
    """SFTTrainer whose checkpoints are whole or absent and resume exactly, and whose steps are finite."""

    def _sums_since_the_last_log(self) -> dict[str, Any]:
        return super()._sums_since_the_last_log() | {"tokens": self._total_train_tokens}

    def _restore_other_sums(self, sums: Mapping[str, Any]) -> None:
        self._total_train_tokens = sums["tokens"]


def settle_buckets(model: nn.Module) -> None:
    """Let DDP arrange its buckets before the first step, by a backward of one token that comes to nothing.

    By itself it adds up the gradients of a process's first step in one bucket, and those of all later steps in others.
    Sums over three ranks or more are rounded by their place in a bucket, so that a resumed run, whose first step is not
    the run's, would not be the same.

    Args:
        model: as accelerate has wrapped it; what is not DDP, or has fewer ranks, is left alone.
    """
    if not isinstance(model, DistributedDataParallel) or dist.get_world_size(model.process_group) < 3:
        return
    training = model.training
    model.eval()  # dropout would draw
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    (model(input_ids=token).logits.sum() * 0).backward()
    model.zero_grad(set_to_none=True)
    model.train(training)


def _plain(value: Any) -> Any:
    """A logged value as something that loads without unpickling: numbers of numpy and torch as Python's own."""
    if isinstance(value, Tensor) or hasattr(value, "item"):
        return value.item()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _loadable(state: dict[str, Any]) -> bytes:
    """The state as a file that loads without unpickling arbitrary objects.

    Raises:
        UserError: it would not load again.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        raise UserError(
            "method: a checkpoint of this window could not be loaded again: a stage's state_dict, or a column that a "
            f"forward stage names through 'inputs', holds more than tensors and plain values ({first_line(error)}); "
            "convert it."
        ) from error
    return buffer.getvalue()
