"""From the composed configuration to checked objects, and from Hydra's errors to one line that names key and fix."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib.util
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from rltoken import confidential
from rltoken.errors import UserError, first_line, nearest
from rltoken.ranges import Range

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import GRPOConfig, SFTConfig

TOP_LEVEL = (
    "name", "seed", "resume", "on_change", "runs_dir", "world", "model", "teacher", "data", "sft", "reward", "rollout",
    "trainer", "eval", "method",
)  # fmt: skip
ADDED_GROUPS = (
    "exp", "prompt", "control", "rows", "shape", "credit", "mark", "bounds", "weight", "ratio", "aux", "lora",
)  # fmt: skip
"""Groups of which nothing is chosen by default: they take a '+'."""
GROUPS = (*ADDED_GROUPS, "scale", "hardware")
"""Groups of configuration files that have no key of their own at the top level."""
CHOICES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
"""What TRL knows but checks only once training has begun."""
OWNED = {
    "output_dir": "runs_dir and name",
    "seed": "seed",
    "data_seed": "seed",
    "num_generations_eval": "eval.during.samples",
    "per_device_eval_batch_size": "eval.batch_size",
}
"""Fields of GRPOConfig that other keys of the configuration decide."""
OWN = {"max_hours": (Optional[float], None), "max_skipped_steps": (int, 5)}  # noqa: UP045  (OmegaConf needs the old form)
"""Fields of the section `trainer` that are not TRL's: type and default."""
AT_LEAST = {
    "max_completion_length": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_iterations": 1,
    "num_generations": 2, "learning_rate": 0, "beta": 0, "epsilon": 0, "top_k": 0, "max_skipped_steps": 1,
    "ddp_timeout": 1,
}  # fmt: skip
"""The smallest value that makes sense, where TRL takes any."""
AT_LEAST_OR_NULL = {"steps_per_generation": 1, "generation_batch_size": 1, "epsilon_high": 0}
"""The same for fields that may be null."""
PLAIN = (bool, int, float, str)
READ = {
    "model": (
        "source", "think_end", "appended", "forced", "episodes", "formats", "structures", "dtype",
        "attn_implementation", "trust_remote_code", "lora", "adapter", "quantization",
    ),
    "model.forced": ("ellipsis", "header", "stops"),
    "model.episodes": ("separator", "markers"),
    "teacher": ("kind", "source", "url", "ends", "dtype", "attn_implementation", "trust_remote_code"),
    "data": ("train", "eval", "traces", "max_prompt_tokens", "too_long"),
    "sft": ("traces", "merge", "trainer"),
    "reward": ("funcs", "weights", "on_error", "classes", "answer"),
}  # fmt: skip
"""What is read of the sections without a schema; any other key there must be referred to, as in ${data.path}."""


@dataclasses.dataclass
class DuringSchema:
    """The keys of `eval.during` with their types."""

    benchmarks: list[str] = dataclasses.field(default_factory=lambda: ["own"])
    files: Optional[str] = None  # noqa: UP045  (OmegaConf needs the old form)
    limit: Optional[int] = 100  # noqa: UP045  (OmegaConf needs the old form)
    samples: int = 4
    max_new_tokens: int = 112
    budgets: Any = None


@dataclasses.dataclass
class SelfRewardSchema:
    """The keys of `eval.self_reward` with their types."""

    reference: Optional[float] = None  # noqa: UP045  (OmegaConf needs the old form)
    scale: float = 0.1
    temperature: float = 1.0


@dataclasses.dataclass
class EvalSchema:
    """The keys of `eval` with their types."""

    benchmark: Optional[str] = None  # noqa: UP045  (OmegaConf needs the old form)
    count: Any = None
    before: bool = True
    after: bool = True
    samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    limit: Optional[int] = None  # noqa: UP045  (OmegaConf needs the old form)
    format: Optional[str] = None  # noqa: UP045  (OmegaConf needs the old form)
    prompts: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 128
    chunk: int = 512
    max_new_tokens: int = 112
    budgets: Any = None
    max_answer_tokens: int = 128
    seed: int = 1234
    during: DuringSchema = dataclasses.field(default_factory=DuringSchema)
    self_reward: SelfRewardSchema = dataclasses.field(default_factory=SelfRewardSchema)


@dataclasses.dataclass
class RolloutSchema:
    """The keys of `rollout` with their types."""

    max_thinking_tokens: int = 256
    max_answer_tokens: int = 128
    batch_rows: Optional[int] = None  # noqa: UP045  (OmegaConf needs the old form)
    pack_tokens: Any = "auto"
    packing: str = "auto"
    normaliser: str = "thinking"
    max_logp_difference: Any = "auto"
    patience: float = 300.0
    server_options: dict[str, Any] = dataclasses.field(default_factory=dict)


def register_schemas() -> None:
    """Tell Hydra the types of `eval`, `rollout`, `trainer` (TRL's GRPOConfig and `OWN`) and `sft`."""
    for group in ("eval", "rollout", "trainer", "sft"):
        ConfigStore.instance().store(group=group, name="schema", node=SCHEMAS[group]())


def trainer_schema() -> type:
    """A dataclass with `OWN` and GRPOConfig's fields, in types that OmegaConf can check (unions become Any)."""
    from trl import GRPOConfig

    own = [(name, annotation, _field(default)) for name, (annotation, default) in OWN.items()]
    return dataclasses.make_dataclass("GRPOConfigSchema", [*_fields_of(GRPOConfig), *own])


def supervised_schema() -> type:
    """A dataclass of the section `sft`: what to learn from, whether to merge the adapter, and SFTConfig's fields."""
    from trl import SFTConfig

    trainer = dataclasses.make_dataclass("SFTConfigSchema", _fields_of(SFTConfig))
    made = dataclasses.field(default_factory=trainer)
    fields = [("traces", Any, _field(None)), ("merge", bool, _field(False)), ("trainer", trainer, made)]
    return dataclasses.make_dataclass("SFTSchema", fields)


def _fields_of(config: type) -> list[tuple[str, Any, Any]]:
    """Name, type (as OmegaConf can check it) and default of each field of TRL's arguments that is not `OWNED`."""
    found = []
    for field in dataclasses.fields(config):
        if field.name not in OWNED and field.init:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = default.value if isinstance(default, enum.Enum) else default
            found.append((field.name, _checkable(field.type), _field(default)))
    return found


SCHEMAS: Mapping[str, Callable[[], type]] = {
    "eval": lambda: EvalSchema,
    "eval.during": lambda: DuringSchema,
    "eval.self_reward": lambda: SelfRewardSchema,
    "rollout": lambda: RolloutSchema,
    "trainer": trainer_schema,
    "sft": supervised_schema,
}
"""Sections of which only these keys are read; TRL is imported late."""


def to_grpo_config(trainer: DictConfig, *, output_dir: str, seed: int) -> GRPOConfig:
    """TRL's arguments. `bf16: null` means: where the hardware has it.

    Raises:
        UserError: a value or a combination that TRL or transformers refuses, or would refuse once a model is loaded.
    """
    from trl import GRPOConfig

    from rltoken.combinations import refuse_split_groups

    settings, gpu = _on_this_machine(trainer)
    _check_values(settings)
    settings = {key: value for key, value in settings.items() if key not in OWN}
    _check_machine(settings, gpu, "trainer")
    check_vllm(settings, gpu)
    batch, world = settings["per_device_train_batch_size"], int(os.environ.get("WORLD_SIZE", "1"))
    steps = settings["steps_per_generation"] or settings["gradient_accumulation_steps"]
    if settings["generation_batch_size"]:
        steps = settings["generation_batch_size"] // (batch * world) or 1
    refuse_split_groups(batch, steps, settings["num_generations"])
    try:
        # TRL would have its own evaluation loop take whole groups
        args = GRPOConfig(output_dir=output_dir, seed=seed, num_generations_eval=1, **settings)
    except (ValueError, TypeError, ImportError) as error:
        raise _refused(error, settings, "trainer") from error
    _check_optimizer(args, "trainer")
    _check_trackers(args.report_to)
    return args


def to_sft_config(trainer: DictConfig, *, output_dir: str, seed: int) -> SFTConfig:
    """TRL's arguments of the supervised stage, from `sft.trainer`.

    Raises:
        UserError: as `to_grpo_config`.
    """
    from trl import SFTConfig

    settings, gpu = _on_this_machine(trainer)
    for key, least in {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 0}.items():
        if settings[key] is None or settings[key] < least:
            raise UserError(f"sft.trainer.{key}: {settings[key]} is not possible; set it to {least} or more.")
    if settings["eval_strategy"] != "no":
        raise UserError(
            "sft.trainer.eval_strategy: the supervised stage has no problems to evaluate on; set it to no: the run "
            "evaluates what comes out of it (eval.before)."
        )
    _check_machine(settings, gpu, "sft.trainer")
    try:
        args = SFTConfig(output_dir=output_dir, seed=seed, **settings)
    except (ValueError, TypeError, ImportError) as error:
        raise _refused(error, settings, "sft.trainer") from error
    _check_optimizer(args, "sft.trainer")
    _check_trackers(args.report_to)
    return args


def _on_this_machine(trainer: DictConfig) -> tuple[dict[str, Any], bool]:
    """A section of TRL's arguments with `bf16: null` decided, and whether there is a GPU that may be used."""
    import torch

    settings = OmegaConf.to_container(trainer, resolve=True)
    gpu = torch.cuda.is_available() and not settings["use_cpu"]
    if settings["bf16"] is None:
        settings["bf16"] = gpu and not settings["fp16"] and torch.cuda.is_bf16_supported()
    return settings, gpu


def _check_values(settings: Mapping[str, Any]) -> None:
    """Refuse values of single fields that make no sense."""
    for key, least in {**AT_LEAST, **AT_LEAST_OR_NULL}.items():
        value = settings[key]
        if value is None and key in AT_LEAST_OR_NULL:
            continue
        if value is None or value < least:
            raise UserError(f"trainer.{key}: {value} is not possible; set it to {least} or more.")
    if not 0 < settings["temperature"] < math.inf:
        raise UserError(
            f"trainer.temperature: {settings['temperature']} is not possible: rollouts are sampled; set it to a number "
            "above 0."
        )
    if settings["max_hours"] is not None and not settings["max_hours"] > 0:
        raise UserError(f"trainer.max_hours: {settings['max_hours']} is not possible; set it above 0, or to null.")
    if settings["eval_strategy"] == "steps" and settings["eval_steps"] is None:
        raise UserError("trainer.eval_steps: it has no value; set after how many steps to evaluate, as 20.")
    if settings["eval_steps"] is not None and not settings["eval_steps"] > 0:
        raise UserError(
            f"trainer.eval_steps: {settings['eval_steps']} is not possible; set it above 0, or leave it out."
        )
    if settings["enable_jit_checkpoint"]:
        raise UserError("trainer.enable_jit_checkpoint: SIGTERM saves without it, and exactly; leave it out.")
    for key, choices in CHOICES.items():
        if settings[key] not in (*choices, True, False):
            raise UserError(
                f"trainer.{key}: there is no {settings[key]!r}{nearest(str(settings[key]), choices)}; choose one of: "
                f"{', '.join(choices)}."
            )
    if "seed" in (settings["generation_kwargs"] or {}):
        raise UserError(
            "trainer.generation_kwargs.seed: one seed for all would make the completions of a group identical; "
            "remove it and set seed."
        )


def _check_machine(settings: Mapping[str, Any], gpu: bool, section: str) -> None:
    """Refuse what this machine, or what is installed on it, cannot do."""
    import torch
    from transformers.utils import is_liger_kernel_available

    if settings["bf16"] and not (settings["use_cpu"] or (gpu and torch.cuda.is_bf16_supported())):
        raise UserError(
            f"{section}.bf16: this machine has no device with bfloat16; set hardware=auto (what the machine has) or "
            f"hardware=cpu, and {section}.bf16=null."
        )
    if settings["fp16"] and not gpu:
        raise UserError(f"{section}.fp16: it needs a GPU; set {section}.fp16=false.")
    if settings["use_liger_kernel"] and not is_liger_kernel_available():
        raise UserError(
            f"{section}.use_liger_kernel: it is not installed; run: pip install liger-kernel, or set it to false."
        )


def _check_optimizer(args: TrainingArguments, section: str) -> None:
    """Refuse an optimizer whose library is missing: transformers imports it only when training begins."""
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        if "install" not in str(error):
            return  # what it says of the model, which does not exist yet, is no matter of this machine
        raise UserError(
            f"{section}.optim: {args.optim.value} needs a library that is not installed ({error}). Install it, or set "
            f"{section}.optim=adamw_torch."
        ) from error


def check_vllm(settings: Mapping[str, Any], gpu: bool) -> None:
    """Refuse vLLM where it is asked for and cannot be had.

    Args:
        settings: the section `trainer`.
        gpu: whether there is one that may be used.

    Raises:
        UserError: it is not installed, or cannot do on a CPU what is set.
    """
    if settings["use_vllm"] and not gpu:
        from rltoken.rollout import vllm_cpu

        vllm_cpu.refuse(settings)
    elif settings["use_vllm"] and not _installed("vllm"):
        raise UserError("trainer.use_vllm: vLLM is not installed; run: pip install 'rltoken[vllm]', or set rollout=hf.")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _check_trackers(report_to: Sequence[str]) -> None:
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    for name in report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise UserError(
                f"trainer.report_to: there is no tracker {name!r}{nearest(name, known)}; choose none or some of: "
                f"{', '.join(known)}."
            )
        if name not in get_available_reporting_integrations():
            raise UserError(
                f"trainer.report_to: {name} is not installed; run: pip install {name}, or set trainer.report_to=none."
            )


def _refused(error: Exception, settings: Mapping[str, Any], section: str) -> UserError:
    """What TRL or transformers says about the settings, under the key it speaks of where that can be told."""
    text = first_line(error)
    if choice := re.match(r"(\S+) is not a valid \w+, please select one of \[(.*)\]", text):
        value, options = choice[1], [option.strip(" '") for option in choice[2].split(",")]
        key = next((f"{section}.{key}" for key, found in settings.items() if found == value), section)
        return UserError(f"{key}: there is no {value!r}{nearest(value, options)}; choose one of: {', '.join(options)}.")
    key = next((f".{word}" for word in re.findall(r"\w+", text) if word in settings), "")
    return UserError(f"{section}{key}: TRL refuses it: {text.rstrip('.')}. Set it otherwise.")


def check_keys(cfg: DictConfig, top_level: Sequence[str] = TOP_LEVEL) -> None:
    """Refuse what no schema catches: keys at the top that nobody reads, values of a wrong type there, missing values.

    Args:
        cfg: as composed, with its references.
        top_level: the keys that a command has at the top.

    Raises:
        UserError: names the key and the nearest one, or the fix.
    """
    for key in cfg:
        if key == "method" and key not in top_level:
            raise UserError(
                "method: only training has one; leave out +exp=... and the stages, and name what was trained by "
                "'runs=[FOLDER]' or 'models=[FOLDER]'."
            )
        if key not in top_level:
            known = (*(GROUPS if "method" in top_level else ("scale", "hardware")), *top_level)
            raise UserError(
                f"{key}: there is no such key or group{nearest(key, known)}; there are: {', '.join(known)}."
            )
    for key in top_level:
        if key not in cfg:
            raise UserError(f"{key}: it cannot be left out; remove '~{key}' from the command.")
    benchmark = OmegaConf.select(cfg, "eval.benchmark")
    if "method" in top_level and benchmark is not None:
        raise UserError(
            f"eval: {benchmark} is a benchmark for rltoken.evaluate; leave it out, and name the run there: python -m "
            f"rltoken.evaluate eval={benchmark} 'runs=[RUN]'."
        )
    for section, schema in SCHEMAS.items():
        if section.partition(".")[0] not in top_level:
            continue
        fields = [field.name for field in dataclasses.fields(schema())]
        found = OmegaConf.select(cfg, section)
        if not found.keys() >= set(fields):  # what a scale sets stays where the group is left out
            raise UserError(f"{section}: it cannot be left out; remove '~{section}' from the command.")
        for key in found:  # a leading '+' opens what a schema closes
            if key not in fields:
                raise UserError(f"{section}.{key}: there is no such key{nearest(key, fields)}; correct or remove it.")
    for section, fields in READ.items():
        for key in OmegaConf.select(cfg, section) or {}:
            if key not in fields and not re.search(rf"\$\{{[^}}]*\b{key}\b", OmegaConf.to_yaml(cfg)):
                raise UserError(f"{section}.{key}: nothing reads it{nearest(key, fields)}; correct or remove it.")
    for key in sorted(OmegaConf.missing_keys(cfg), key=len):
        raise UserError(f"{key}: it has no value yet; set {key}=...")
    if missing := [key for key in READ["reward"] if key != "answer" and key not in (cfg.reward or {})]:
        raise UserError(
            f"reward.{missing[0]}: it is missing, since what was chosen is only to be added to a reward; choose both, "
            "as in 'reward=[math,overlong]'."
        )
    if "method" in top_level:
        _check_run_keys(cfg)


def _check_run_keys(cfg: DictConfig) -> None:
    """Refuse values of a wrong type at the top of a training run's configuration."""
    if isinstance(cfg.seed, bool) or not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed: {cfg.seed!r} is no whole number from 0 to 4294967295; set seed=0.")
    if cfg.resume is not None and not isinstance(cfg.resume, str):
        raise UserError(f"resume: {cfg.resume!r} is neither auto nor a path; set resume=auto or resume=null.")
    if cfg.on_change not in ("refuse", "accept"):
        raise UserError(f"on_change: {cfg.on_change!r} is unknown; use 'refuse' or 'accept'.")
    if cfg.runs_dir is None:
        raise UserError("runs_dir: it has no value; set runs_dir=runs.")
    for key, node in (
        ("method", cfg.method),
        *((f"method.{slot}", stages) for slot, stages in (cfg.method or {}).items()),
    ):
        if not isinstance(node, DictConfig):
            raise UserError(f"{key}: {node!r} holds no stages; leave it out, or set {key}={{}} for none.")


def check_values(cfg: DictConfig) -> None:
    """Refuse values of `model`, `eval`, `rollout` and `reward` that would only fail once a model is loaded.

    Raises:
        UserError: names the key and the fix.
    """
    from rltoken.adapters import check_quantization
    from rltoken.evals import formats

    confidential.refuse(cfg, sys.argv[1:])
    check_quantization(cfg)
    least = {"eval.samples": 1, "eval.batch_size": 1, "eval.max_new_tokens": 1, "eval.limit": 1}
    least |= {"eval.seed": 0, "rollout.max_thinking_tokens": 1, "rollout.max_answer_tokens": 1, "rollout.batch_rows": 1}
    least |= {f"eval.during.{key}": 1 for key in ("limit", "samples", "max_new_tokens")}
    least |= {
        "eval.chunk": 1,
        "eval.max_answer_tokens": 1,
        "reward.workers": 0,
        "reward.seconds": 0.1,
        "rollout.patience": 1,
    }
    may_be_auto = {"rollout.pack_tokens": 1, "rollout.max_logp_difference": 0}
    for key in may_be_auto:
        value = OmegaConf.select(cfg, key)
        if isinstance(value, str) and value != "auto":
            raise UserError(f"{key}: {value!r} is no number; set auto, null or a number.")
    for key, smallest in (least | may_be_auto).items():
        value = OmegaConf.select(cfg, key)
        if value not in (None, "auto") and not value >= smallest:  # nor no number
            raise UserError(f"{key}: {value} is not possible; set it to {smallest} or more.")
    choices_of = {
        "rollout.packing": ("auto", "rows", "tree", "flex"),
        "rollout.normaliser": ("thinking", "all"),
        "reward.on_error": ("stop", "crash"),
    }
    for key, choices in choices_of.items():
        value = OmegaConf.select(cfg, key)
        if value not in choices:
            raise UserError(f"{key}: there is no {value!r}; choose one of: {', '.join(choices)}.")
    _check_budgets(cfg, "eval")
    _check_budgets(cfg, "eval.during")
    _check_ranges("eval", cfg.eval, {"temperature": Range(least=0), "top_p": Range(above=0, most=1)})
    formats.check(cfg)
    _check_self_reward(cfg)
    _check_forced(cfg.model.forced)
    if "method" in cfg and cfg.rollout.max_thinking_tokens > cfg.trainer.max_completion_length:
        raise UserError(
            f"rollout.max_thinking_tokens: {cfg.rollout.max_thinking_tokens} is more than a completion may have; lower "
            f"it, or raise trainer.max_completion_length={cfg.trainer.max_completion_length}."
        )
    if not cfg.reward.funcs:
        raise UserError("reward.funcs: there is no reward function; choose reward=math or name one under reward.funcs.")
    key = "reward.weights" if cfg.reward.weights is not None else "trainer.reward_weights"
    weights = OmegaConf.select(cfg, key)
    if weights is not None and len(weights) != len(cfg.reward.funcs):
        raise UserError(
            f"{key}: {len(weights)} weights for {len(cfg.reward.funcs)} reward functions "
            f"({', '.join(cfg.reward.funcs)}); give one for each."
        )


def _check_budgets(cfg: DictConfig, key: str) -> None:
    """Refuse budgets of a section that are none or too long."""
    from rltoken.rollout.forced import in_tokens

    section = OmegaConf.select(cfg, key)
    try:
        points = in_tokens(section.budgets, cfg.rollout.max_thinking_tokens) if section.budgets else [1]
    except (ValueError, TypeError) as error:
        raise UserError(f"{key}.budgets: {first_line(error)}.") from error
    if points[-1] > section.max_new_tokens:
        raise UserError(
            f"{key}.budgets: a budget of {points[-1]} tokens is more than a completion may have; lower it, or raise "
            f"{key}.max_new_tokens={section.max_new_tokens}."
        )


def _check_ranges(section: str, values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    for key, allowed in ranges.items():
        try:
            allowed(values[key])
        except ValueError as error:
            raise UserError(f"{section}.{key}: {error}.") from error


def _check_self_reward(cfg: DictConfig) -> None:
    """Refuse settings of self-rewards that are none, or that what samples cannot give."""
    asked = cfg.eval.self_reward
    if asked.reference is None:
        return
    above = Range(above=0)
    _check_ranges("eval.self_reward", asked, {"reference": Range(), "scale": above, "temperature": above})
    if cfg.model.get("appended") is None:
        raise UserError(
            "model.appended: a self-reward is the probability of a token that the model never writes; set one of its "
            "tokenizer, or set eval.self_reward.reference=null."
        )
    if cfg.get("server"):
        raise UserError(
            "eval.self_reward.reference: chat completions give no log-probability of a token of one's choice; set it "
            "to null, or leave server out and set rollout=vllm_server for a vLLM server."
        )
    if cfg.trainer.use_vllm and asked.temperature != 1:
        raise UserError(
            f"eval.self_reward.temperature: vLLM gives log-probabilities of a prompt at temperature 1, and not at "
            f"{asked.temperature:g}; set rollout=hf, or set it to 1 with a reference measured there."
        )


def _check_forced(forced: DictConfig | None) -> None:
    """Refuse a template for forced answers that is none."""
    if not OmegaConf.is_dict(forced):
        raise UserError("model.forced: it holds no template; give it ellipsis, header and stops, or choose model=hf.")
    for key in ("ellipsis", "header"):
        if not isinstance(forced.get(key), str):
            raise UserError(f"model.forced.{key}: {forced.get(key)!r} is no text; set it to a text, or to '' for none.")
    stops = forced.get("stops")
    if not OmegaConf.is_list(stops) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"model.forced.stops: {stops!r} is no list of texts; set it to such a list, or to [].")


def explain(
    error: Exception, keys: Iterable[str], groups: Mapping[str, Iterable[str]], overrides: Sequence[str] = ()
) -> UserError:
    """Hydra's or OmegaConf's error about the command line or a config file as one line with the nearest valid names.

    Args:
        error: what composition, or the resolution of a value, raised.
        keys: every key of the configuration as it would be without the mistake, dotted.
        groups: group -> its choices.
        overrides: the command line, for errors that do not say where they come from.
    """
    text = "\n".join(str(link) for link in _chain(error))
    named = re.search(r"full_key: (\S+)", text)
    key = named[1] if named else "configuration"
    return (
        _wrong_choice(text, groups, overrides)
        or _wrong_value(text, key, overrides)
        or _wrong_key(text, named and key, keys, groups, overrides)
        or UserError(f"command line: {first_line(error)}")
    )


def _wrong_choice(text: str, groups: Mapping[str, Iterable[str]], overrides: Sequence[str]) -> UserError | None:
    if found := re.search(r"Could not (?:find|load) '([\w/]+)/([^'/]*)'", text):
        group, name = found.groups()
        if group == "hydra/launcher" and "submitit" in name:
            return UserError(
                "hardware=slurm: Hydra's launcher for SLURM is not installed; run: pip install 'rltoken[slurm]'."
            )
        while group not in groups and "/" in group:
            group, _, parent = group.rpartition("/")
            name = f"{parent}/{name}"
        options = sorted(groups.get(group, ()))
        return UserError(
            f"{group}={name}: there is no such choice{nearest(name, options)}; '{group}' has: {', '.join(options)}."
        )
    if found := re.search(r"Multiple values for ([\w/]+)\. To override a value use 'override [\w/]+: (.*)'", text):
        group, name = found.groups()
        return UserError(
            f"{group}: it is chosen twice; write {group}={name} without a '+' where it has a default, and several "
            f"choices of one group as '+{group}=[a,b]'."
        )
    if found := re.search(r"([\w/@.]+) appears more than once in the final defaults list", text):
        return UserError(f"{found[1]}: it is chosen twice; write several choices of one group as '+{found[1]}=[a,b]'.")
    if found := re.search(r"Could not (?:override|delete) '([\w/]+)'\. No match in the defaults list", text):
        group = found[1]
        if group in groups:
            return UserError(f"{group}: nothing of this group is chosen yet, so it takes a '+': +{group}=CHOICE.")
    if "Config group override must be a string or a list" in text:
        item = next((item for item in overrides if item.lstrip("+").partition("=")[0] in groups and "null" in item), "")
        group = item.lstrip("+").partition("=")[0] or "command line"
        return UserError(f"{group}: a group cannot be null; choose one of: {', '.join(sorted(groups.get(group, ())))}.")
    return None


def _wrong_value(text: str, key: str, overrides: Sequence[str]) -> UserError | None:
    if found := re.search(
        r"(Value '.*' .*could not be converted to \w+|Value '.*' is not a valid \w+|"
        r"Incompatible value '.*' for field of type '.*')",
        text,
    ):
        return UserError(f"{key}: {found[1]}; give a value of that type.")
    if "is not Optional" in text:
        return UserError(f"{key}: it cannot be null; give it a value.")
    if found := re.search(r"Interpolation key '([^']+)' not found", text):
        stage = re.match(r"method\.(\w+?)s?\.(\w+)", found[1])
        fix = f"choose that too, as in +{stage[1]}={stage[2]}" if stage else "correct the reference"
        return UserError(f"{key}: it refers to ${{{found[1]}}}, which does not exist; {fix}.")
    if found := re.search(r"[Mm]issing mandatory value: ([\w.]+)", text):
        return UserError(f"{found[1]}: it has no value yet; set {found[1]}=...")
    if "does not support deletion" in text:
        return UserError(f"{key}: it cannot be left out; set {key}=... instead.")
    if found := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^=]+)=(.*)'", text):
        key, values = found.groups()
        listed = "" if "(" in values else f", or write one list as {key}=[{values}]"
        return UserError(f"{key.lstrip('+')}: {values} are several values; add --multirun for a run of each{listed}.")
    if found := re.search(r"Error parsing override '(.*)'", text):
        return UserError(
            f"{found[1]}: this is no override; write key=value, and quote what the shell would take apart."
        )
    if found := re.search(
        r"(?:no viable alternative|mismatched input|token recognition error|extraneous input).*", text
    ):
        near = re.search(r"at input '(.*)'", found[0])
        item = next((item for item in overrides if near and near[1] in item), "command line")
        return UserError(f"{item.partition('=')[0]}: {found[0]}; write key=value, with quotes and brackets closed.")
    return None


def _wrong_key(
    text: str,
    full_key: str | None,
    keys: Iterable[str],
    groups: Mapping[str, Iterable[str]],
    overrides: Sequence[str],
) -> UserError | None:
    found = re.search(r"Could not (?:override|append to config|delete).*?'([^']+)'", text)
    key = found[1] if found else full_key
    if key is None:
        return None
    head, _, field = key.rpartition(".")
    if head == "trainer" and field in OWNED:
        return UserError(f"{key}: it follows from {OWNED[field]}; set {OWNED[field].split()[0]}=... instead.")
    near = nearest_key(key, [*keys, *groups])
    # Hydra composes a sweep once without what is swept, and takes a key that comes with that for a mistake
    chosen = [item for item in overrides if item.lstrip("+").partition("=")[0] in groups]
    swept = next((item for item in chosen if re.search(r"=[^\[]*,", item)), None)
    if swept and f"override '{key}'" in text:
        return UserError(
            f"{key}: there is no such key without what is swept{near}; if it comes with {swept}, write ++{key}=VALUE."
        )
    return UserError(
        f"{key}: there is no such key{near}. 'python -m rltoken.train --cfg job' prints all of them; a leading '+' "
        "adds a group such as +exp=grpo."
    )


def nearest_key(name: str, known: Iterable[str]) -> str:
    """The same for a dotted key: the first part of it that is wrong is compared with what stands at its place."""
    known, parts = set(known) - {name}, name.split(".")
    wrong = next((i for i in range(len(parts)) if ".".join(parts[: i + 1]) not in known), len(parts) - 1)
    prefix = ".".join(parts[:wrong])
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == prefix]
    near = difflib.get_close_matches(parts[wrong], sorted(siblings), n=1, cutoff=0.6)
    if near:
        fixed = ".".join([*parts[:wrong], near[0]])
        whole = ".".join([fixed, *parts[wrong + 1 :]])
        return f" (did you mean '{whole if whole in known else fixed}'?)"
    elsewhere = sorted(key for key in known if key.rpartition(".")[2] == parts[-1])
    return f" (did you mean '{elsewhere[0]}'?)" if elsewhere else ""


def flat_keys(cfg: DictConfig) -> list[str]:
    """Every key of a configuration, dotted."""
    keys = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return keys


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def _checkable(annotation: Any) -> Any:
    """The annotation where OmegaConf can check it: a plain type or an optional one; Any otherwise."""
    if annotation in PLAIN:
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        if len(parts) == 1 and parts[0] in PLAIN:
            return Optional[parts[0]]  # noqa: UP045  (OmegaConf needs the old form)
    return Any


def _field(default: Any) -> Any:
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default)
    return dataclasses.field(default=None if default is dataclasses.MISSING else default)
