"""Write an adapter and its base as one model: `python -m rltoken.merge RUN_OR_ADAPTER OUT`; `--help` explains the rest.

The merge is computed in float32 and rounded once. OUT appears whole or not at all: it is written beside its place, as
.OUT.merging, and renamed.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from safetensors import SafetensorError

from rltoken import adapters, cli
from rltoken.errors import UserError, first_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER, OUT = "RUN_OR_ADAPTER", "OUT"
DTYPES = ("auto", "float32", "bfloat16", "float16")
GIVE_BASE = "give its place as --base FOLDER_OR_HUB_ID"


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point."""
    given = _parser().parse_args(arguments)
    try:
        merge(given.adapter, given.out, base=given.base, dtype=given.dtype, trust_remote_code=given.trust_remote_code)
    except UserError as error:
        cli.fail(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rltoken.merge",
        description="Write an adapter and its base as one model, with tokenizer and chat template, that plain "
        "AutoModelForCausalLM.from_pretrained(OUT) loads. It is computed on the CPU in float32: 4 bytes of memory for "
        "each weight.",
        epilog="python -m rltoken.merge runs/mine merged/mine --dtype bfloat16",
    )
    parser.add_argument(
        "adapter",
        metavar=ADAPTER,
        help="a finished run with +lora, a checkpoint (RUN/checkpoint-N), or an adapter",
    )
    parser.add_argument("out", metavar=OUT, help="the folder to write; it must not exist, or be empty")
    parser.add_argument("--base", help="folder or hub id of the base, where it is not where the adapter says it is")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the merged weights (auto: as the base's)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the base")
    return parser


def merge(
    adapter: str, out: str, *, base: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> None:
    """Merge an adapter into its base and write the model to `out`.

    Args:
        adapter: a run directory, a checkpoint, or an adapter's folder.
        out: a folder that is not there yet, or is empty.
        base: the base, where the adapter's own note does not lead to it.
        dtype: of the weights that are written, one of `DTYPES`; auto: the one that the base is stored in.
        trust_remote_code: run model code that comes with the base.

    Raises:
        UserError: there is no adapter, or no base that it fits; the base is stored quantised; `out` is taken or cannot
            be written; the two cannot be made one.
    """
    place = Path(out).expanduser().absolute()
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"{OUT}: {out} exists and is not an empty folder; choose another, or remove it.")
    folder = adapters.find(adapter, ADAPTER)
    source = _base(folder, base)
    _tell_of_quantization(folder)
    write_merged(folder, source, place, dtype=dtype, trust_remote_code=trust_remote_code)
    print(f"merged {folder} into {source}: {out}")


def write_merged(folder: str, source: str, place: Path, *, dtype: str, trust_remote_code: bool) -> None:
    """Write the adapter in `folder` and its base `source` as one model to `place`, which is not there or empty.

    Args:
        dtype: of the weights that are written, one of `DTYPES`.
        trust_remote_code: run model code that comes with the base.

    Raises:
        UserError: as `merge`.
    """
    _write(place, _made(folder, source, dtype, trust_remote_code))


def _base(folder: str, given: str | None) -> str:
    """The model to merge into."""
    from rltoken.models import existing

    if given is None:
        return adapters.base_of(folder, ADAPTER, GIVE_BASE)
    try:
        return existing(given)
    except UserError as error:
        raise UserError(str(error).replace("model.path", "--base")) from error


def _tell_of_quantization(folder: str) -> None:
    """Say where the run of an adapter had its base in fewer bits than the merge has it."""
    settings = Path(folder).parent / "config.yaml"
    if settings.is_file() and OmegaConf.select(OmegaConf.load(settings), "model.quantization") is not None:
        print(
            "note: the adapter was trained on a quantised base and is merged into the base's own weights; evaluate the "
            "merged model, since its outputs differ a little."
        )


def _made(
    folder: str, source: str, dtype: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The merged model and the tokenizer that goes with it."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from rltoken.models import load_model

    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"--base: {source} is stored quantised, and a merge into such weights loses most of the adapter; give the "
            "model that it was made from, in bfloat16 or float32, as --base FOLDER_OR_HUB_ID."
        )
    base = load_model(source, dtype="float32", trust_remote_code=trust_remote_code)
    model = _merged(adapters.attached(base, folder, source, key=ADAPTER), folder)
    tokenizer = AutoTokenizer.from_pretrained(
        folder if adapters.has_tokenizer(folder) else source, trust_remote_code=trust_remote_code
    )
    return model.to(config.dtype if dtype == "auto" else getattr(torch, dtype)), tokenizer


def _merged(model: PeftModel, folder: str) -> PreTrainedModel:
    """The base with the adapter in its weights.

    Raises:
        UserError: the adapter changes one of two tied weights, which are one weight in the merged model; its kind
            cannot be merged; a merged weight is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    adapted = any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends)
    if adapted and base.config.get_text_config().tie_word_embeddings:
        raise UserError(
            f"{ADAPTER}: {folder} changes the embeddings or the head, which are one tied weight in this model, so that "
            "no merged weight could stand for both; use the adapter as it is."
        )
    try:
        return model.merge_and_unload(safe_merge=True)
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{ADAPTER}: {folder} cannot be merged ({first_line(error)}); use it as it is.") from error


def _write(place: Path, parts: Iterable[PreTrainedModel | PreTrainedTokenizerBase]) -> None:
    """Save model and tokenizer into a folder beside `place`, and move that there."""
    scratch = place.with_name(f".{place.name}.merging")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for part in parts:
            part.save_pretrained(scratch)
        scratch.rename(place)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{OUT}: {place} cannot be written ({first_line(error)}); choose another place.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
