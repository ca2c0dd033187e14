"""Adapters: settings of a new one, a base in 4 bits, and one that is there already, found and put on its base."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from rltoken.errors import UserError, first_line

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor
    from transformers import BitsAndBytesConfig, PreTrainedModel

CONFIG = "adapter_config.json"
"""The file by which an adapter's folder is known."""
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ELSEWHERE = "put it back, or set model.adapter={folder} model=hf model.path=FOLDER_OF_THE_BASE"
"""What to do where a base is not at the place that its adapter names."""

logger = logging.getLogger(__name__)

# A new adapter


def lora(config: Mapping[str, object] | None) -> LoraConfig | None:
    """The configuration of a new adapter: None trains all weights, or the adapter that is given.

    Args:
        config: keyword arguments of `peft.LoraConfig`; the task type is set here.

    Raises:
        UserError: a keyword that `peft.LoraConfig` does not have, or a value that it or the trainer refuses.
    """
    if config is None:
        return None
    from peft import LoraConfig

    names = [field.name for field in dataclasses.fields(LoraConfig)]
    settings = _known(config, names, "model.lora", "peft.LoraConfig")
    targets = settings.get("target_modules") or []
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        raise UserError(
            "model.lora.target_modules: log-probabilities are computed from the weights of 'lm_head' themselves, so "
            "that its adapter would never be trained; leave it out."
        )
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **settings})
    except (TypeError, ValueError) as error:
        raise UserError(f"model.lora: peft.LoraConfig refuses it: {first_line(error)} Correct that setting.") from error


def quantization(config: Mapping[str, object] | None) -> BitsAndBytesConfig | None:
    """How bitsandbytes stores the weights of the base: None leaves them as they are.

    Args:
        config: keyword arguments of `transformers.BitsAndBytesConfig`.

    Raises:
        UserError: a keyword that `BitsAndBytesConfig` does not have, or a value it refuses.
    """
    if config is None:
        return None
    from transformers import BitsAndBytesConfig

    names = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    settings = _known(config, names, "model.quantization", "transformers.BitsAndBytesConfig")
    try:
        made = BitsAndBytesConfig(**settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"model.quantization: BitsAndBytesConfig refuses it: {first_line(error).rstrip('.')}; correct that setting."
        ) from error
    if not made.is_quantizable():
        raise UserError(
            "model.quantization: it quantises nothing; set model.quantization.load_in_4bit=true, or "
            "model.quantization=null."
        )
    return made


def check_quantization(cfg: DictConfig) -> None:
    """Refuse `model.quantization` where it is wrong, makes no sense, or cannot be had on this machine.

    Raises:
        UserError: as `quantization`; all weights would be trained; there is no GPU, or no bitsandbytes.
    """
    if quantization(cfg.model.get("quantization")) is None:
        return
    import torch

    if "method" in cfg and cfg.model.lora is None and cfg.model.get("adapter") is None:
        raise UserError(
            "model.quantization: quantised weights cannot be trained, an adapter on them can; add +lora=qlora, or set "
            "model.quantization=null."
        )
    if cfg.trainer.use_cpu or not torch.cuda.is_available():
        why = "trainer.use_cpu is true" if cfg.trainer.use_cpu else "this machine has none"
        raise UserError(
            f"model.quantization: it needs a GPU, and {why}; set model.quantization=null (+lora=default trains the "
            "same adapter), or hardware=gpu on a machine with one."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantization: bitsandbytes is not installed; run: pip install 'rltoken[qlora]', or set "
            "model.quantization=null."
        )


def _known(config: Mapping[str, object], names: Iterable[str], key: str, owner: str) -> dict[str, Any]:
    """The settings as plain values, if all of them are among the names that the owner takes."""
    settings, names = OmegaConf.to_container(OmegaConf.create(dict(config)), resolve=True), sorted(names)
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise UserError(f"{key}.{name}: {owner} has no such setting. Did you mean {key}.{near}?")
    return settings


# One that is there already


def is_adapter(path: str | Path) -> bool:
    """Whether a path is the folder of an adapter."""
    return (Path(path).expanduser() / CONFIG).is_file()


def has_tokenizer(path: str | Path) -> bool:
    """Whether an adapter's folder also holds the tokenizer that it was trained with."""
    return (Path(path).expanduser() / "tokenizer_config.json").is_file()


def find(path: str | Path, key: str) -> str:
    """The folder of the adapter that a path names.

    Args:
        path: an adapter's folder (so also RUN/final or RUN/checkpoint-N), or a run directory, whose final one is meant.
        key: where the path comes from, for the message.

    Raises:
        UserError: there is no adapter, or one without weights.
    """
    places = [Path(path).expanduser(), Path(path).expanduser() / "final"]
    for folder in places:
        if is_adapter(folder):
            if not any((folder / name).is_file() for name in WEIGHTS):
                raise UserError(f"{key}: {folder} has no {WEIGHTS[0]}; copy the whole folder of the adapter.")
            return str(folder)
    for folder in places:
        if (folder / "config.json").is_file():
            raise UserError(
                f"{key}: {folder} is a whole model and no adapter: there is nothing to put on a base or to merge; "
                f"model=hf model.path={folder} loads it as it is."
            )
    if (places[0] / "config.yaml").is_file():
        raise UserError(f"{key}: the run {path} has no final adapter yet; name a checkpoint: {path}/checkpoint-N.")
    raise UserError(f"{key}: {path} is no folder with {CONFIG}; set it to what a run with +lora wrote, as RUN/final.")


def base_of(adapter: str | Path, key: str = "model.adapter", fix: str = ELSEWHERE) -> str:
    """The base that an adapter names in its configuration: a folder or a hub id.

    Args:
        adapter: its folder.
        key: where it comes from, for the message.
        fix: what to do where the base cannot be had; `{folder}` in it stands for the adapter's.

    Raises:
        UserError: it names none, or one that cannot be had.
    """
    from rltoken.models import existing

    name = base_name(adapter)
    if not name:
        raise UserError(f"{key}: {adapter} does not say which model it is for; {fix.format(folder=adapter)}.")
    try:
        return existing(name)
    except UserError as error:
        raise UserError(
            f"{key}: {adapter} was trained on {name}, which cannot be had; {fix.format(folder=adapter)}."
        ) from error


def base_name(adapter: str | Path) -> str | None:
    """The folder or hub id of the model that an adapter was trained on, as it says."""
    return json.loads((Path(adapter).expanduser() / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")


def settle(cfg: DictConfig) -> None:
    """Fill in what `model.adapter` implies, before the configuration is checked: its folder, and a missing model.path.

    Raises:
        UserError: there is no such adapter, or its base cannot be had, or a new adapter is asked for too.
    """
    model = cfg.get("model")
    if not OmegaConf.is_dict(model) or model.get("adapter") is None:
        return
    if model.get("lora") is not None:
        raise UserError(
            "model.lora: model.adapter is trained further as it is; leave out +lora (set model.lora=null where the "
            "scale brings one), or leave out model.adapter to train a new one."
        )
    model.adapter = find(str(model.adapter), "model.adapter")
    if "path" not in model.keys():  # noqa: SIM118  (a missing value is not `in` a DictConfig)
        base_of(model.adapter)
    elif OmegaConf.is_missing(model, "path"):
        model.path = base_of(model.adapter)
    elif model.path != base_name(model.adapter):
        logger.warning(
            "model.adapter: %s was trained on %s and is put on %s, which should be a copy of that.",
            model.adapter,
            base_name(model.adapter),
            model.path,
        )


def attached(
    model: PreTrainedModel, adapter: str | Path, base: str, *, trainable: bool = False, key: str = "model.adapter"
) -> PeftModel:
    """The model with an adapter on it.

    Args:
        model: the base.
        adapter: the adapter's folder.
        base: where the base comes from; it is noted for whoever loads what is trained from here.
        trainable: whether the adapter is to be trained further.
        key: where the adapter comes from, for the message.

    Raises:
        UserError: the adapter does not fit the base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        adapted = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise _does_not_fit(key, adapter, base, "its layers have other shapes") from error
    except ValueError as error:
        raise _does_not_fit(key, adapter, base, first_line(error)) from error
    saved = load_peft_weights(adapter, device="cpu").keys()
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    # peft passes over weights that have no place, and only warns of layers without weights
    if own - saved or saved - own - adapted.state_dict().keys():
        raise _does_not_fit(key, adapter, base, "it has more layers or fewer")
    adapted.peft_config[adapted.active_adapter].base_model_name_or_path = base
    return adapted


def _does_not_fit(key: str, adapter: str | Path, base: str, reason: str) -> UserError:
    return UserError(
        f"{key}: {adapter} does not fit {base}: {reason.rstrip('.')}. It was trained on {base_name(adapter)}: "
        "take that, or a copy of it."
    )


def merged(layer: BaseTunerLayer, name: str) -> Tensor:
    """A parameter of an adapted layer's base with its active adapters merged in; the layer is left as it was.

    Args:
        layer: with its adapters apart.
        name: `weight` or `bias`.
    """
    base = layer.get_base_layer()
    before = {key: value.detach().clone() for key, value in base.named_parameters(recurse=False)}
    layer.merge()
    found = getattr(base, name).detach().clone()
    for key, value in before.items():
        getattr(base, key).data.copy_(value)
    layer.merged_adapters.clear()
    return found
