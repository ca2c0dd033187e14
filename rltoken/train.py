"""Train a reasoning model: `python -m rltoken.train +exp=grpo`; `--help` explains the rest.

compose -> check -> run directory -> data, tokenizer, model -> evaluate -> train or resume -> evaluate -> report.
Nothing is loaded before the configuration has been checked. What a user can mend ends in one line and exit status 2.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
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

from rltoken import config, report, runs
from rltoken.errors import UserError

CONFIG_MODULE = "rltoken.conf"
STATUSES: list[int] = []
"""Exit status of each job of this process: --multirun runs several."""


def main() -> None:
    """The entry point: exit status 0, 2 where the user can mend something, 1 for anything else."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on, instead of printing and exiting
    config.register_schemas()
    try:
        _job()
    except (HydraException, OmegaConfBaseException) as error:
        GlobalHydra.instance().clear()
        fail(config.explain(error, *known_names()))
    sys.exit(max(STATUSES, default=0))


def fail(error: UserError) -> None:
    """Print the one line and leave."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


@hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name="config", version_base="1.3")
def _job(cfg: DictConfig) -> None:
    """One job; errors are told here, since Hydra would add lines of its own."""
    folder: Path | None = None
    try:
        config.check_keys(cfg)
        if cfg.name is None:
            chosen = HydraConfig.get()
            cfg.name = runs.default_name(chosen.runtime.choices, cfg.seed, chosen.overrides.task)
        folder = Path(cfg.runs_dir) / cfg.name
        run(cfg, folder)
        STATUSES.append(0)
    except Exception as error:
        mendable = user_error(error)
        _keep_traceback(folder)
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
        return user_error(error.__cause__) or UserError(f"configuration: {error.__cause__!r}")
    if isinstance(error, OmegaConfBaseException):
        return config.explain(error, (), {})
    return None


def known_names() -> tuple[list[str], dict[str, list[str]]]:
    """Every key that there is beside the mistake, and the choices of every group."""
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = {}
        for group in loader.list_groups(""):
            if not group.startswith(("hydra", "_")):
                options = loader.get_group_options(group)
                groups[group] = [name for name in options if not name.startswith("_") and name != "schema"]
        return config.flat_keys(_without_mistake()), groups


def _without_mistake() -> DictConfig:
    """The configuration that the command line's choices of groups give, or the default one if those are wrong."""
    choices = [item for item in sys.argv[1:] if "=" in item and "." not in item.partition("=")[0] and item[0] != "-"]
    try:
        return compose("config", overrides=choices)
    except (HydraException, OmegaConfBaseException):
        return compose("config")


def run(cfg: DictConfig, folder: Path) -> None:
    """One run, from the checks to the report.

    Raises:
        UserError: whatever the user can mend.
    """
    if cfg.resume == "auto" and (done := runs.finished(folder)):
        print(f"{folder} is finished; its results:")
        report.show(done)
        print(f"picture: {folder / 'report.png'}. To train anew, choose another name=... or remove the folder.")
        return
    pipeline, args, lora = checked(cfg, folder)
    checkpoint = runs.checkpoint(folder, cfg.resume)
    runs.open_run(folder, cfg, [sys.executable, "-m", "rltoken.train", *sys.argv[1:]])
    trainer, evaluation = assemble(cfg, folder, pipeline, args, lora)
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
    if cfg.rollout.backend != "hf":
        raise UserError(f"rollout.backend: '{cfg.rollout.backend}' is unknown; use hf.")
    args = config.to_grpo_config(cfg.trainer, output_dir=str(folder), seed=cfg.seed)
    pipeline = build(instantiate(cfg.method, _convert_="object"))
    pipeline.check(args)
    if cfg.eval.samples < 1 or cfg.eval.batch_size < 1:
        raise UserError("eval.samples: at least one sample per problem, and one per batch, is needed; set them to 1.")
    return pipeline, args, lora(cfg.model.lora)


def assemble(cfg: DictConfig, folder: Path, pipeline: Any, args: Any, lora: Any) -> tuple[Any, Any]:
    """Load data, tokenizer and model; the trainer, and a function phase -> summary of an evaluation."""
    from rltoken.callbacks import MetricsFile, ProgressLine
    from rltoken.data import check_prompt_lengths
    from rltoken.models import load_model, load_tokenizer
    from rltoken.trainer import TokenGRPOTrainer

    leave_terminal_to_us()
    state = PartialState()
    with state.main_process_first():  # what is converted or trained once and cached is made by rank 0
        path = instantiate(cfg.model.source)
        datasets = {role: instantiate(cfg.data[role]) for role in ("train", "eval")}
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
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[MetricsFile(folder / "metrics.jsonl"), ProgressLine()],
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
    if not made:
        raise UserError("reward.funcs: there is no reward function; choose reward=math or name one under reward.funcs.")
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


def _keep_traceback(folder: Path | None) -> None:
    if folder is not None and folder.is_dir() and runs.is_main_process():
        (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")


if __name__ == "__main__":
    main()
