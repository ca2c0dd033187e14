"""Evaluate runs or models under thinking budgets: `python -m rltoken.evaluate 'runs=[runs/a,runs/b]'`.

compose -> check -> per model: generate once, cut the thinking at each budget, force an answer, grade -> metrics.json,
one table of completions per model, one picture with all curves. Runs bring their own model, data and reward; what the
command line says goes before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rltoken import adapters, cli, config, identity, runs
from rltoken.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedTokenizerBase

    from rltoken.evals.generate import Settings
    from rltoken.evals.generators import Generator

OF_A_RUN = ("world", "model", "data", "reward", "rollout", "eval")
"""Sections that a run brings with it."""
BACK_END = ("use_vllm", "vllm_mode", "vllm_max_model_length")
"""What a run brings of the section `trainer`: by what it samples. It is what the group `rollout` chooses."""
TOP_LEVEL = (*OF_A_RUN, "trainer", "runs", "models", "out")
OF_A_GROUP = {
    "world": ("world",),
    "model": ("model",),
    "data": ("data",),
    "reward": ("reward",),
    "rollout": (),
    "eval": ("eval",),
    "scale": ("data", "reward", "rollout", "eval"),
    "hardware": (),
}
"""Groups that may be chosen on the command line -> the sections that then come from there."""
SAME = ("data.eval", "reward", "eval")
"""What all models of one comparison must share; where budgets are fractions, `LONGEST` too."""
LONGEST = "rollout.max_thinking_tokens"
WHEN = {"eval.before", "eval.after"}
"""Keys of `eval` that only say when training evaluates."""


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: its name in tables, its folder or hub id (None: the configured source), its settings."""

    name: str
    path: str | None
    cfg: DictConfig


def main() -> None:
    """The entry point."""
    cli.main(_job, "evaluate", TOP_LEVEL, "interrupted; nothing was written for the model under way")


@hydra.main(config_path=f"pkg://{cli.CONFIG_MODULE}", config_name="evaluate", version_base="1.3")
def _job(cfg: DictConfig) -> None:
    cli.attempt(lambda: run(cfg, HydraConfig.get().overrides.task))


def run(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Evaluate every model that is named, and write and show the comparison.

    Raises:
        UserError: whatever the user can mend.
    """
    from accelerate import PartialState

    if OmegaConf.is_list(cfg.models) and cfg.models and OmegaConf.is_missing(cfg.model, "path"):
        cfg.model.path = cfg.models[0]
    adapters.settle(cfg)
    config.check_keys(cfg, TOP_LEVEL)
    for key in ("runs", "models"):
        if not OmegaConf.is_list(cfg[key]):
            raise UserError(f"{key}: {cfg[key]!r} is no list; write '{key}=[FOLDER,...]'.")
    found = subjects(cfg, overrides)
    for subject in found:
        config.check_values(subject.cfg)
        check_back_end(subject)
    refuse_differences(found)
    folder = Path(cfg.out or f"evaluations/{'-vs-'.join(subject.name for subject in found)[:80]}")
    if folder.is_file() or (folder / "metrics.json").exists():
        raise UserError(
            f"out: {folder} is a file, or holds an evaluation already; choose another with out=..., or remove it."
        )
    for path in cfg.models:
        existing_model(str(path))
    state = PartialState(cpu=cfg.trainer.use_cpu)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    summaries = {subject.name: evaluated(subject, folder, state) for subject in found}
    if state.is_main_process:
        finish(found, summaries, folder)


def subjects(cfg: DictConfig, overrides: Sequence[str]) -> list[Subject]:
    """The models that `runs` and `models` name, or the one that is configured, each with its settings.

    Raises:
        UserError: a run that is not there or not finished, or two of one name.
    """
    found = [run_subject(Path(path), cfg, overrides) for path in cfg.runs]
    found += [Subject(str(path).rstrip("/").replace("/", "_").lstrip("._"), str(path), cfg) for path in cfg.models]
    found = found or [Subject(str(HydraConfig.get().runtime.choices["model"]), None, cfg)]
    names = [subject.name for subject in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"runs: there are two of the name {name}; name each once.")
    return found


def existing_model(path: str) -> None:
    """Refuse what is no model, and no adapter whose base is there, before anything is loaded or written.

    Raises:
        UserError: it is a run directory, or no model folder and no hub id, or an adapter without its base.
    """
    from rltoken.models import existing

    if (Path(path) / "config.yaml").is_file() and (Path(path) / "command.txt").is_file():
        raise UserError(f"models: {path} is a run directory; set 'runs=[{path}]', or 'models=[{path}/final]'.")
    if adapters.is_adapter(path):
        adapters.base_of(path, "models")
        return
    try:
        existing(path)
    except UserError as error:
        raise UserError(str(error).replace("model.path", "models")) from error


def run_subject(path: Path, cfg: DictConfig, overrides: Sequence[str]) -> Subject:
    """The final model of a run, or a checkpoint, with the run's own settings, but for what the command line says."""
    inside = not (path / "config.yaml").is_file() and (path.parent / "config.yaml").is_file()
    folder, model = (path.parent, path) if inside else (path, path / "final")
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"runs: {folder} is no run directory: it has no config.yaml; for a model, set models=[{folder}]."
        )
    if not model.is_dir():
        raise UserError(
            f"runs: {folder} has no {model.name}{'' if inside else ' model, so it is not finished'}; go on with "
            f"resume=auto, or evaluate a checkpoint by 'runs=[{folder}/checkpoint-N]'."
        )
    merged = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    stored = OmegaConf.load(folder / "config.yaml")
    chosen = [item.lstrip("+~").partition("=")[0] for item in overrides]
    given = {section for key in chosen for section in OF_A_GROUP.get(key.partition("@")[0], ())}
    for section in OF_A_RUN:
        if section not in given and section in stored:
            merged[section] = (
                OmegaConf.merge(merged[section], stored[section]) if section == "eval" else stored[section]
            )
    for key in BACK_END:
        if "rollout" not in chosen and f"trainer.{key}" not in chosen and "trainer" in stored:
            merged.trainer[key] = stored.trainer[key]
            if key == "vllm_mode":  # a server that training sampled from is gone, or serves something else by now
                merged.trainer[key] = "colocate"
    for key in chosen:
        if key.partition(".")[0] in OF_A_RUN and "." in key:
            OmegaConf.update(merged, key, OmegaConf.select(cfg, key), force_add=True)
    return Subject(f"{folder.name}-{model.name}" if inside else folder.name, str(model), merged)


def back_end(trainer: Mapping[str, Any]) -> str:
    """What completes the problems, by the section `trainer`: the name of a choice of the group `rollout`."""
    return f"vllm_{trainer['vllm_mode']}" if trainer["use_vllm"] else "hf"


def check_back_end(subject: Subject) -> None:
    """Refuse vLLM where it cannot be had, before anything is loaded.

    Raises:
        UserError: it is not installed, or cannot do what is set; or the model is to be quantised.
    """
    import torch

    cfg = subject.cfg
    if back_end(cfg.trainer) == "hf":
        return
    try:
        config.check_vllm(cfg.trainer, torch.cuda.is_available() and not cfg.trainer.use_cpu)
    except UserError as error:
        raise UserError(f"rollout: {subject.name} samples by {back_end(cfg.trainer)}. {error}") from error
    if cfg.model.get("quantization") is not None:
        raise UserError(
            f"model.quantization: vLLM would serve {subject.name} with its weights as they are stored; set rollout=hf, "
            "or model.quantization=null to evaluate it so."
        )


def refuse_differences(found: Sequence[Subject]) -> None:
    """Refuse to compare what was not measured alike.

    Raises:
        UserError: names the first setting that differs.
    """
    fractions = any(isinstance(budget, float) for subject in found for budget in subject.cfg.eval.budgets or ())
    for key in (*SAME, *([LONGEST] if fractions else [])):
        values = [identity.flat({key: plain(OmegaConf.select(subject.cfg, key))}) for subject in found]
        for subject, value in zip(found, values, strict=True):
            for name in sorted((values[0].keys() | value.keys()) - WHEN):
                if values[0].get(name) != value.get(name):
                    if key == "data.eval":
                        raise UserError(
                            f"{name}: {found[0].name} and {subject.name} are evaluated on different problems "
                            f"({values[0].get(name)} and {value.get(name)}); choose one set for all, as in data=gsm8k, "
                            "or evaluate them apart."
                        )
                    raise UserError(
                        f"{name}: {found[0].name} has {values[0].get(name)} and {subject.name} {value.get(name)}; set "
                        "it for both on the command line, or evaluate them apart."
                    )


def plain(value: Any) -> Any:
    """A node of a configuration as plain Python."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def evaluated(subject: Subject, folder: Path, state: PartialState) -> dict[str, Any]:
    """Load one model, evaluate it, write NAME.parquet; its summary."""
    from rltoken import parts
    from rltoken.evals.generate import evaluate, settings_of
    from rltoken.evals.metrics import summary

    cfg = subject.cfg
    with state.main_process_first():
        path = subject.path or parts.source(cfg.model)
        tokenizer = parts.tokenizer(cfg.model, path)
        problems = parts.first(parts.problems(cfg.data, "eval", tokenizer), cfg.eval.limit)
    settings = settings_of(cfg.eval, cfg.rollout.max_thinking_tokens)
    with generating(cfg, path, tokenizer, settings, state, folder / f".{subject.name}.merged") as generator:
        table = evaluate(
            generator,
            tokenizer,
            problems,
            parts.correctness(parts.rewards(cfg.reward)[0]),
            parts.template(cfg.model, tokenizer),
            settings,
            label=subject.name,
        )
    if state.is_main_process:
        table.to_parquet(folder / f"{subject.name}.parquet")
    return summary(table)


@contextlib.contextmanager
def generating(
    cfg: DictConfig,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    state: PartialState,
    scratch: Path,
) -> Iterator[Generator]:
    """What samples from the model at `path`; with vLLM its engine ends with the context.

    Args:
        scratch: a folder beside the results, for an adapter that is merged, removed in the end.

    Raises:
        UserError: the model cannot be loaded, merged or served.
    """
    from rltoken import models, parts
    from rltoken.evals.engine import engine
    from rltoken.evals.generators import ServerGenerator, TransformersGenerator, VllmGenerator, ends_of

    if back_end(cfg.trainer) == "hf":
        model = parts.model(cfg.model, path).to(state.device)
        yield TransformersGenerator(model, tokenizer, temperature=settings.temperature, batch_size=settings.batch_size)
        return
    if back_end(cfg.trainer) == "vllm_server":
        declared = models.generation_config(path, trust_remote_code=cfg.model.trust_remote_code)
        yield ServerGenerator(
            server_of(cfg.trainer, path),
            ends_of(declared, tokenizer),
            temperature=settings.temperature,
            patience=cfg.rollout.patience,
        )
        return
    with (
        whole_model(cfg, path, state, scratch) as served,
        engine(
            served,
            dtype=models.torch_dtype(cfg.model.dtype),
            device=state.device,
            processes=state.num_processes,
            max_model_len=cfg.trainer.vllm_max_model_length,
            gpu_memory_utilization=cfg.trainer.vllm_gpu_memory_utilization,
            trust_remote_code=cfg.model.trust_remote_code,
        ) as llm,
    ):
        declared = models.generation_config(served, trust_remote_code=cfg.model.trust_remote_code)
        yield VllmGenerator(llm, ends_of(declared, tokenizer), temperature=settings.temperature)


def server_of(trainer: DictConfig, path: str) -> str:
    """Where the server is that serves the model at `path`.

    Raises:
        UserError: nobody answers there, or it serves another one.
    """
    import requests

    from rltoken.serve import url_of

    url = url_of(trainer)
    start = f"python -m rltoken.serve model=hf model.path={path}"
    try:
        response = requests.get(f"{url}/v1/models", timeout=10)
        response.raise_for_status()
        found = [one["root"] for one in response.json()["data"]]
    except (requests.RequestException, ValueError, KeyError) as error:
        raise UserError(
            f"trainer.vllm_server_base_url: no vLLM server answers at {url} ({type(error).__name__}); start {start}, "
            "or set rollout=vllm_colocate or rollout=hf."
        ) from error
    if path not in found and os.path.realpath(path) not in map(os.path.realpath, found):
        raise UserError(
            f"models: the server at {url} serves {', '.join(map(str, found))}, and not {path}; start {start}, or set "
            "rollout=vllm_colocate or rollout=hf. An adapter is served merged (python -m rltoken.merge)."
        )
    return url


@contextlib.contextmanager
def whole_model(cfg: DictConfig, path: str, state: PartialState, scratch: Path) -> Iterator[str]:
    """The folder or hub id of a model that needs no adapter: `path`, or what is merged into `scratch`.

    Raises:
        UserError: the adapter does not fit its base, or cannot be merged into it.
    """
    from rltoken import merge, parts
    from rltoken.models import torch_dtype

    if not adapters.is_adapter(path):
        yield path
        return
    dtype = str(torch_dtype(cfg.model.dtype)).removeprefix("torch.")
    base, trusted = parts.base_of(cfg.model, path), cfg.model.trust_remote_code
    try:
        with state.main_process_first():
            if state.is_main_process:
                shutil.rmtree(scratch, ignore_errors=True)
                merge.write_merged(path, base, scratch, dtype=dtype, trust_remote_code=trusted)
    except UserError as error:
        reason = str(error).partition(": ")[2]
        raise UserError(f"rollout: {reason} vLLM would serve it merged into its base: set rollout=hf.") from error
    try:
        yield str(scratch)
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)


def finish(found: Sequence[Subject], summaries: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write metrics.json and curves.png, print the table, and say where everything is."""
    from rltoken import report

    settings = {
        subject.name: {
            **{key: plain(OmegaConf.select(subject.cfg, key)) for key in (*SAME, LONGEST)},
            "sampled_by": back_end(subject.cfg.trainer),
        }
        for subject in found
    }
    results = {"settings": settings, "versions": runs.versions(), "models": summaries}
    report.curves(summaries, folder / "curves.png")
    (folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    report.show_comparison(summaries)
    print(f"metrics: {folder / 'metrics.json'}, picture: {folder / 'curves.png'}, completions: {folder}/*.parquet")


if __name__ == "__main__":
    main()
