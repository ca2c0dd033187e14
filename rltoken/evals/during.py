"""Evaluation during training: what `trainer.eval_strategy=steps trainer.eval_steps=N` measures.

    trainer.eval_strategy=steps trainer.eval_steps=20 'eval.during.benchmarks=[own,aime24]'

Each benchmark is sampled from the weights as they stand, by what training samples with, from seeds of its own that are
the same at every step; training never notices. It takes the place of TRL's evaluation loop, which samples and scores
with the settings of training, and has no budgets.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from datasets import Dataset
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rltoken import cli, parts
from rltoken.errors import UserError, nearest
from rltoken.evals import shards
from rltoken.evals.formats import guided
from rltoken.evals.generate import Settings, evaluate, settings_of
from rltoken.evals.generators import Generator, ServerGenerator, TransformersGenerator, VllmGenerator, ends_of
from rltoken.evals.metrics import ANSWER_CLASS, AT_BUDGET, OUTCOME, UNGRADED, numbers, summary
from rltoken.evals.samples import NO_ANSWER
from rltoken.rollout.forced import in_tokens

if TYPE_CHECKING:
    from rltoken.trainer import TokenGRPOTrainer

OWN = "own"
"""The name of the run's own evaluation problems among the benchmarks."""
BROUGHT = ("data", "reward", "eval")
"""Sections that a benchmark brings."""
SET = ("limit", "samples", "max_new_tokens", "budgets")
"""Keys of `eval.during` that go before those of the benchmark."""
FIX = re.compile(r"[.;] (?:[Aa]dd|[Cc]orrect|[Ss]et) ")
"""What begins the part of a message that names keys of a command of its own."""
FILES = (".jsonl", ".json", ".parquet")
FOLDER = "evaluations"
"""Where, in a run directory, the completions and the metrics of each benchmark and step are kept."""


@dataclass(frozen=True)
class Benchmark:
    """What is evaluated, and how."""

    name: str
    problems: Dataset
    reward: Callable[..., list[float | None]]
    section: DictConfig
    settings: Settings
    guide: Callable[[Generator], Generator]


class Evaluation:
    """Evaluates benchmarks and keeps what came out.

    Args:
        configured: the benchmarks, in their order, from `configured`.
        folder: the run directory.
        alone: makes a context in which the terminal is free for a progress bar.
    """

    def __init__(
        self,
        configured: Mapping[str, DictConfig],
        folder: Path,
        alone: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._configured, self._folder, self._alone = configured, folder / FOLDER, alone
        self.benchmarks: list[Benchmark] = []

    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
        """Load problems and graders; the problems of each benchmark.

        Raises:
            UserError: some cannot be had.
        """
        self.benchmarks = [loaded(name, cfg, tokenizer) for name, cfg in self._configured.items()]
        return {benchmark.name: benchmark.problems for benchmark in self.benchmarks}

    def __call__(self, trainer: TokenGRPOTrainer) -> dict[str, float]:
        """The numbers of the weights as they stand, as NAME/METRIC; every rank must call it, and gets the same.

        Writes evaluations/NAME/step-N.parquet, one row per completion, and step-N.json, all metrics; the latter last.
        """
        found: dict[str, float] = {}
        for benchmark in self.benchmarks:
            with self._alone(), generating(trainer, benchmark.settings) as generator:
                table = evaluate(
                    benchmark.guide(generator),
                    trainer.processing_class,
                    benchmark.problems,
                    benchmark.reward,
                    trainer.template,
                    benchmark.settings,
                    label=f"{benchmark.name} at step {trainer.state.global_step}",
                )
            if benchmark.settings.samples > 1:
                table = parts.with_answers(table, benchmark.section)
            metrics = summary(table)
            if trainer.accelerator.is_main_process:
                place = self._folder / benchmark.name / f"step-{trainer.state.global_step:06d}"
                place.parent.mkdir(parents=True, exist_ok=True)
                shards.written(place.with_suffix(".parquet"), table.to_parquet())
                shards.written(place.with_suffix(".json"), (json.dumps(metrics, indent=2) + "\n").encode())
            found |= {f"{benchmark.name}/{key}": value for key, value in numbers(metrics).items() if value is not None}
        return found


class KeptEvaluations(TrainerCallback):
    """Drop what was evaluated after the checkpoint that training goes on from: it will be evaluated again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Remove files of later steps."""
        if state.is_world_process_zero:
            for path in self._folder.glob("*/step-*.*"):
                if int(path.name.removeprefix("step-").partition(".")[0]) > state.global_step:
                    path.unlink()


@contextlib.contextmanager
def generating(trainer: TokenGRPOTrainer, settings: Settings) -> Iterator[Generator]:
    """What samples from the model as it stands: the trainer's vLLM engine or server, or transformers."""
    tokenizer = trainer.processing_class
    ends = ends_of(trainer.accelerator.unwrap_model(trainer.model).generation_config, tokenizer)
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
    if trainer.serves_alone:
        with trainer.serving() as llm:
            yield VllmGenerator(llm, ends, **sampling)
    elif trainer.server_url:
        trainer.hand_over()
        yield ServerGenerator(trainer.server_url, ends, patience=trainer.patience, **sampling)
    else:
        with trainer.whole_weights() as model:
            yield TransformersGenerator(model, tokenizer, batch_size=settings.batch_size, **sampling)


def configured(cfg: DictConfig) -> dict[str, DictConfig]:
    """Benchmark -> the configuration of the run with that benchmark's problems, prompt, sampling and grader in it.

    Nothing is loaded. Empty where nothing is evaluated during training.

    Args:
        cfg: of the run, checked and resolved.

    Raises:
        UserError: there is no such benchmark, or it is named twice, or its file is not there; or benchmarks are named
            and nothing says when.
    """
    names = list(cfg.eval.during.benchmarks)
    if cfg.trainer.eval_strategy == "no":
        if names != [OWN]:
            raise UserError(
                "eval.during.benchmarks: nothing says when to evaluate them; add trainer.eval_strategy=steps "
                "trainer.eval_steps=20."
            )
        return {}
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"eval.during.benchmarks: {names} names {'one twice' if names else 'none'}; name each once, {OWN} for the "
            "run's own problems."
        )
    found = {name: _configured(cfg, name) for name in names}
    _refuse_other_best(cfg.trainer, found)
    return found


def _refuse_other_best(trainer: DictConfig, found: Mapping[str, DictConfig]) -> None:
    """Refuse to choose the best checkpoint by what no evaluation gives: it would end training at the first of them."""
    metric = trainer.metric_for_best_model
    if metric is None and not trainer.load_best_model_at_end:
        return
    name, _, key = str(metric).removeprefix("eval_").partition("/")
    if name in found and (key in always_measured(found[name]) or found[name].eval.self_reward.reference is not None):
        return
    known = [f"{name}/{key}" for name, cfg in found.items() for key in always_measured(cfg)]
    told = "it has no value" if metric is None else f"not every evaluation measures {metric}{nearest(metric, known)}"
    raise UserError(f"trainer.metric_for_best_model: {told}; set BENCHMARK/METRIC, as {next(iter(found))}/accuracy.")


def always_measured(cfg: DictConfig) -> list[str]:
    """The metrics that an evaluation logs whatever comes out: those of one in which nothing is right.

    Args:
        cfg: of a benchmark, from `configured`.
    """
    table = pd.DataFrame({"id": range(1 if cfg.eval.limit == 1 else 2), "correct": 0.0, "outcome": UNGRADED})
    table = table.assign(thinking_tokens=1, completion_tokens=2, truncated=True)
    for budget in in_tokens(cfg.eval.budgets, cfg.rollout.max_thinking_tokens) if cfg.eval.budgets else ():
        table = table.assign(**{f"{AT_BUDGET}{budget}": 0.0, f"{OUTCOME}@{budget}": UNGRADED})
    if any(cfg.reward.get(key) is not None for key in ("answer", "classes")):
        table[ANSWER_CLASS] = NO_ANSWER
    metrics = summary(pd.concat([table] * cfg.eval.samples))
    return [key for key, value in numbers(metrics).items() if value is not None]


def _configured(cfg: DictConfig, name: str) -> DictConfig:
    found = OmegaConf.create(OmegaConf.to_container(cfg))
    if name != OWN:
        brought = _composed(name)
        for section in BROUGHT:
            found[section] = brought[section]
        if cfg.eval.during.files is not None:
            found.data.eval_path = str(_file(Path(cfg.eval.during.files), name))
    found.eval = OmegaConf.merge(found.eval, {key: cfg.eval.during[key] for key in SET})
    found.eval.max_answer_tokens, found.eval.prompts = cfg.eval.max_answer_tokens, cfg.eval.prompts
    OmegaConf.resolve(found)
    return found


def _composed(name: str) -> DictConfig:
    """The configuration of rltoken.evaluate with a benchmark."""
    with contextlib.ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():
            stack.enter_context(initialize_config_module(cli.CONFIG_MODULE, version_base="1.3"))
        known = [choice for choice in cli.choices("eval") if choice != "default"]
        if name not in known:
            raise UserError(
                f"eval.during.benchmarks: there is no {name!r}{nearest(name, [OWN, *known])}; there are: {OWN}, "
                f"{', '.join(sorted(known))}."
            )
        return compose("evaluate", overrides=[f"eval={name}"])


def _file(folder: Path, name: str) -> Path:
    for path in (folder.expanduser() / f"{name}{ending}" for ending in FILES):
        if path.is_file():
            return path
    raise UserError(
        f"eval.during.files: {folder} has no {name}{FILES[0]}, nor {' nor '.join(FILES[1:])}; put it there, or set "
        "eval.during.files=null to read the hub."
    )


def loaded(name: str, cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Benchmark:
    """A benchmark with its problems and its grader.

    Args:
        name: of the benchmark.
        cfg: its configuration, from `configured`.
        tokenizer: of the model.

    Raises:
        UserError: its problems cannot be had, or are not as many as there must be, or are too long for the engine.
    """
    try:
        problems = parts.problems(cfg.data, "eval", tokenizer)
        parts.check_count(cfg, len(problems))
    except (UserError, InstantiationException) as error:
        found = cli.user_error(error)
        if name == OWN or found is None:
            raise
        reason = re.split(FIX, str(found).partition(": ")[2])[0]
        raise UserError(
            f"eval.during.benchmarks: {name} cannot be had: {reason}; put {name}.jsonl into a folder, and set "
            "eval.during.files=FOLDER."
        ) from error
    problems = parts.evaluated(problems, cfg.eval)
    if cfg.trainer.use_vllm and cfg.trainer.vllm_max_model_length is not None:
        _refuse_too_long(name, problems, cfg, tokenizer)
    graders, _, alike = parts.rewards(cfg.reward)
    return Benchmark(
        name,
        problems,
        parts.correctness(graders),
        cfg.reward,
        settings_of(cfg.eval, cfg.rollout.max_thinking_tokens, parts.appended(cfg.model, tokenizer)),
        functools.partial(
            guided, chosen=cfg.eval.format, formats=cfg.model.get("formats"), tokenizer=tokenizer, alike=alike
        ),
    )


def _refuse_too_long(name: str, problems: Dataset, cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = tokenizer.apply_chat_template(
        problems["prompt"][:], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    room = cfg.trainer.vllm_max_model_length - max(map(len, prompts))
    if cfg.eval.max_new_tokens > room:
        raise UserError(
            f"eval.during.max_new_tokens: beside the longest prompt of {name} vLLM has room for {room} tokens, and not "
            f"for {cfg.eval.max_new_tokens}; lower it, or raise trainer.vllm_max_model_length."
        )
    if cfg.eval.budgets:
        budget = in_tokens(cfg.eval.budgets, cfg.rollout.max_thinking_tokens)[-1]
        forced = budget + len(parts.template(cfg.model, tokenizer).cut) + cfg.eval.max_answer_tokens
        if forced > room:
            raise UserError(
                f"eval.during.budgets: beside the longest prompt of {name} vLLM has room for {room} tokens, and not "
                f"for {forced}, thinking cut at {budget} and its forced answer; lower them or eval.max_answer_tokens, "
                "or raise trainer.vllm_max_model_length."
            )
