"""The supervised stage of a run: TRL's SFTTrainer on whole completions, in RUN/sft, before the reinforcement.

data.traces -> the tokens that sampling would see -> train or resume -> RUN/sft/final, with which GRPO begins. The stage
takes the model, the adapter and the hardware of the run; its own settings stand under `sft.trainer`. It is finished
once `final` is there, and then never repeated.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from datasets import Dataset
from hydra.utils import instantiate
from omegaconf import DictConfig

from rltoken import adapters, config, merge, models, parts, ranks, runs
from rltoken.callbacks import SUPERVISED, MetricsFile, ProgressLine, StopWhenAsked
from rltoken.errors import UserError

THINK_START = "<think>"
"""What opens the thinking, in chat templates and in stored traces."""

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from rltoken.preemption import Notice


def arguments(cfg: DictConfig, run: Path) -> SFTConfig | None:
    """TRL's arguments of the stage; None where there is none. Nothing is loaded.

    Raises:
        UserError: a value or a combination that makes no sense, or a checkpoint of this stage to go on from by name.
    """
    if cfg.sft.traces is None:
        return None
    folder = run / runs.SUPERVISED
    if cfg.resume not in (None, "auto"):
        if Path(cfg.resume).absolute().parent.name == runs.SUPERVISED:
            raise UserError(f"resume: {cfg.resume} is one of the supervised stage; set resume=auto to go on in that.")
        if not (folder / "final").is_dir():
            raise UserError(
                f"resume: the supervised stage in {folder} is not finished, and what was named comes after it; set "
                "resume=auto, or sft=none."
            )
    if cfg.sft.merge and cfg.model.lora is None and cfg.model.get("adapter") is None:
        raise UserError(
            "sft.merge: all weights are trained, so there is nothing to merge; add +lora=default, or set false."
        )
    return config.to_sft_config(cfg.sft.trainer, output_dir=str(folder), seed=cfg.seed)


def start(cfg: DictConfig, run: Path, lora: LoraConfig | None, notice: Notice) -> str | None:
    """The folder of the model, or adapter, that the stage makes or has made; None where there is no such stage.

    Args:
        cfg: the whole configuration.
        run: the open run directory.
        lora: a new adapter to train; None trains all weights, or the adapter that is given.
        notice: whether the run is to leave.

    Raises:
        UserError: whatever the user can mend.
        Preempted: the run was told to leave; the step is saved.
    """
    args = arguments(cfg, run)
    if args is None:
        return None
    final = run / runs.SUPERVISED / "final"
    if not final.is_dir():
        _train(cfg, run, args, lora, notice, final)
        gc.collect()  # the trainer, its optimizer and its model hang together in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return str(final)


def _train(cfg: DictConfig, run: Path, args: SFTConfig, lora: LoraConfig | None, notice: Notice, final: Path) -> None:
    from rltoken.cli import leave_terminal_to_us
    from rltoken.train import from_first_rank, saved, settle_callbacks
    from rltoken.trl_saving import SupervisedTrainer

    leave_terminal_to_us()
    found = runs.checkpoint(run, cfg, runs.SUPERVISED) if runs.is_main_process() else None
    with PartialState().main_process_first():
        traces = instantiate(cfg.sft.traces)  # first: a mistake in it is told before a model is made
        path = parts.source(cfg.model)
        tokenizer = parts.tokenizer(cfg.model, path)
        rows = encoded(traces, tokenizer)
    final.parent.mkdir(exist_ok=True)
    with ProgressLine(label="supervised", shown=SUPERVISED) as progress:
        trainer = SupervisedTrainer(
            model=parts.model(cfg.model, path, trainable=True),
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=None if adapters.is_adapter(path) else lora,
            callbacks=[MetricsFile(final.parent / "metrics.jsonl"), progress, StopWhenAsked(notice)],
        )
        trainer.on_change, trainer.record = cfg.on_change, runs.record(run, cfg)
        trainer.max_skipped_steps = cfg.trainer.max_skipped_steps
        settle_callbacks(trainer)
        ranks.refuse_other_loads(trainer)
        with notice.steps(lambda: f"in the supervised stage {saved(final.parent, trainer.state)}"):
            trainer.train(resume_from_checkpoint=from_first_rank(found))
    _publish(trainer, cfg, final)
    trainer.accelerator.free_memory()


def _publish(trainer: Any, cfg: DictConfig, final: Path) -> None:
    """Write the model beside its place, then rename: one that is there is whole, and means that the stage is over."""
    partial = final.with_suffix(".partial")
    if runs.is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if runs.is_main_process():
        if cfg.sft.merge:
            dtype = str(models.torch_dtype(cfg.model.dtype)).removeprefix("torch.")
            base, trusted = parts.base_of(cfg.model, str(partial)), cfg.model.trust_remote_code
            merge.write_merged(str(partial), base, final, dtype=dtype, trust_remote_code=trusted)
            shutil.rmtree(partial)
        else:
            partial.rename(final)
    trainer.accelerator.wait_for_everyone()


def encoded(traces: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids as sampling sees and makes them, for TRL to take as they are.

    Left to TRL, a completion would pass the chat template as a message, and those of R1 and Qwen3 drop the thinking.

    Args:
        traces: with `prompt` (conversational) and `completion` (text).
        tokenizer: whose chat template opens the completion, and whose end of sequence closes it.

    Returns:
        Columns `input_ids` and `completion_mask` (1 on the completion and on the token that ends it).
    """
    opened = tokenizer.apply_chat_template(traces["prompt"][:], add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(opened, add_special_tokens=False)["input_ids"]
    texts = [
        # a template may open the thinking, and a stored trace too
        text.lstrip().removeprefix(THINK_START).removeprefix("\n") if shown.rstrip().endswith(THINK_START) else text
        for shown, text in zip(opened, traces["completion"], strict=True)
    ]
    completions = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    pairs = list(zip(prompts, completions, strict=True))
    return Dataset.from_dict(
        {
            "input_ids": [prompt + completion for prompt, completion in pairs],
            "completion_mask": [[0] * len(prompt) + [1] * len(completion) for prompt, completion in pairs],
        }
    )
