"""Train a reasoning model: `python -m rltoken.train +exp=grpo`; `--help` explains the rest.

compose -> check -> run directory -> supervised stage, if any -> data, tokenizer, model -> evaluate -> train or resume
-> evaluate -> report.
Nothing is loaded before the configuration has been checked. What a user can mend ends in one line and exit status 2,
a run that was told to leave (docs/resume.md) in one line and exit status 75.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rltoken import adapters, cli, config, identity, launching, logs, preemption, runs
from rltoken.errors import SharedError, UserError
from rltoken.resume import disk_errors_told
from rltoken.watch import watched

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback, TrainerState

    from rltoken.evals.during import Evaluation

OF_ROLLOUT = ("pack_tokens", "batch_rows", "packing", "normaliser", "max_logp_difference", "patience")
"""Keys of `rollout` that are the trainer's under the same name."""


def main() -> None:
    """The entry point."""
    told = "interrupted; the same command with resume=auto goes on from the last checkpoint"
    cli.main(_start, "config", config.TOP_LEVEL, told)


def _start() -> None:
    refuse_shared_directories(sys.argv[1:])
    _job()


def refuse_shared_directories(arguments: Sequence[str]) -> None:
    """Refuse a sweep of which a later job would find its run directory taken by an earlier one.

    Raises:
        UserError: a name is given that is the same for several jobs.
    """
    name = next((item for item in arguments if item.startswith("name=")), None)
    if {"--multirun", "-m"}.isdisjoint(arguments) or name is None or "${hydra" in name:
        return
    try:
        given = OverridesParser.create().parse_overrides([item for item in arguments if "=" in item and item[0] != "-"])
        values = [
            [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
            if item.is_sweep_override()
            else [item.input_line]
            for item in given
        ]
        with initialize_config_module(cli.CONFIG_MODULE, version_base="1.3"):
            jobs = [compose("config", overrides=list(job)) for job in itertools.product(*values)]
        folders = [f"{job.runs_dir}/{job.name}" for job in jobs if job.name is not None]
    except (HydraException, OmegaConfBaseException):
        return  # the sweep itself will say what is wrong
    if folder := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise UserError(
            f"name: {folders.count(folder)} jobs of the sweep would share the run directory {folder}; leave name "
            "out, or tell them apart by what is swept: name='x-${seed}'."
        )


@hydra.main(config_path=f"pkg://{cli.CONFIG_MODULE}", config_name="config", version_base="1.3")
def _job(cfg: DictConfig) -> None:
    with launching.slurm_job() as may_be_again:
        if may_be_again:
            cfg.resume = cfg.resume or "auto"
        cli.attempt(lambda: named_run(cfg))


def named_run(cfg: DictConfig) -> None:
    """One run in its directory.

    Raises:
        UserError: as `run`, or no method is chosen.
    """
    adapters.settle(cfg)
    config.check_keys(cfg)
    chosen = HydraConfig.get()
    if not chosen.runtime.choices.get("exp") and not any(cfg.method.values()):
        raise UserError("method: nothing chosen; add +exp=grpo (plain GRPO) or another; --help lists them.")
    if cfg.name is None:
        written = OmegaConf.to_container(chosen.overrides.task, resolve=False)  # as a sweep hands them on
        cfg.name = runs.default_name(chosen.runtime.choices, cfg.seed, written)
    run(cfg, Path(cfg.runs_dir) / str(cfg.name))


def run(cfg: DictConfig, folder: Path) -> None:
    """One run, from the checks to the report.

    Raises:
        UserError: whatever the user can mend.
        Preempted: SIGTERM or SIGUSR1 came, or trainer.max_hours are over.
    """
    from rltoken import ranks, report
    from rltoken.evals.during import configured

    if cfg.resume == "auto" and (done := runs.finished(folder, cfg)):
        if runs.is_main_process():
            print(f"{folder} is finished; its results:")
            report.show(done)
            print(f"picture: {folder / 'report.png'}. To train anew, choose another name=... or remove the folder.")
        return
    pipeline, args, lora = checked(cfg, folder)
    during = configured(cfg)
    ranks.refuse_differences(ranks.facts(cfg))
    with contextlib.ExitStack() as held:
        with ranks.together():
            held.enter_context(runs.alone(folder))
            checkpoint = runs.checkpoint(folder, cfg) if runs.is_main_process() else None
            runs.open_run(folder, cfg, [sys.executable, "-m", "rltoken.train", *sys.argv[1:]])
        with ranks.together():
            runs.refuse_unseen(folder, from_first_rank(runs.run_id(folder)))
        held.enter_context(logs.kept(folder))
        train(cfg, folder, pipeline, args, lora, during, checkpoint)


def train(
    cfg: DictConfig,
    folder: Path,
    pipeline: Any,
    args: Any,
    lora: Any,
    during: Mapping[str, DictConfig],
    checkpoint: str | None,
) -> None:
    """The supervised stage if there is one, evaluate, train, evaluate and report in an open run directory.

    Args:
        pipeline, args, lora: from `checked`.
        during: what to evaluate during training, from `rltoken.evals.during.configured`.
        checkpoint: where to go on from; rank 0 decides.

    Raises:
        UserError: whatever the user can mend.
        Preempted: SIGTERM or SIGUSR1 came, or trainer.max_hours are over.
    """
    from rltoken import supervised
    from rltoken.callbacks import ProgressLine, StopWhenAsked
    from rltoken.evals.during import Evaluation
    from rltoken.faults import broken_weights_told, memory_told

    with (
        watched(folder, args.ddp_timeout) as watch,
        memory_told(lambda: watch.step()),
        disk_errors_told(folder),
        _traceback_kept(folder),
        preemption.noticed(cfg.trainer.max_hours) as notice,
        ProgressLine() as progress,
        contextlib.ExitStack() as at_the_end,
    ):
        try:
            begun = supervised.start(cfg, folder, lora, notice)
            callbacks = [progress, StopWhenAsked(notice)]
            between = Evaluation(during, folder, progress.paused) if during else None
            trainer, evaluation = assemble(cfg, folder, pipeline, args, lora, callbacks, between, begun)
        except (UserError, InstantiationException) as error:
            if {UserError, SharedError} & {type(error), type(error.__cause__)}:
                runs.discard(folder)
            raise
        at_the_end.callback(trainer.close)
        watch.step = lambda: trainer.state.global_step + 1 if trainer.is_in_train else 0
        at_the_end.enter_context(broken_weights_told(trainer.model, watch.step))
        checkpoint = from_first_rank(checkpoint)
        args.eval_on_start &= checkpoint is None  # the start was evaluated when there was one
        with notice.sampler_kept():
            before = evaluation("before", known=checkpoint is not None) if cfg.eval.before else None
        with notice.steps(lambda: saved(folder, trainer.state)), notice.sampler_kept(trainer.save_last_step):
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(folder / "final"))
        with notice.sampler_kept():
            after = evaluation("after") if cfg.eval.after else None
        if trainer.accelerator.is_main_process:
            finish(folder, {"name": cfg.name, "before": before, "after": after, "steps": trainer.state.global_step})


def saved(folder: Path, state: TrainerState) -> str:
    """What of a run that leaves after some steps is kept, for its message."""
    path = folder / f"checkpoint-{state.global_step}"
    kept = f"saved in {path}" if path.exists() else "not saved (see trainer.save_strategy)"
    kept = kept if state.global_step else "before anything was learned"
    return f"at step {state.global_step} of {state.max_steps}, {kept}"


def from_first_rank(value: str | None) -> str | None:
    """What rank 0 found, on every rank."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def checked(cfg: DictConfig, folder: Path) -> tuple[Any, Any, Any]:
    """The pipeline, TRL's arguments and the adapter's configuration, checked against each other; nothing is loaded.

    Raises:
        UserError: a combination that makes no sense.
    """
    from rltoken import combinations, supervised, teachers
    from rltoken.evals import prompts
    from rltoken.pipeline import build

    OmegaConf.resolve(cfg)
    prompts.settle(cfg.eval, OmegaConf.select(cfg, "method.prompts") or {})
    config.check_values(cfg)
    environment = launching.asked(os.environ, cfg.trainer)
    launching.refuse_unsharded(environment, on_cpu=cfg.trainer.use_cpu)
    args = config.to_grpo_config(cfg.trainer, output_dir=str(folder), seed=cfg.seed)
    launching.refuse_apart(os.environ, args.world_size)
    pipeline = build(instantiate(cfg.method, _convert_="object"))
    launching.refuse_split(environment, args, pipeline, cfg.rollout.pack_tokens)
    combinations.check(pipeline, args, warn=False)  # the trainer checks it too, and warns where the run's log has it
    teachers.check(cfg, pipeline, args)
    supervised.arguments(cfg, folder)
    return pipeline, args, adapters.lora(cfg.model.lora)


def assemble(
    cfg: DictConfig,
    folder: Path,
    pipeline: Any,
    args: Any,
    lora: Any,
    callbacks: Sequence[TrainerCallback],
    between: Evaluation | None = None,
    begun: str | None = None,
) -> tuple[Any, Any]:
    """Load data, tokenizer and model; the trainer, and `evaluated` but for its phase.

    Args:
        pipeline, args, lora: from `checked`.
        callbacks: besides those that write.
        between: what to evaluate during training.
        begun: the model, or the adapter to train further, that the supervised stage made.

    Raises:
        UserError: something cannot be loaded, or not be evaluated as it is sampled.
    """
    from rltoken import parts, ranks
    from rltoken.callbacks import MetricsFile
    from rltoken.evals.during import KeptEvaluations
    from rltoken.trainer import TokenGRPOTrainer

    cli.leave_terminal_to_us()
    path, tokenizer, train, evaluation, apart = loaded(cfg, between, begun)
    teacher = parts.teacher(cfg, pipeline, tokenizer)
    funcs, weights, classes = parts.rewards(cfg.reward)
    args.reward_weights = weights or args.reward_weights
    refuse_unserved(cfg, args, path)
    refuse_unlabelled(cfg, pipeline, funcs)
    trainer = TokenGRPOTrainer(
        model=parts.model(cfg.model, path, trainable=True),
        reward_funcs=list(funcs.values()),
        args=args,
        train_dataset=train,
        eval_dataset=apart,
        processing_class=tokenizer,
        peft_config=None if begun and (cfg.sft.merge or adapters.is_adapter(begun)) else lora,
        callbacks=[MetricsFile(folder / "metrics.jsonl"), KeptEvaluations(folder), *callbacks],
        pipeline=pipeline,
        template=parts.template(cfg.model, tokenizer),
        appended_id=parts.appended(cfg.model, tokenizer),
        **{key: cfg.rollout[key] for key in OF_ROLLOUT},
        teacher=teacher,
        classes=classes,
        on_change=cfg.on_change,
        max_skipped_steps=cfg.trainer.max_skipped_steps,
        evaluation=between,
        record=runs.record(folder, cfg) | {"problems": identity.digest_of_rows(evaluation)},
    )
    settle_callbacks(trainer)
    ranks.refuse_other_loads(trainer)
    problems = parts.evaluated(evaluation, cfg.eval)
    return trainer, functools.partial(evaluated, cfg, trainer, problems, parts.correctness(funcs), folder)


def loaded(cfg: DictConfig, between: Evaluation | None, begun: str | None) -> tuple[str, Any, Dataset, Dataset, Any]:
    """Where the model is, its tokenizer, the problems to train and to evaluate on, and those evaluated during training.

    Args:
        between, begun: as in `assemble`.

    Raises:
        UserError: something cannot be loaded.
    """
    from accelerate import PartialState

    from rltoken import parts
    from rltoken.data import warn_shared

    with PartialState().main_process_first():  # what is converted or trained once and cached is made by rank 0
        path = begun or parts.source(cfg.model)
        tokenizer = parts.tokenizer(cfg.model, path)
        train, evaluation = (parts.problems(cfg.data, role, tokenizer) for role in ("train", "eval"))
        apart = between.load(tokenizer) if between else None
    if runs.is_main_process():
        warn_shared(train, evaluation)
    return path, tokenizer, train, evaluation, apart


def refuse_unserved(cfg: DictConfig, args: Any, path: str) -> None:
    """Refuse a model that vLLM is to serve on a CPU and cannot; of an adapter the base is known only once it is loaded.

    Raises:
        UserError: it cannot.
    """
    if args.use_vllm and args.device.type == "cpu" and not adapters.is_adapter(path):
        from rltoken.rollout import vllm_cpu

        vllm_cpu.refuse_model(path, trust_remote_code=cfg.model.trust_remote_code)


def refuse_unlabelled(cfg: DictConfig, pipeline: Any, funcs: Mapping[str, Callable[..., Any]]) -> None:
    """Refuse to train without gold answers where something needs them, or nothing else says what is worth a reward.

    Args:
        funcs: the reward functions; one that does not name `answer` needs none.

    Raises:
        UserError: names the key, the reason and the fix.
    """
    if cfg.data.get("answers", True):
        return
    if graded := [stage.key for stage in pipeline["rows"] if not stage.only_for]:
        raise UserError(
            f"data.answers: {graded[0]} looks at rewards before there is a vote, and without gold answers there are "
            "none; leave it out, or set data.answers=true."
        )
    voted = any(stage.relabels for stage in pipeline["shapes"])
    if not voted and all("answer" in inspect.signature(func).parameters for func in funcs.values()):
        raise UserError(
            f"data.answers: {' and '.join(f'reward.funcs.{name}' for name in funcs)} can say nothing without gold "
            "answers; choose a method that votes, as +exp=ttrl, or set data.answers=true."
        )


def settle_callbacks(trainer: Any) -> None:
    """Leave the terminal to the progress line, and let no tracker that is down end the run."""
    from transformers import PrinterCallback, ProgressCallback
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    from rltoken.callbacks import tolerate

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    for callback in trainer.callback_handler.callbacks:
        if type(callback) in INTEGRATION_TO_CALLBACK.values():
            tolerate(callback)


def evaluated(
    cfg: DictConfig, trainer: Any, dataset: Dataset, reward: Any, folder: Path, phase: str, *, known: bool = False
) -> dict[str, Any]:
    """Evaluate the model as it stands; writes evaluation_<phase>.parquet, whole or not at all.

    With `known`, one that is there already is taken: the model that a resumed run began with is not there any more.
    """
    import pandas as pd

    from rltoken import parts
    from rltoken.evals.during import generating
    from rltoken.evals.formats import guided
    from rltoken.evals.generate import evaluate, settings_of
    from rltoken.evals.metrics import summary

    path = folder / f"evaluation_{phase}.parquet"
    if found := from_first_rank(str(path) if known and path.exists() else None):
        return summary(pd.read_parquet(found)) if trainer.accelerator.is_main_process else {}
    settings = settings_of(cfg.eval, cfg.rollout.max_thinking_tokens, trainer.appended_id)
    with generating(trainer, settings) as generator:
        table = evaluate(
            guided(generator, cfg.eval.format, cfg.model.get("formats"), trainer.processing_class, trainer.classes),
            trainer.processing_class,
            dataset,
            reward,
            trainer.template,
            settings,
            label=f"evaluation {phase} training",
        )
    if trainer.accelerator.is_main_process:
        if settings.self_reward and settings.samples > 1:  # they weigh votes
            table = parts.with_answers(table, cfg.reward)
        partial = path.with_suffix(".partial")
        table.to_parquet(partial)
        partial.replace(path)
    return summary(table)


def finish(folder: Path, results: dict[str, Any]) -> None:
    """Write report.json and report.png, print the table, and say where everything is."""
    from rltoken import report

    report.picture(results, report.read_metrics(folder / "metrics.jsonl"), folder / "report.png")
    partial = folder / "report.json.partial"
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "report.json")  # a report that exists is whole, and means that the run is finished
    report.show(results)
    print(f"model: {folder / 'final'}, metrics: {folder / 'metrics.jsonl'}, picture: {folder / 'report.png'}")


@contextlib.contextmanager
def _traceback_kept(folder: Path) -> Iterator[None]:
    """Write the traceback of whatever ends a run early beside what is there already."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SharedError) and not runs.is_main_process():
            raise  # rank 0 has the same
        with contextlib.suppress(OSError):  # the disk may be what failed
            path = folder / f"traceback{'' if runs.is_main_process() else '_' + os.environ['RANK']}.txt"
            path.write_text(traceback.format_exc(), encoding="utf-8")
        raise


if __name__ == "__main__":
    main()
