"""Evaluate runs or models under thinking budgets: `python -m rltoken.evaluate 'runs=[runs/a,runs/b]'`.

compose -> check -> per model: generate once, cut the thinking at each budget, force an answer, grade -> metrics.json,
summary.csv, one table of completions per model, one picture with all curves. Runs bring their own model, data and
reward; what the command line says goes before it, and a benchmark (`eval=aime24`) brings data and reward for all.

Every finished batch is kept beside the results (`rltoken.evals.shards`): the same command after a kill goes on, and
ends with the same files as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rltoken import adapters, cli, config, identity, runs
from rltoken.errors import UserError
from rltoken.evals import shards

if TYPE_CHECKING:
    import pandas as pd
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from rltoken.evals.chat import ChatGenerator
    from rltoken.evals.generate import Settings
    from rltoken.evals.generators import Generator

RESULTS = "metrics.json"
"""What there is only of a finished evaluation."""
OF_A_RUN = ("world", "model", "data", "reward", "rollout", "eval")
"""Sections that a run brings with it."""
BACK_END = ("use_vllm", "vllm_mode", "vllm_max_model_length")
"""What a run brings of the section `trainer`: by what it samples. It is what the group `rollout` chooses."""
TOP_LEVEL = (*OF_A_RUN, "trainer", "runs", "models", "server", "tokenizer", "out")
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
BENCHMARK = ("data", "reward", "eval")
"""Sections that a benchmark, a choice of the group `eval`, brings."""
WHEN = re.compile(r"eval\.(before|after|during\..*)")
"""Keys of `eval` that are read in training only."""


FINISHED: list[Path] = []
"""Folders of the results of this process's jobs, on rank 0: --multirun runs several."""


@dataclass(frozen=True)
class Prepared:
    """What a model is evaluated with, but for itself.

    Where it is, its tokenizer, the problems, what the results will belong to, and the token that self-rewards are read
    from, None where none are asked for.
    """

    path: str
    tokenizer: PreTrainedTokenizerBase | None
    problems: Dataset
    facts: dict[str, Any]
    appended: int | None


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: its name in tables, its folder or hub id (None: the configured source), its settings."""

    name: str
    path: str | None
    cfg: DictConfig


def main() -> None:
    """The entry point."""
    cli.main(_start, "evaluate", TOP_LEVEL, "interrupted; the same command goes on from the last batch")


def _start() -> None:
    FINISHED.clear()
    _job()
    if len(FINISHED) > 1:
        from rltoken import overview

        try:
            overview.show(FINISHED)
        except UserError as error:  # no fault of the evaluations: a sweep of something else than benchmarks
            print(f"no table of all: {error}")


@hydra.main(config_path=f"pkg://{cli.CONFIG_MODULE}", config_name="evaluate", version_base="1.3")
def _job(cfg: DictConfig) -> None:
    cli.attempt(lambda: run(cfg, HydraConfig.get().overrides.task))


def settle(cfg: DictConfig, top_level: Sequence[str]) -> None:
    """Let the section `model` have a folder where only `models` names any, and check every key.

    Raises:
        UserError: there is no such key, or its value cannot be.
    """
    if OmegaConf.is_list(cfg.models) and cfg.models and OmegaConf.is_missing(cfg.model, "path"):
        cfg.model.path = cfg.models[0]
    adapters.settle(cfg)
    config.check_keys(cfg, top_level)


def run(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Evaluate every model that is named, and write and show the comparison.

    Raises:
        UserError: whatever the user can mend.
    """
    from accelerate import PartialState

    settle(cfg, TOP_LEVEL)
    for key in ("runs", "models"):
        if not OmegaConf.is_list(cfg[key]):
            raise UserError(f"{key}: {cfg[key]!r} is no list; write '{key}=[FOLDER,...]'.")
    found = subjects(cfg, overrides)
    check_server(cfg)
    for subject in found:
        config.check_values(subject.cfg)
        check_back_end(subject)
    refuse_differences(found)
    names = "-vs-".join(subject.name for subject in found)[:80]
    folder = Path(cfg.out or Path("evaluations", *filter(None, [found[0].cfg.eval.benchmark]), names))
    if folder.is_file():
        raise UserError(f"out: {folder} is a file; choose another with out=...")
    for path in () if cfg.server else cfg.models:
        existing_model(str(path))
    cli.leave_terminal_to_us()
    state = PartialState(cpu=cfg.trainer.use_cpu)
    prepared = [prepare(subject, state) for subject in found]
    with alone(folder, state):
        compare(found, prepared, folder, state)


@contextlib.contextmanager
def alone(folder: Path, state: PartialState) -> Iterator[None]:
    """Be the only command that writes results into a folder inside the context, which is made if it is not there.

    Raises:
        UserError: it cannot be made, or another process evaluates there.
    """
    if state.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out: {folder} cannot be made ({error.strerror}); choose another with out=...") from error
    with runs.alone(folder, "out", "evaluates"):
        state.wait_for_everyone()  # another process may have finished it while rank 0 waited for the folder
        yield


def compare(found: Sequence[Subject], prepared: Sequence[Prepared], folder: Path, state: PartialState) -> None:
    """Evaluate every model into a folder that is this command's alone, and write and show what comes of it.

    Raises:
        UserError: the folder holds another evaluation, or a model cannot be evaluated.
    """
    facts = {subject.name: one.facts for subject, one in zip(found, prepared, strict=True)}
    if (folder / RESULTS).exists():
        repeat(folder, facts)
        return
    for subject, one in zip(found, prepared, strict=True):
        shards.check(shards_of(subject, folder), one.facts)
    tables = {
        subject.name: evaluated(subject, one, folder, state) for subject, one in zip(found, prepared, strict=True)
    }
    if state.is_main_process:
        finish(found, tables, facts, folder)


def repeat(folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Show the results of an evaluation that is finished already.

    Raises:
        UserError: it is another one.
    """
    from rltoken import report

    results = shards.results(folder / RESULTS)
    then = results.get("identity", {})
    if then.keys() != facts.keys():
        raise UserError(
            f"out: {folder} holds an evaluation already, of {', '.join(then) or 'an earlier version'}; choose another "
            "with out=..., or remove it."
        )
    for name, now in facts.items():
        shards.refuse_other(folder, then[name], now)
    if runs.is_main_process():
        report.show_comparison(results["models"], next(iter(results["settings"].values()))["eval"]["benchmark"])
        print(f"finished already: {folder / RESULTS}")
        FINISHED.append(folder)


def subjects(cfg: DictConfig, overrides: Sequence[str]) -> list[Subject]:
    """The models that `runs` and `models` name, or the one that is configured, each with its settings.

    Raises:
        UserError: a run that is not there or not finished, or two of one name; or prompts that a model does not have.
    """
    from rltoken.evals import prompts

    found = [run_subject(Path(path), cfg, overrides) for path in cfg.runs]
    if cfg.models or not found:
        prompts.settle(cfg.eval, {})
    found += [Subject(str(path).rstrip("/").replace("/", "_").lstrip("._"), str(path), cfg) for path in cfg.models]
    found = found or [Subject(str(HydraConfig.get().runtime.choices["model"]), None, cfg)]
    names = [subject.name for subject in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"runs: there are two of the name {name}; name each once.")
    return found


def check_server(cfg: DictConfig) -> None:
    """Refuse what a server that is asked by messages cannot do.

    Raises:
        UserError: no model is named, or runs are, or answers are to be forced, or opened in a format.
    """
    if cfg.server is None:
        return
    if not str(cfg.server).startswith(("http://", "https://")):
        raise UserError(f"server: {cfg.server} is no URL; write http://HOST:PORT/v1.")
    if cfg.runs or not cfg.models:
        raise UserError(f"models: name what the server at {cfg.server} serves, as in 'models=[NAME]', and no runs.")
    if cfg.eval.format is not None:
        raise UserError(
            "eval.format: a tag cannot be put into a reply through messages; set eval.format=null, or leave server out."
        )
    if cfg.eval.budgets:
        raise UserError(
            "eval.budgets: chat completions cannot be cut and continued, so no answer can be forced through them; set "
            "eval.budgets=null, or leave server out and set rollout=vllm_server for a vLLM server."
        )


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
    from rltoken.evals import prompts

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
    # Not resolved yet: what the command line chooses may refer to the run's model, as how thinking ends in a reward.
    merged = OmegaConf.create(OmegaConf.to_container(cfg))
    stored = OmegaConf.load(folder / "config.yaml")
    chosen = [item.lstrip("+~").partition("=")[0] for item in overrides]
    given = {section for key in chosen for section in OF_A_GROUP.get(key.partition("@")[0], ())}
    given |= set(BENCHMARK if cfg.eval.benchmark is not None else ())
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
    OmegaConf.resolve(merged)
    prompts.settle(merged.eval, OmegaConf.select(stored, "method.prompts") or {})
    return Subject(f"{folder.name}-{model.name}" if inside else folder.name, str(model), merged)


def back_end(trainer: Mapping[str, Any]) -> str:
    """What completes the problems, by the section `trainer`: the name of a choice of the group `rollout`."""
    return f"vllm_{trainer['vllm_mode']}" if trainer["use_vllm"] else "hf"


def sampled_by(cfg: DictConfig) -> str:
    """`chat` for a server that is asked by messages, else `back_end`."""
    return "chat" if cfg.server else back_end(cfg.trainer)


def check_back_end(subject: Subject) -> None:
    """Refuse vLLM where it cannot be had, before anything is loaded.

    Raises:
        UserError: it is not installed, or cannot do what is set; or the model is to be quantised.
    """
    import torch

    cfg = subject.cfg
    if sampled_by(cfg) in ("hf", "chat"):
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
            for name in sorted(values[0].keys() | value.keys()):
                if not WHEN.fullmatch(name) and values[0].get(name) != value.get(name):
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


def prepare(
    subject: Subject, state: PartialState, role: Literal["train", "eval"] = "eval", read: Sequence[str] = ()
) -> Prepared:
    """Load all but the model.

    Args:
        role: of the problems.
        read: sections, besides those of an evaluation, that the results belong to.

    Raises:
        UserError: the data cannot be had, or are not as many as the benchmark has.
    """
    from rltoken import parts
    from rltoken.evals.generate import even_chunk

    cfg = subject.cfg
    by = sampled_by(cfg)
    with state.main_process_first():
        path = subject.path or parts.source(cfg.model)
        where = cfg.tokenizer if by == "chat" else path
        tokenizer = None if where is None else parts.tokenizer(cfg.model, where)
        if tokenizer is None and cfg.data.get("max_prompt_tokens") is not None:
            raise UserError("tokenizer: data.max_prompt_tokens counts by one; set tokenizer=FOLDER_OR_HUB_ID.")
        appended = None if cfg.eval.self_reward.reference is None else parts.appended(cfg.model, tokenizer)
        problems = parts.problems(cfg.data, role, tokenizer)
        if role == "eval":
            parts.check_count(cfg, len(problems))
        problems = parts.evaluated(problems, cfg.eval)
    chunk = even_chunk(len(problems) * cfg.eval.samples, state.num_processes, cfg.eval.chunk)
    sections = ("model", f"data.{role}", "reward", "eval", LONGEST, *read)
    settings = identity.flat({key: plain(OmegaConf.select(cfg, key)) for key in sections})
    settings |= {"device": state.device.type, "sampled_by": by, "batch": cfg.eval.batch_size if by == "hf" else chunk}
    engines = {
        name: version for name, version in runs.versions().items() if by.startswith("vllm") and name.startswith("vllm")
    }
    facts = {
        "settings": {
            key: value for key, value in settings.items() if key not in identity.FREE and not WHEN.fullmatch(key)
        },
        "model": f"{path} at {cfg.server}" if by == "chat" else identity.digest_of_model(path),
        "eval_data": identity.digest_of_rows(problems),
        "versions": identity.versions() | engines,
        "code": identity.code(cfg),
    }
    if by != "chat" and adapters.is_adapter(path):
        facts["frozen"] = identity.digest_of_model(parts.base_of(cfg.model, path))
    return Prepared(path, tokenizer, problems, facts, appended)


def shards_of(subject: Subject, folder: Path) -> Path:
    """Where the finished batches of a model are kept until all is written."""
    return folder / f"{subject.name}.shards"


def evaluated(subject: Subject, prepared: Prepared, folder: Path, state: PartialState) -> pd.DataFrame:
    """Load one model, evaluate it, write NAME.parquet; its table. What was finished before is read instead."""
    import pandas as pd

    from rltoken import parts
    from rltoken.evals.formats import guided
    from rltoken.evals.generate import evaluate, settings_of

    cfg, tokenizer = subject.cfg, prepared.tokenizer
    done, batches = folder / f"{subject.name}.parquet", shards_of(subject, folder)
    if done.exists() and batches.exists():
        return pd.read_parquet(done)
    settings = settings_of(cfg.eval, cfg.rollout.max_thinking_tokens, prepared.appended)
    scratch = folder / f".{subject.name}.merged"
    with generating(cfg, prepared.path, tokenizer, settings, state, scratch) as generator:
        with state.main_process_first():
            shards.begin(batches, prepared.facts)
        funcs, _, classes = parts.rewards(cfg.reward)
        table = evaluate(
            guided(generator, cfg.eval.format, cfg.model.get("formats"), tokenizer, classes),
            tokenizer,
            prepared.problems,
            parts.correctness(funcs),
            None if sampled_by(cfg) == "chat" else parts.template(cfg.model, tokenizer),
            settings,
            label=subject.name,
            shards=batches,
        )
    if state.is_main_process:
        if settings.samples > 1:
            table = parts.with_answers(table, cfg.reward)
        shards.written(done, table.to_parquet())
        table = pd.read_parquet(done)  # as one that goes on from here would
    return table


@contextlib.contextmanager
def generating(
    cfg: DictConfig,
    path: str,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: Settings,
    state: PartialState,
    scratch: Path,
) -> Iterator[Generator | ChatGenerator]:
    """What samples from the model at `path`; with vLLM its engine ends with the context.

    Args:
        scratch: a folder beside the results, for an adapter that is merged, removed in the end.

    Raises:
        UserError: the model cannot be loaded, merged or served.
    """
    from rltoken import models, parts
    from rltoken.evals.chat import ChatGenerator
    from rltoken.evals.engine import engine
    from rltoken.evals.generators import ServerGenerator, TransformersGenerator, VllmGenerator, ends_of

    sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
    if sampled_by(cfg) == "chat":
        ends = cfg.model.think_end
        yield ChatGenerator(cfg.server.rstrip("/"), path, tokenizer, ends, patience=cfg.rollout.patience, **sampling)
        return
    if back_end(cfg.trainer) == "hf":
        model = parts.model(cfg.model, path).to(state.device)
        yield TransformersGenerator(model, tokenizer, batch_size=settings.batch_size, **sampling)
        return
    if back_end(cfg.trainer) == "vllm_server":
        declared = models.generation_config(path, trust_remote_code=cfg.model.trust_remote_code)
        yield ServerGenerator(
            server_of(cfg.trainer, path),
            ends_of(declared, tokenizer),
            patience=cfg.rollout.patience,
            **sampling,
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
        yield VllmGenerator(llm, ends_of(declared, tokenizer), **sampling)


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


def finish(
    found: Sequence[Subject], tables: Mapping[str, pd.DataFrame], facts: Mapping[str, Any], folder: Path
) -> None:
    """Write summary.csv, curves.png and, last, metrics.json; print the table, and say where everything is."""
    from rltoken import report
    from rltoken.evals.metrics import summary

    summaries = {name: summary(table) for name, table in tables.items()}
    settings = {
        subject.name: {
            **{key: plain(OmegaConf.select(subject.cfg, key)) for key in (*SAME, LONGEST)},
            "model": subject.path or plain(subject.cfg.model.source),
            "sampled_by": sampled_by(subject.cfg),
            "server": subject.cfg.server,
        }
        for subject in found
    }
    results = {
        "settings": settings,
        "versions": runs.versions(),
        "models": summaries,
        "tokens": {name: tokens_of(table) for name, table in tables.items()},
        "identity": facts,
    }
    report.curves(summaries, folder / "curves.png")
    shards.written(folder / "summary.csv", in_rows(found, summaries).to_csv(index=False).encode())
    shards.written(folder / RESULTS, (json.dumps(results, indent=2) + "\n").encode())
    for subject in found:
        shutil.rmtree(shards_of(subject, folder), ignore_errors=True)
    chosen = found[0].cfg.eval
    report.show_comparison(summaries, chosen.benchmark)
    print(
        f"{chosen.benchmark or 'sampled'}: {chosen.samples} samples a problem, temperature {chosen.temperature:g}, "
        f"top-p {chosen.top_p:g}, at most {chosen.max_new_tokens} tokens"
    )
    print(
        f"metrics: {folder / RESULTS}, {folder / 'summary.csv'}, picture: {folder / 'curves.png'}, completions: ",
        end="",
    )
    print(f"{folder}/*.parquet")
    FINISHED.append(folder)


def tokens_of(table: pd.DataFrame) -> dict[str, int | None]:
    """What an evaluation cost: tokens sampled, forced answers included, and tokens of contexts that were computed."""
    return {
        name: int(table[f"{name}_tokens"].sum()) if f"{name}_tokens" in table else None
        for name in ("sampled", "prefilled")
    }


def in_rows(found: Sequence[Subject], summaries: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per model: how it was measured, and every number that is one; `correct@B` is accuracy at budget B."""
    import pandas as pd

    from rltoken.evals.metrics import numbers

    measured = ("benchmark", "temperature", "top_p", "max_new_tokens", "seed")
    return pd.DataFrame.from_records(
        [
            {"model": subject.name, **{key: subject.cfg.eval[key] for key in measured}}
            | numbers(summaries[subject.name])
            for subject in found
        ]
    )


if __name__ == "__main__":
    main()
