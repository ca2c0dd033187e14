"""Run one stage, on the rows of its kinds, and refuse a result that cannot be.

Everything that a stage returns passes through here, on its way from `rltoken.pipeline.Stage.run` into the window or the
loss of `rltoken.trainer`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rltoken.errors import UserError, first_line
from rltoken.rollout.logits import told
from rltoken.signals import Signals, rows_of
from rltoken.types import THINKING, Progress, Rollout

if TYPE_CHECKING:
    from rltoken.pipeline import Stage

CONTROLLED = ("max_completion_length", "epsilon", "epsilon_high", "stop_at_think_end", "logits")
"""What a control stage may set. The length limits sampling only: dr_grpo's divisor stays the configured constant."""


def change_prompts(
    stage: Stage, inputs: list[dict[str, Any]], group: Tensor, progress: Progress, rng: torch.Generator
) -> list[dict[str, Any]]:
    """What a prompt stage makes of the prompts.

    Raises:
        UserError: another number of them than before.
    """
    changed = stage.run({"inputs": inputs, "group": group, "progress": progress, "rng": rng})
    if len(changed) != len(inputs):
        raise UserError(f"{stage.key}: returned {len(changed)} prompts for {len(inputs)}; return one for each.")
    return changed


def act(
    stage: Stage, signals: Mapping[str, Any], *bases: Tensor, kinds: Sequence[str] | None = None
) -> tuple[Tensor, ...]:
    """Run a stage on the rows of its kinds and put its results in the place of those rows of `bases`.

    Args:
        signals: every signal the stage names, for B rows.
        bases: one [B] or [B, T] tensor per result: what the rows keep on which the stage does not act.
        kinds: the kind of each row; None where all are thinking rows.

    Returns:
        One tensor per base, of its shape; a [B] result is spread over the tokens of a [B, T] base.

    Raises:
        UserError: a result of another shape, or another number of results.
    """
    places = _places_of_its_kinds(stage, kinds or [THINKING] * bases[0].size(0))
    if not places:
        return bases
    if len(places) == bases[0].size(0):
        return tuple(
            fit(stage, value, base) for value, base in zip(_results(stage, signals, bases), bases, strict=True)
        )
    rows = torch.tensor(places, device=bases[0].device)
    values = _results(stage, rows_of(signals, rows), bases)
    return tuple(
        base.index_copy(0, rows, fit(stage, value, base[rows]).to(base.dtype))
        for value, base in zip(values, bases, strict=True)
    )


def look(stage: Stage, signals: Mapping[str, Any]) -> None:
    """Let the `observe` of a control, as a stage, see the rows of its kinds of a whole window."""
    places = _places_of_its_kinds(stage, signals["kind"])
    if len(places) < len(signals["kind"]):
        signals = rows_of(signals, torch.tensor(places, device=signals["mask"].device))
    stage.run(signals)


def _places_of_its_kinds(stage: Stage, kinds: Sequence[str]) -> list[int]:
    """The numbers of the rows on which a stage acts, from the kind of each row."""
    return [place for place, kind in enumerate(kinds) if kind in stage.kinds]


def _results(stage: Stage, signals: Mapping[str, Any], bases: tuple[Tensor, ...]) -> tuple[Any, ...]:
    value = stage.run(signals)
    values = value if isinstance(value, tuple) else (value,)
    if len(values) != len(bases):
        raise UserError(f"{stage.key}: the stage returned {len(values)} values where {len(bases)} are needed.")
    return values


def fit(stage: Stage, value: Any, base: Tensor) -> Tensor:
    """Give a stage's result, a number, [B] or [B, T], the shape of `base`.

    Raises:
        UserError: it has neither.
    """
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{stage.key}: the stage returned {reprlib.repr(value)}, which is no number and no tensor; return one "
                "value per row or per token of the signals it was given."
            ) from error
    value = value.to(base.device, base.dtype if base.is_floating_point() else torch.get_default_dtype())
    if value.shape == base.shape:
        return value
    if value.dim() == 0:
        return value.expand_as(base)
    if base.dim() == 2 and value.dim() == 1 and value.size(0) == base.size(0):
        return value.unsqueeze(1).expand_as(base)
    raise UserError(
        f"{stage.key}: the stage returned the shape {list(value.shape)} where {list(base.shape)} or [{base.size(0)}] "
        "is needed; return one value per row or per token of the signals it was given."
    )


def noted(stage: Stage, *, one_each: bool = False) -> tuple[Stage, dict[str, Any]]:
    """The stage returning its tensor alone, and where its `metrics` and whether that is `per_row` are put aside.

    With `one_each` one number for all rows and tokens is refused.
    """
    found: dict[str, Any] = {}

    @functools.wraps(stage.call)
    def alone(*needed: Any) -> Any:
        """The stage's result without its metrics.

        Raises:
            UserError: it is one number, or none.
        """
        value, found["metrics"] = apart(stage.call(*needed))
        dimensions = value.dim() if isinstance(value, Tensor) else 0
        if one_each and dimensions == 0:
            raise UserError(
                f"{stage.key}: the stage returned one number or none; return one per token or row: [B, T] or [B]."
            )
        found["per_row"] = dimensions == 1
        return value

    return dataclasses.replace(stage, call=alone), found


def apart(result: Any) -> tuple[Any, Mapping[str, float]]:
    """What a stage returned and its metrics, where it returned both."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        return result
    return result, {}


def shape(stage: Stage, signals: Signals) -> Mapping[str, float]:
    """Let a shape stage replace the signal `rewards`; the metrics that it returned beside them.

    Raises:
        UserError: it is NaN where there was a reward.
    """
    result, metrics = apart(stage.run(signals))
    shaped = fit(stage, result, signals["rewards"])
    if (shaped.isnan() & ~signals["rewards"].isnan()).any():
        raise UserError(f"{stage.key}: a shaped reward is NaN where there was a reward; return a number for it.")
    signals.put("rewards", shaped)
    return metrics


def finite(stage: Stage, values: Tensor) -> Tensor:
    """The values themselves.

    Raises:
        UserError: one is infinite or not a number, and would end in weights that are.
    """
    if not bool(values.isfinite().all()):
        raise UserError(f"{stage.key}: a value on a trained token is not finite; guard the division or the logarithm.")
    return values


def non_negative(stage: Stage, weights: Tensor) -> Tensor:
    """The weights themselves.

    Raises:
        UserError: one is negative; what turns the sign belongs into a credit stage.
    """
    if bool((weights < 0).any()):
        raise UserError(
            f"{stage.key}: a weight is negative (smallest: {weights.min().item():.4g}); weights scale a token's "
            "update, so return values >= 0, or change the sign of the advantage in a credit stage."
        )
    return weights


def per_token(advantages: Tensor, like: Tensor) -> Tensor:
    """[B] advantages spread over the tokens of `like` [B, T]; [B, T] ones as they are."""
    if advantages.dim() == 2:
        return advantages
    return advantages.unsqueeze(1).expand(like.shape)


def check_controlled(stage: Stage, settings: Mapping[str, Any], longest: int) -> None:
    """Refuse what a control stage may not set.

    Args:
        settings: what the stage returned.
        longest: trainer.max_completion_length.

    Raises:
        UserError: no dict, a name that cannot be controlled, a length that is no whole number from 1 to `longest`, a
            clip range that is no number from 0, or logits that it did not say it changes or that cannot be changed so.
    """
    if not isinstance(settings, Mapping):
        raise UserError(f"{stage.key}: the stage returned {reprlib.repr(settings)}; return a dict of settings.")
    unknown = settings.keys() - set(CONTROLLED)
    if unknown:
        raise UserError(f"{stage.key}: {sorted(unknown)} cannot be controlled; return {', '.join(CONTROLLED)}.")
    length = settings.get("max_completion_length")
    if length is not None and not isinstance(length, Integral):
        raise UserError(f"{stage.key}: a completion length of {length!r} is no whole number; return one.")
    if length is not None and not 0 < length <= longest:
        raise UserError(
            f"{stage.key}: a completion length of {length} is outside 1 to trainer.max_completion_length={longest}; "
            "raise that, or lower the schedule."
        )
    for name in ("epsilon", "epsilon_high"):
        if name in settings and not (isinstance(settings[name], Real) and 0 <= settings[name] < math.inf):
            raise UserError(f"{stage.key}: {name}={settings[name]!r} is no finite number from 0; return one.")
    if "logits" in settings:
        if not stage.changes_logits:
            raise UserError(f"{stage.key}: it changes logits unannounced; give it the attribute changes_logits = True.")
        try:
            told(settings["logits"])
        except ValueError as error:
            raise UserError(f"{stage.key}: {first_line(error).rstrip('.')}; see rltoken/rollout/logits.py.") from error


def check_rollout(stage: Stage, rollout: Rollout, originals: int) -> None:
    """Refuse a rollout that TRL's window code could not replay.

    Raises:
        UserError: names the stage and what is wrong with which row.
    """
    if len(rollout.inputs) != originals or len(rollout.rows) < originals:
        raise UserError(
            f"{stage.key}: returned {len(rollout.inputs)} prompts and {len(rollout.rows)} rows for {originals} "
            "prompts; a rows stage may replace or add rows, but one thinking row per prompt must stay, and come first."
        )
    for i, row in enumerate(rollout.rows):
        if i < originals and (row.kind != THINKING or row.parent != i):
            raise UserError(f"{stage.key}: row {i} must be the thinking row of prompt {i}; it is '{row.kind}'.")
        if not 0 <= row.parent < originals or not row.completion_ids:
            raise UserError(f"{stage.key}: row {i} has no completion token, or no thinking row as parent.")
        if len(row.train_mask) != len(row.completion_ids):
            raise UserError(f"{stage.key}: row {i} has a train mask of another length than its completion.")
        if row.logps is not None and len(row.logps) != len(row.completion_ids):
            raise UserError(f"{stage.key}: row {i} has log-probabilities for another number of tokens than it has.")
