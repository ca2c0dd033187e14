"""The frozen teacher behind the signal `teacher_logps`: what it may be, and that it reads tokens as the student does.

It is a model of its own, the base of the adapter that is trained, or a vLLM server, which gives log-probabilities of a
prompt's tokens (`prompt_logprobs`), always at temperature 1. Log-probabilities of tokens mean something only where both
have one tokenizer: another one is refused, by vocabulary and by what it makes of a few texts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import requests
from omegaconf import DictConfig
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rltoken import adapters, models
from rltoken.errors import UserError, first_line
from rltoken.rollout.completions import prompt_logps

if TYPE_CHECKING:
    from trl import GRPOConfig

    from rltoken.pipeline import Pipeline

SIGNAL = "teacher_logps"
CHOICES = (
    "teacher=hf teacher.path=FOLDER_OR_HUB_ID, teacher=vllm_server teacher.url=URL, or teacher=base with an adapter"
)
KINDS = ("none", "model", "base", "server")
PROBES = (
    "Let x1 = 1234.5; it's\n\n  so:\t(a+b)^2 é",
    "S 5 A +3 8 so 1 </think> 1",
    "<think>\n你好 Ωμέγα 🙂\n</think>",
    "  \n",
)
ASK_SECONDS = 60.0


@dataclass(frozen=True)
class Teacher:
    """Where log-probabilities of a teacher come from.

    `model` is one of its own, a server, or None for the base of the adapter that is trained. `ends` are the tokens with
    which it ends a sequence; None: those of the student.
    """

    model: PreTrainedModel | Server | None
    ends: frozenset[int] | None = None


class Server:
    """A vLLM server that serves the teacher.

    Args:
        url: of the server, without `/v1`.
        patience: seconds without any progress after which it is given up.
    """

    def __init__(self, url: str, *, patience: float) -> None:
        self.url, self._patience = url.rstrip("/"), patience

    def logps(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of each token of each completion after its prompt, at temperature 1.

        Raises:
            SamplerLost: the server is gone or stands still.
            UserError: it refuses a request, as where prompt and completion are longer than it serves.
        """
        return prompt_logps(self.url, prompts, completions, patience=self._patience, key="teacher.url")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        return self._ask("tokenize", prompt=text, add_special_tokens=False)["tokens"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones too."""
        return self._ask("detokenize", tokens=list(ids))["prompt"]

    def _ask(self, what: str, **payload: Any) -> dict[str, Any]:
        try:
            response = requests.post(f"{self.url}/{what}", json=payload, timeout=ASK_SECONDS)
        except requests.RequestException as error:
            raise UserError(
                f"teacher.url: no vLLM server answers at {self.url} ({type(error).__name__}); start one with "
                "'python -m rltoken.serve model=hf model.path=TEACHER rollout=vllm_server', or correct teacher.url."
            ) from error
        if response.status_code != 200:
            raise UserError(f"teacher.url: {self.url}/{what} answers {response.status_code}: {response.text[:200]}")
        return response.json()


# Before anything is loaded


def check(cfg: DictConfig, pipeline: Pipeline, args: GRPOConfig) -> None:
    """Refuse a method without the teacher that it names, and a teacher that cannot be had.

    Args:
        cfg: the resolved configuration of a run.
        pipeline: its method.
        args: TRL's arguments.

    Raises:
        UserError: names the key, the reason and the fix.
    """
    kind = cfg.teacher.get("kind")
    if kind not in KINDS:
        raise UserError(f"teacher.kind: there is no {kind!r}; choose a teacher as a group, such as {CHOICES}.")
    if not pipeline.needs(SIGNAL):
        return
    if kind == "none":
        refuse_missing(pipeline)
    if kind == "base" and cfg.model.lora is None and cfg.model.adapter is None:
        raise UserError(
            "teacher: there is no base beside the model when all weights are trained; add +lora=default, or choose "
            "teacher=hf teacher.path=FOLDER_OR_HUB_ID."
        )
    if kind == "server" and args.temperature != 1:
        raise UserError(
            f"trainer.temperature: a vLLM server gives a teacher's log-probabilities at temperature 1, and rollouts "
            f"are sampled at {args.temperature:g}; set trainer.temperature=1, or choose teacher=hf."
        )


def refuse_missing(pipeline: Pipeline) -> None:
    """Refuse a pipeline that names the teacher's signal, there being none.

    Raises:
        UserError: names the stage and the choices.
    """
    for stage in pipeline.naming(SIGNAL):
        raise UserError(f"teacher: {stage.key} needs one; choose {CHOICES}.")


# Loading


def existing(path: str) -> str:
    """A model that is already there, as `rltoken.models.existing` finds it.

    Raises:
        UserError: there is none, or it is an adapter.
    """
    if adapters.is_adapter(path):
        raise UserError(
            f"teacher.path: {path} is an adapter; make a plain model of it with 'python -m rltoken.merge {path} OUT', "
            "and set teacher.path=OUT."
        )
    with told_of_the_teacher():
        return models.existing(path)


def load_tokenizer(path: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher; it needs no chat template.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"teacher.path: the tokenizer of {path} cannot be loaded ({first_line(error).rstrip('.')}); put its files "
            "beside the model's."
        ) from error


@contextlib.contextmanager
def told_of_the_teacher() -> Iterator[None]:
    """Tell what is wrong with the model that is loaded inside the context under the keys of the teacher."""
    try:
        yield
    except UserError as error:
        keys = r"(?<![\w/])model\.(?=(?:path|dtype|attn_implementation|trust_remote_code)\b)"
        raise UserError(re.sub(keys, "teacher.", str(error))) from error


# One tokenizer


def refuse_other_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, path: str, key: str
) -> None:
    """Refuse a teacher whose tokenizer is not the student's.

    Raises:
        UserError: they differ in their vocabularies or in what they make of a text.
    """
    own, other = student.get_vocab(), teacher.get_vocab()
    for token in sorted(own.keys() | other.keys(), key=lambda token: own.get(token, len(own))):
        if own.get(token) != other.get(token):
            raise _other_tokenizer(key, path, f"{token!r} is {told(own.get(token))} here and {told(other.get(token))}")
    _refuse_other_encoding(student, lambda text: teacher.encode(text, add_special_tokens=False), path, key)


def refuse_other_server(student: PreTrainedTokenizerBase, server: Server) -> None:
    """Refuse a server whose tokenizer is not the student's.

    Raises:
        UserError: no server answers, or it reads the student's vocabulary or a text otherwise.
    """
    ids = range(len(student))
    if server.decode(ids) != student.decode(ids):
        raise _other_tokenizer("teacher.url", server.url, f"token ids 0 to {len(ids) - 1} stand for another text")
    _refuse_other_encoding(student, server.encode, server.url, "teacher.url")


def named_ends(tokens: Sequence[str] | str | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int] | None:
    """The ids of the tokens with which a server's model ends a sequence, since no server tells; None: as the student.

    Raises:
        UserError: one is no token of the tokenizer.
    """
    if tokens is None:
        return None
    vocabulary, tokens = tokenizer.get_vocab(), [tokens] if isinstance(tokens, str) else list(tokens)
    for token in tokens:
        if token not in vocabulary:
            raise UserError(
                f"teacher.ends: {token!r} is no token of the tokenizer; name the tokens that end the teacher's "
                "sequences, such as ['<|endoftext|>'], or set it to null."
            )
    return frozenset(vocabulary[token] for token in tokens)


def _refuse_other_encoding(
    student: PreTrainedTokenizerBase, encode: Callable[[str], list[int]], path: str, key: str
) -> None:
    for text in PROBES:
        ids, others = student.encode(text, add_special_tokens=False), encode(text)
        if ids != others:
            raise _other_tokenizer(key, path, f"{text!r} is {len(ids)} tokens here and {len(others)} others")


def told(number: int | None) -> str:
    """A token's number in words."""
    return "no token" if number is None else f"token {number}"


def _other_tokenizer(key: str, path: str, how: str) -> UserError:
    return UserError(
        f"{key}: {path} has another tokenizer than the model that is trained: {how} there. Choose a teacher of the "
        "same family, whose tokenizer is the same."
    )
