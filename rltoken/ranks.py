"""What the ranks of one run agree on before it begins: that they run the same, and that none of them has failed.

Every function here is a point at which all ranks meet. With one process there is nothing to agree on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import gather_object
from omegaconf import DictConfig, OmegaConf

from rltoken import identity
from rltoken.errors import SharedError

if TYPE_CHECKING:
    from rltoken.trl_saving import WholeCheckpoints

SHOWN = 5
"""How many differences one message names."""
LONGEST = 60
"""Characters of a value that it shows."""


def facts(cfg: DictConfig) -> dict[str, Any]:
    """What every rank must have alike before anything is loaded: settings, versions, rltoken's and the user's code."""
    settings = identity.flat(OmegaConf.to_container(cfg, resolve=True))
    versions = {f"version of {name}": version for name, version in identity.versions().items()}
    return settings | versions | {f"code of {name}": digest for name, digest in identity.code(cfg).items()}


def refuse_differences(mine: Mapping[str, Any]) -> None:
    """Compare what this rank found with what the others did.

    Args:
        mine: what must be alike, by a name that a reader understands.

    Raises:
        SharedError: names what differs, and what it is on which rank.
    """
    if PartialState().num_processes == 1:
        return
    if found := differences(gather_object([dict(mine)])):
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise SharedError(
            f"ranks: they would not run the same: {'; '.join(found[:SHOWN])}{more}. Start every rank by the same "
            "command, with the same code, packages and files."
        )


def differences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not alike, one text for each: `trainer.beta is 0.0 on rank 0, 0.1 on ranks 1 and 3`.

    Args:
        found: what each rank has, in rank order; what a rank lacks counts as `absent`.
    """
    told = []
    for name in dict.fromkeys(name for mine in found for name in mine):
        places: dict[str, list[int]] = {}
        for rank, mine in enumerate(found):
            places.setdefault(str(mine.get(name, "absent")), []).append(rank)
        if len(places) > 1:
            shown = (f"{value[:LONGEST]} on {_ranks(where)}" for value, where in places.items())
            told.append(f"{name} is {', '.join(shown)}")
    return told


def _ranks(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What every rank has to get through; a failure on one ends the others, without a word of their own.

    Raises:
        SharedError: another rank failed; its message says why.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = [failure is not None]
    if PartialState().num_processes > 1:
        failed = gather_object(failed)
    if failure is not None:
        raise failure
    if any(failed):
        raise SharedError(f"{_ranks([rank for rank, value in enumerate(failed) if value])} could not begin.")


def refuse_other_loads(trainer: WholeCheckpoints) -> None:
    """Compare what the ranks have loaded, before weights are split over them.

    Args:
        trainer: of the run or of its supervised stage.

    Raises:
        SharedError: it is not alike.
    """
    digests = trainer.belongings | {"weights": trainer.digest_of_weights()}
    names = {
        "data": "the training data",
        "eval_data": "the data evaluated during training",
        "problems": "the evaluation data",
        "frozen": "the frozen weights",
        "weights": "the model",
    }
    refuse_differences({names[key]: digest and digest[:8] for key, digest in digests.items()})
