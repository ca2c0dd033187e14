"""Train a reasoning model: `python -m rltoken.train +exp=grpo`; `--help` explains the rest.

compose -> check -> run directory -> data, tokenizer, model -> evaluate -> train or resume -> evaluate -> report.
Nothing is loaded before the configuration has been checked. What a user can mend ends in one line and exit status 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import TrainerCallback

from rltoken import config, report, runs
from rltoken.errors import UserError, first_line

CONFIG_MODULE = "rltoken.conf"
STATUSES: list[int] = []
"""Exit status of each job of this process: --multirun runs several."""


def main() -> None:
    """The entry point: exit status 0, 2 where the user can mend something, 130 after Ctrl-C, 1 for anything else."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on, instead of printing and exiting
    config.register_schemas()
    refuse_dashes(sys.argv[1:])
    try:
        _job()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: Hydra's for a group set to null
        GlobalHydra.instance().clear()
        fail(config.explain(error, *known_names(), sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted; the same command with resume=auto goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    sys.exit(max(STATUSES, default=0))


def fail(error: UserError) -> None:
    """Print the one line, on rank 0 only since composition fails alike everywhere, and leave."""
    if runs.is_main_process():
        print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def refuse_dashes(arguments: Sequence[str]) -> None:
    """Leave where an override is written as an option (`--exp=grpo`): Hydra would take it for something else."""
    for argument in arguments:
        key = argument.lstrip("-").partition("=")[0]
        if argument.startswith("--") and key.split(".")[0] in (*config.TOP_LEVEL, *config.GROUPS):
            plus = "+" if key in config.ADDED_GROUPS else ""
            fail(UserError(f"{argument}: overrides are written without dashes: {plus}{argument.lstrip('-')}"))


@hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name="config", version_base="1.3")
def _job(cfg: DictConfig) -> None:
    """One job; errors are told here, since Hydra would add lines of its own."""
    try:
        config.check_keys(cfg)
        if cfg.name is None:
            chosen = HydraConfig.get()
            cfg.name = runs.default_name(chosen.runtime.choices, cfg.seed, chosen.overrides.task)
        run(cfg, Path(cfg.runs_dir) / str(cfg.name))
        STATUSES.append(0)
    except Exception as error:
        mendable = user_error(error)
        STATUSES.append(2 if mendable else 1)
        if mendable is None:
            traceback.print_exc()
        else:
            print(f"error: {mendable}", file=sys.stderr)


def user_error(error: BaseException) -> UserError | None:
    """The UserError that an exception is or was raised from, also through Hydra's instantiation."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return user_error(error.__cause__) or _not_instantiated(error)
    if isinstance(error, OmegaConfBaseException):
        return config.explain(error, (), {})
    return None


def _not_instantiated(error: InstantiationException) -> UserError:
    """What a user's own `_target_` raised, or that there is none of that name, under its key."""
    key, target = re.search(r"full_key: (\S+)", str(error)), re.search(r"target '([^']+)'", str(error))
    return UserError(
        f"{key[1] if key else 'configuration'}: {target[1] if target else '_target_'} cannot be had or called: "
        f"{type(error.__cause__).__name__}: {first_line(error.__cause__).rstrip(':.')}. Correct _target_ or its "
        "settings."
    )


def known_names() -> tuple[list[str], dict[str, list[str]]]:
    """Every key that there is beside the mistake, and the choices of every group."""
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = {
            name: _choices(loader, name) for name in loader.list_groups("") if not name.startswith(("hydra", "_"))
        }
        return config.flat_keys(_without_mistake()), groups


def _choices(loader: Any, group: str) -> list[str]:
    """The choices of a group, those in its folders as folder/choice."""
    own = [name for name in loader.get_group_options(group) if not name.startswith("_") and name != "schema"]
    folders = [name for name in loader.list_groups(group) if not name.startswith("_")]
    return own + [f"{folder}/{name}" for folder in folders for name in _choices(loader, f"{group}/{folder}")]


def _without_mistake() -> DictConfig:
    """The configuration that the command line's choices of groups give, or the default one if those are wrong."""
    choices = [item for item in sys.argv[1:] if "=" in item and "." not in item.partition("=")[0] and item[0] != "-"]
    try:
        return compose("config", overrides=choices)
    except (HydraException, OmegaConfBaseException, ValueError):
        return compose("config")


def run(cfg: DictConfig, folder: Path) -> None:
    """One run, from the checks to the report.

    Raises:
        UserError: whatever the user can mend.
    """
    from rltoken.callbacks import ProgressLine

    if cfg.resume == "auto" and (done := runs.finished(folder)):
        if runs.is_main_process():
            print(f"{folder} is finished; its results:")
            report.show(done)
            print(f"picture: {folder / 'report.png'}. To train anew, choose another name=... or remove the folder.")
        return
    pipeline, args, lora = checked(cfg, folder)
    checkpoint = runs.checkpoint(folder, cfg.resume)
    runs.open_run(folder, cfg, [sys.executable, "-m", "rltoken.train", *sys.argv[1:]])
    with _traceback_kept(folder), ProgressLine() as progress:
        trainer, evaluation = assemble(cfg, folder, pipeline, args, lora, progress)
        before = evaluation("before") if cfg.eval.before else None
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(folder / "final"))
        after = evaluation("after") if cfg.eval.after else None
        if trainer.accelerator.is_main_process:
            finish(folder, {"name": cfg.name, "before": before, "after": after, "steps": trainer.state.global_step})


def checked(cfg: DictConfig, folder: Path) -> tuple[Any, Any, Any]:
    """The pipeline, TRL's arguments and the adapter's configuration, checked against each other; nothing is loaded.

    Raises:
        UserError: a combination that makes no sense.
    """
    from rltoken.models import lora
    from rltoken.pipeline import build

    OmegaConf.resolve(cfg)
    config.check_values(cfg)
    args = config.to_grpo_config(cfg.trainer, output_dir=str(folder), seed=cfg.seed)
    pipeline = build(instantiate(cfg.method, _convert_="object"))
    pipeline.check(args)
    return pipeline, args, lora(cfg.model.lora)


def assemble(
    cfg: DictConfig, folder: Path, pipeline: Any, args: Any, lora: Any, progress: TrainerCallback
) -> tuple[Any, Any]:
    """Load data, tokenizer and model; the trainer, and a function phase -> summary of an evaluation."""
    from rltoken.callbacks import MetricsFile
    from rltoken.data import check_prompt_lengths
    from rltoken.models import load_model, load_tokenizer
    from rltoken.trainer import TokenGRPOTrainer

    leave_terminal_to_us()
    state = PartialState()
    with state.main_process_first():  # what is converted or trained once and cached is made by rank 0
        datasets = {role: instantiate(cfg.data[role]) for role in ("train", "eval")}
        path = instantiate(cfg.model.source)
    tokenizer = load_tokenizer(path, think_end=cfg.model.think_end, trust_remote_code=cfg.model.trust_remote_code)
    longest = cfg.data.get("max_prompt_tokens")
    datasets = {
        role: check_prompt_lengths(dataset, tokenizer, longest, cfg.data.get("too_long", "refuse"))
        for role, dataset in datasets.items()
    }
    reward = instantiate(cfg.reward)
    funcs = named(reward.funcs)
    if reward.weights is not None:
        args.reward_weights = list(reward.weights)
    think_end_id = tokenizer.encode(cfg.model.think_end, add_special_tokens=False)[0] if cfg.model.think_end else None
    trainer = TokenGRPOTrainer(
        model=load_model(
            path,
            dtype=cfg.model.dtype,
            attn_implementation=cfg.model.attn_implementation,
            trust_remote_code=cfg.model.trust_remote_code,
        ),
        reward_funcs=funcs,
        args=args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["eval"] if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[MetricsFile(folder / "metrics.jsonl"), progress],
        pipeline=pipeline,
        think_end_id=think_end_id,
        pack_tokens=cfg.rollout.pack_tokens,
        normaliser=cfg.rollout.normaliser,
        answer_fn=reward.answer,
    )
    drop_printing_callbacks(trainer)
    accuracy = next((func for func in funcs if func.__name__ == "accuracy"), funcs[0])
    return trainer, lambda phase: evaluated(cfg.eval, trainer, datasets["eval"], accuracy, folder, phase)


def named(funcs: Any) -> list[Any]:
    """The reward functions under the names of the configuration, which TRL's metrics and tables then use."""
    made = []
    for name, func in funcs.items():
        func.__name__ = name
        made.append(func)
    return made


def leave_terminal_to_us() -> None:
    """Switch off the bars that libraries draw for work of a second."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def drop_printing_callbacks(trainer: Any) -> None:
    """Leave the terminal to the progress line."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def evaluated(
    settings: DictConfig, trainer: Any, dataset: Dataset, reward: Any, folder: Path, phase: str
) -> dict[str, float]:
    """Evaluate the model as it stands, each rank a share of the problems; writes evaluation_<phase>.parquet."""
    import pandas as pd

    from rltoken.evals.generate import evaluate
    from rltoken.evals.metrics import summary

    state = PartialState()
    if settings.limit is not None:
        dataset = dataset.select(range(min(settings.limit, len(dataset))))
    share = dataset.select(range(state.process_index, len(dataset), state.num_processes))
    table = evaluate(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        share,
        reward,
        samples=settings.samples,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=settings.seed,
        think_end_id=trainer.think_end_id,
        label=f"evaluation {phase} training",
    )
    if state.num_processes > 1:
        table = pd.DataFrame.from_records(gather_object(table.to_dict("records")))
    if state.is_main_process:
        table.to_parquet(folder / f"evaluation_{phase}.parquet")
    return summary(table)


def finish(folder: Path, results: dict[str, Any]) -> None:
    """Write report.json and report.png, print the table, and say where everything is."""
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
    except Exception:
        with contextlib.suppress(OSError):  # the disk may be what failed
            path = folder / f"traceback{'' if runs.is_main_process() else '_' + os.environ['RANK']}.txt"
            path.write_text(traceback.format_exc(), encoding="utf-8")
        raise


if __name__ == "__main__":
    main()
