"""ARM's three ways to answer (arXiv 2505.20258), as `eval.format` chooses them.

    null          Adaptive: the model opens with the format of its own choice
    a format      Instruction-Guided: the tag of `model.formats` is put in its mouth
    consensus     Consensus-Guided: it answers in the three short formats; where these disagree, the long one counts

The published code has no consensus. Here answers agree that the reward's `classes` puts into one class, and a format
without an answer agrees with none. What is returned of three that agree is the answer without thinking; what the other
calls sampled is counted all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from rltoken.errors import UserError
from rltoken.evals.generators import Generator

CONSENSUS = "consensus"
SHORT, LONG = ("direct", "short", "code"), "long"
"""The formats that vote, and the one that decides where they disagree."""
Classes = Callable[[Sequence[str], Sequence[int]], list[int]]


def check(cfg: DictConfig) -> None:
    """Refuse an `eval.format` that is none, or that cannot be combined with what else is set.

    Raises:
        UserError: names the key and the fix.
    """
    chosen, known = cfg.eval.format, cfg.model.get("formats") or {}
    if chosen is None:
        return
    if chosen not in (*known, CONSENSUS):
        raise UserError(
            f"eval.format: there is no {chosen!r}; set null, {', '.join([*known, CONSENSUS])}, or add its tag to "
            "model.formats."
        )
    if chosen != CONSENSUS:
        return
    if missing := [name for name in (*SHORT, LONG) if name not in known]:
        raise UserError(f"model.formats: consensus needs the format {missing[0]}; add its tag.")
    if cfg.eval.budgets:
        raise UserError(
            "eval.budgets: a consensus is of several completions, so none of them can be cut; set eval.budgets=null."
        )
    if cfg.reward.get("classes") is None:
        raise UserError("reward.classes: it says which answers agree, for eval.format=consensus; add it.")


def guided(
    generator: Generator,
    chosen: str | None,
    formats: Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    alike: Classes,
) -> Generator:
    """What answers in the way that was chosen.

    Args:
        generator: the model.
        chosen: `eval.format`, checked.
        formats: format -> the tag that opens it; not needed where nothing was chosen.
        tokenizer: of the model.
        alike: (texts, group numbers) -> number of each final answer within its group, -1 where there is none.
    """
    if chosen is None:
        return generator
    opened = {name: tokenizer.encode(f"{tag}\n", add_special_tokens=False) for name, tag in formats.items()}
    if chosen != CONSENSUS:
        return Instructed(generator, opened[chosen])
    short = [Instructed(generator, opened[name]) for name in SHORT]
    return Consensus(generator, short, Instructed(generator, opened[LONG]), tokenizer, alike)


class Instructed:
    """A generator whose completions open with given tokens, which count as theirs."""

    def __init__(self, generator: Generator, opening: Sequence[int]) -> None:
        self._generator, self._opening = generator, list(opening)
        self.ends, self.together = generator.ends, generator.together
        self.besides = None

    @property
    def prefilled(self) -> list[int] | None:
        """Those of the model."""
        return self._generator.prefilled

    def complete(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Sequence[int],
        seeds: Sequence[int],
        begun: Sequence[tuple[int, int]] = (),
    ) -> list[list[int]]:
        """As `Generator` says; contexts that were begun have their opening already."""
        if begun:
            return self._generator.complete(contexts, max_new_tokens, stops, seeds, begun)
        opened = [[*context, *self._opening] for context in contexts]
        room = max(1, max_new_tokens - len(self._opening))
        return [self._opening + ids for ids in self._generator.complete(opened, room, stops, seeds)]

    def logps(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """Those of the model."""
        return self._generator.logps(contexts, continuations, temperature)


class Consensus:
    """What completes in all short formats, and in the long one where their answers differ.

    Attributes:
        besides: of the last call, the tokens that were sampled for each context besides its completion.
    """

    def __init__(
        self,
        generator: Generator,
        short: Sequence[Generator],
        long: Generator,
        tokenizer: PreTrainedTokenizerBase,
        alike: Classes,
    ) -> None:
        self._generator, self._short, self._long = generator, short, long
        self._tokenizer, self._alike = tokenizer, alike
        self.ends, self.together = generator.ends, generator.together
        self.prefilled: list[int] | None = None
        self.besides: list[int] = []

    def complete(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Sequence[int],
        seeds: Sequence[int],
        begun: Sequence[tuple[int, int]] = (),
    ) -> list[list[int]]:
        """As `Generator` says."""
        assert not begun, "a consensus is not gone on from"
        prefilled = [0] * len(contexts)
        asked, counts = [], True
        for generator in self._short:
            asked.append(generator.complete(contexts, max_new_tokens, stops, seeds))
            counts = counts and generator.prefilled is not None
            tokens = generator.prefilled or [0] * len(contexts)
            prefilled = [a + b for a, b in zip(prefilled, tokens, strict=True)]
        found, self.besides = list(asked[0]), [sum(map(len, rest)) for rest in zip(*asked[1:], strict=True)]
        unsure = [row for row, agree in enumerate(self._agree(asked)) if not agree]
        if unsure:
            longer = self._long.complete(
                [contexts[row] for row in unsure], max_new_tokens, stops, [seeds[row] for row in unsure]
            )
            for row, ids, tokens in zip(unsure, longer, self._long.prefilled or [0] * len(unsure), strict=True):
                self.besides[row] += len(found[row])
                found[row] = ids
                prefilled[row] += tokens
        self.prefilled = prefilled if counts else None
        return found

    def logps(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """Those of the model."""
        return self._generator.logps(contexts, continuations, temperature)

    def _agree(self, asked: Sequence[Sequence[list[int]]]) -> list[bool]:
        """For each context, whether all of its completions give one and the same answer."""
        rows = list(zip(*asked, strict=True))
        texts = self._tokenizer.batch_decode([ids for row in rows for ids in row], skip_special_tokens=True)
        classes = self._alike(texts, [number for number, row in enumerate(rows) for _ in row])
        each = len(asked)
        return [set(classes[start : start + each]) == {0} for start in range(0, len(classes), each)]
