"""Evaluate runs or models under thinking budgets: `python -m rltoken.evaluate 'runs=[runs/a,runs/b]'`.

compose -> check -> per model: generate once, cut the thinking at each budget, force an answer, grade -> metrics.json,
one table of completions per model, one picture with all curves. Runs bring their own model, data and reward; what the
command line says goes before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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

OF_A_RUN = ("world", "model", "data", "reward", "rollout", "eval")
"""Sections that a run brings with it."""
TOP_LEVEL = (*OF_A_RUN, "trainer", "runs", "models", "out")
OF_A_GROUP = {
    "world": ("world",),
    "model": ("model",),
    "data": ("data",),
    "reward": ("reward",),
    "rollout": ("rollout",),
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
    for key in chosen:
        if key.partition(".")[0] in OF_A_RUN and "." in key:
            OmegaConf.update(merged, key, OmegaConf.select(cfg, key), force_add=True)
    return Subject(f"{folder.name}-{model.name}" if inside else folder.name, str(model), merged)


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
    table = evaluate(
        parts.model(cfg.model, path).to(state.device),
        tokenizer,
        problems,
        parts.correctness(parts.rewards(cfg.reward)[0]),
        parts.template(cfg.model, tokenizer),
        settings_of(cfg.eval, cfg.rollout.max_thinking_tokens),
        label=subject.name,
    )
    if state.is_main_process:
        table.to_parquet(folder / f"{subject.name}.parquet")
    return summary(table)


def finish(found: Sequence[Subject], summaries: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write metrics.json and curves.png, print the table, and say where everything is."""
    from rltoken import report

    settings = {
        subject.name: {key: plain(OmegaConf.select(subject.cfg, key)) for key in (*SAME, LONGEST)} for subject in found
    }
    results = {"settings": settings, "versions": runs.versions(), "models": summaries}
    report.curves(summaries, folder / "curves.png")
    (folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    report.show_comparison(summaries)
    print(f"metrics: {folder / 'metrics.json'}, picture: {folder / 'curves.png'}, completions: {folder}/*.parquet")


if __name__ == "__main__":
    main()
