"""A method is a pipeline of typed stages; the signature of a stage says what it needs and when it runs.

A stage is a callable. Its positional parameters name the signals it needs (`rltoken.types` lists them), its
keyword-only parameters are its settings, whose annotations say what they may be (`rltoken.ranges`). Naming a live
signal makes it a forward stage; any other runs once per generation window, on whole groups. Slots, in the order in
which they act:

    prompts   (inputs, ...) -> inputs                      before generation
    controls  (progress, last_window) -> settings          before generation
    rows      (rollout, sampler) -> rollout                added or replaced rows
    shapes    signals -> rewards [B] or (that, metrics)    chain
    credits   signals -> advantages [B] or [B, T]          chain
    marks     signals -> [B] or [B, T]                     a signal of the stage's name, for the slots below
    bounds    signals -> (eps_low, eps_high)               numbers or [B, T]; the last one wins
    weights   signals -> [B, T] or [B] or (that, metrics)  >= 0, multiplied together
    ratios    signals -> [B, T]                            replaced old log-probabilities; the last one wins
    aux       signals -> [B, T] or [B] or (that, metrics)  losses, unreduced; added together

A stage acts on thinking rows unless its setting `kinds` names others: it sees those rows only, and leaves the rest
as they were. What keeps state is an object with `__call__`, `state_dict` and `load_state_dict`.

An object may also have a method `observe`, whose parameters name window signals: it sees each scored window once. A
control keeps what it learns for the next window. What the `observe` of a forward stage returns, [B, T] or [B], rides
along with the rows and is that stage's own signal `observed`, so that a forward can use a statistic of the window.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rltoken.errors import UserError, first_line, nearest
from rltoken.ranges import check as check_settings
from rltoken.signals import NEVER_GATHERED
from rltoken.types import LIVE, PUBLISHED, SAMPLED, SCORED, THINKING

WINDOW = {**SAMPLED, **SCORED, **PUBLISHED}
UNWEIGHTED = {name: text for name, text in LIVE.items() if name != "weight"}
"""The live signals of the slots that act before all weights are known."""
SLOTS: dict[str, dict[str, str]] = {
    "prompts": {name: SAMPLED[name] for name in ("inputs", "group", "progress", "rng")},
    "controls": {"progress": SAMPLED["progress"], "last_window": "LastWindow of the window before, or None"},
    "rows": {"rollout": "Rollout", "sampler": "Sampler"},
    "shapes": {**SAMPLED, **PUBLISHED},
    "credits": WINDOW,
    "marks": WINDOW,
    "bounds": {**WINDOW, **UNWEIGHTED},
    "weights": {**WINDOW, **UNWEIGHTED},
    "ratios": {**WINDOW, **UNWEIGHTED},
    "aux": {**WINDOW, **LIVE},
}
"""The slots in the order in which they act, each with the signals that its stages may name."""
MARKED_SLOTS = ("bounds", "weights", "ratios", "aux")
"""The slots whose stages may name a mark: one that a micro-batch sees can so know what only the window tells."""
OBSERVED = "observed"
"""How a forward stage calls what its own `observe` returned."""
KINDLESS = ("prompts", "controls", "rows", "shapes")
AFTER_SHUFFLE_LOST = frozenset({"parent", "rng"})
"""Window signals that mean nothing in a micro-batch: row numbers, and the window's random stream."""


def _declared(name: str, default: Any) -> property:
    """What a stage's function or object says of itself by an attribute of this name."""
    return property(lambda stage: getattr(_bare(stage.call), name, default))


@dataclass(frozen=True)
class Stage:
    """A callable with what its signature says: the config key, the signals it names and the kinds of rows it sees.

    `observer` is its method `observe` as a stage of its own, which runs once per window.
    """

    key: str
    call: Callable[..., Any]
    needs: tuple[str, ...]
    kinds: tuple[str, ...] = (THINKING,)
    observer: Stage | None = None

    @property
    def name(self) -> str:
        """The last part of its key."""
        return self.key.rpartition(".")[2]

    @property
    def live(self) -> bool:
        """Whether it runs inside the training forward."""
        return any(name in LIVE for name in self.needs)

    @property
    def observed(self) -> str:
        """The name under which what its `observe` returns rides along with the rows."""
        return f"{self.key}.{OBSERVED}"

    changes_logits = _declared("changes_logits", False)
    """Whether it may set `logits`: engines are made for it before it is called."""
    relabels = _declared("relabels", False)
    """Whether it has labels of its own in place of gold: what it rewards is what counts as correct after it."""
    only_for = _declared("only_for", None)
    """The signal for which alone a stage is there: what a rows stage publishes, or `weight` of a weights stage."""
    only_with = _declared("only_with", None)
    """The function or class of the stage without which this one is half a method."""
    instead_of = _declared("instead_of", None)
    """The function or class of a stage of which this one is another form."""
    off_policy_only = _declared("off_policy_only", False)
    """Whether it changes nothing where every ratio to the policy that sampled is 1."""
    per_token = _declared("per_token", False)
    """Whether the credit is one of tokens alone, and adds up to nothing new over a response."""
    on_policy_only = _declared("on_policy_only", False)
    """Whether its gradient is what it says in the first optimizer step of a window alone."""
    among_standardised = _declared("among_standardised", False)
    """Whether the credit adds what is in standard deviations, and makes sense beside such advantages alone."""
    around_one = _declared("around_one", False)
    """Whether its bounds are distances from a ratio of 1, and make no sense as the cap that CISPO takes."""
    across_epochs = _declared("across_epochs", False)
    """Whether it changes nothing before a problem comes again."""
    replaces_rows = _declared("replaces_rows", False)
    """Whether a rows stage puts graded thinking rows in the place of others, and so has to come first."""
    per_response = _declared("per_response", False)
    """Whether it makes one term of a response out of the mean over its tokens, which the loss has to take."""
    clips = _declared("clips", ())
    """Every clip range (low, high) that a control may set in the run, where it knows them."""
    idle_at = _declared("idle_at", None)
    """Settings -> the values at which, together, they leave it without effect."""
    same_as = _declared("same_as", None)
    """Settings that are those of another stage -> the function or class of that one."""

    def setting(self, name: str) -> Any:
        """The value of a setting: bound to its function, or an attribute of its object; None without one."""
        parameter = inspect.signature(self.call).parameters.get(name)
        return getattr(self.call, name, None) if parameter is None else parameter.default

    @property
    def after(self) -> int:
        """Its setting `after`: the optimizer steps before which it changes nothing; 0 without one."""
        return after if isinstance(after := self.setting("after"), int) else 0

    @property
    def home(self) -> str:
        """The module of its function or class."""
        return _bare(self.call).__module__

    def is_of(self, call: Callable[..., Any]) -> bool:
        """Whether it is a stage of that function or class."""
        return _bare(self.call) is call or type(self.call) is call

    def copy(self) -> Stage:
        """The same stage with a copy of its state, to be tried without a trace."""
        return dataclasses.replace(self, call=copy.deepcopy(self.call))

    def run(self, signals: Mapping[str, Any]) -> Any:
        """Call the stage on the signals it names; whatever it raises is re-raised as a UserError with its key.

        A ValueError that begins with the name of a setting, or of a signal, and a colon is about that one's value.
        """
        needed = [signals[name] for name in self.needs]
        versions = [value._version if isinstance(value, Tensor) else None for value in needed]
        try:
            result = self.call(*needed)
        except UserError:
            raise
        except Exception as error:
            setting, _, told = first_line(error).partition(": ")
            if isinstance(error, ValueError) and setting in inspect.signature(self.call).parameters:
                key = self.key if setting in self.needs else f"{self.key}.{setting}"
                raise UserError(f"{key}: {told.rstrip('.')}.") from error
            raise UserError(
                f"{self.key}: the stage raised {type(error).__name__}: {first_line(error)}. Mend the stage, or leave "
                f"it out with '~{self.key}'."
            ) from error
        for name, value, version in zip(self.needs, needed, versions, strict=True):
            if version is not None and value._version != version:
                raise UserError(f"{self.key}: the stage changed the signal '{name}' in place; work on a clone of it.")
        return result


@dataclass(frozen=True)
class Pipeline:
    """The stages of a method, by slot, each slot in the order of the config."""

    slots: Mapping[str, tuple[Stage, ...]]

    def __getitem__(self, slot: str) -> tuple[Stage, ...]:
        return self.slots.get(slot, ())

    def stages(self, *slots: str, live: bool | None = None) -> list[Stage]:
        """The stages of `slots` (of all when none is named), of one timing only when `live` is given."""
        chosen = [stage for slot in slots or SLOTS for stage in self[slot]]
        return [stage for stage in chosen if live is None or stage.live == live]

    @property
    def observers(self) -> list[Stage]:
        """The `observe` methods of the stages that have one."""
        return [stage.observer for stage in self.stages() if stage.observer]

    def naming(self, name: str) -> list[Stage]:
        """The stages, and methods `observe`, that name the signal."""
        return [stage for stage in self.stages() + self.observers if name in stage.needs]

    def needs(self, name: str) -> bool:
        """Whether any stage names the signal."""
        return bool(self.naming(name))

    @property
    def changes_logits(self) -> bool:
        """Whether a control stage may change the logits of what is sampled."""
        return any(stage.changes_logits for stage in self["controls"])

    def state_dict(self) -> dict[str, Any]:
        """State of each stage that keeps any, by its key."""
        return {s.key: s.call.state_dict() for s in self.stages() if hasattr(s.call, "state_dict")}

    def load_state_dict(self, state: Mapping[str, Any], *, on_change: str = "refuse") -> None:
        """Restore what `state_dict` gave.

        Args:
            state: of each stage by its key.
            on_change: 'refuse', or 'accept' that a stage begins anew, or that one is not there any more.

        Raises:
            UserError: the checkpoint lacks a stage's state, or holds one of a stage that is not there.
        """
        stateful = {s.key: s.call for s in self.stages() if hasattr(s.call, "load_state_dict")}
        if stateful.keys() != state.keys() and on_change == "refuse":
            raise UserError(
                f"resume: the checkpoint keeps the state of {sorted(state) or 'no stage'} but the method has "
                f"{sorted(stateful) or 'none'}; resume with the method of the checkpoint, or set on_change=accept."
            )
        for key in stateful.keys() & state.keys():
            stateful[key].load_state_dict(state[key])


def build(stages: Mapping[str, Mapping[str, Callable[..., Any]]], section: str = "method") -> Pipeline:
    """Read the signatures of instantiated stages.

    Args:
        stages: slot -> name -> callable, as `method` of the config instantiates.
        section: of the config in which they stand, for the keys in messages.

    Raises:
        UserError: an unknown slot or signal, a setting without a value or out of its range, a signature that cannot be
            read, a class in the place of its object, half a state.
    """
    for slot in stages:
        if slot not in SLOTS:
            raise UserError(
                f"{section}.{slot}: there is no such slot{nearest(slot, SLOTS)}; slots: {', '.join(SLOTS)}."
            )
    marks = dict.fromkeys(stages.get("marks") or {}, "a mark")
    for name in marks:
        if any(name in signals for signals in SLOTS.values()):
            raise UserError(
                f"{section}.marks.{name}: there is a signal of that name already; give the mark another one."
            )
    allowed = {slot: signals | (marks if slot in MARKED_SLOTS else {}) for slot, signals in SLOTS.items()}
    return Pipeline(
        {
            slot: tuple(
                _stage(slot, f"{section}.{slot}.{name}", call, allowed[slot])
                for name, call in (stages.get(slot) or {}).items()
            )
            for slot in SLOTS
        }
    )


def _stage(slot: str, key: str, call: Callable[..., Any], allowed: Mapping[str, str]) -> Stage:
    if not callable(call):
        raise UserError(f"{key}: {call!r} is no stage; give it a _target_ and, for a function, _partial_: true.")
    _check_object(key, call)
    call, kinds = _take_kinds(key, call)
    needs, settings = [], {}
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UserError(f"{key}: the stage takes *{parameter.name}; name each signal and each setting instead.")
        if parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.default is parameter.empty:
                raise UserError(f"{key}.{parameter.name}: the setting has no value; set {key}.{parameter.name}=...")
            settings[parameter.name] = parameter.default
        else:
            needs.append(parameter.name)
    try:
        check_settings(call, settings)
    except ValueError as error:
        raise UserError(f"{key}.{first_line(error).rstrip('.')}.") from error
    observer = _observer(slot, key, call, needs, kinds)
    for name in needs:
        if observer is None or name != OBSERVED:
            _check_signal(slot, key, name, allowed)
    needs = [f"{key}.{OBSERVED}" if name == OBSERVED else name for name in needs]
    stage = Stage(key, call, tuple(needs), kinds, observer)
    lost = AFTER_SHUFFLE_LOST & set(needs)
    if stage.live and lost:
        raise UserError(
            f"{key}: '{min(lost)}' belongs to the whole window, and a stage that names a live signal sees shuffled "
            "micro-batches; compute it from window signals (old_...) in a stage of its own."
        )
    if slot in KINDLESS and kinds != (THINKING,):
        raise UserError(f"{key}.kinds: a stage of the slot '{slot}' does not act on rows by kind; leave it out.")
    if slot == "aux" and not stage.live:
        raise UserError(
            f"{key}: an auxiliary loss without a live signal has no gradient; name one of {', '.join(LIVE)}."
        )
    return stage


def _observer(
    slot: str, key: str, call: Callable[..., Any], needs: Sequence[str], kinds: tuple[str, ...]
) -> Stage | None:
    """The method `observe` of an object as a stage of its own; None where it has none."""
    observe = getattr(call, "observe", None)
    if observe is None:
        return None
    if slot != "controls" and not (OBSERVED in needs and not LIVE.keys().isdisjoint(needs)):
        raise UserError(
            f"{key}: observe() is for a control, or for a stage of the forward that names '{OBSERVED}'; this one sees "
            "the whole window itself, so compute it there."
        )
    names = tuple(inspect.signature(observe).parameters)
    for name in names:
        _check_signal("observe", key, name, WINDOW)
        if slot == "controls" and name in NEVER_GATHERED:
            raise UserError(f"{key}: each rank has '{name}' of its own rows only, so ranks would sample differently.")
    return Stage(key, observe, names, kinds)


def _check_object(key: str, call: Callable[..., Any]) -> None:
    """Refuse what would only fail, or be lost, later: a class in the place of its object, half a state, settings."""
    if inspect.isclass(call) or (isinstance(call, functools.partial) and inspect.isclass(call.func)):
        raise UserError(f"{key}: a class needs no _partial_; remove it.")
    missing = [name for name in ("state_dict", "load_state_dict") if not hasattr(call, name)]
    if len(missing) == 1:
        raise UserError(f"{key}: its state would be lost without {missing[0]}; define it, or neither of the two.")
    if isinstance(call, functools.partial) or inspect.isroutine(call):
        return
    for name, parameter in inspect.signature(call).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise UserError(
                f"{key}.{name}: __call__ has no settings, since they are set once; move it to the class's __init__."
            )


def _check_signal(slot: str, key: str, name: str, allowed: Mapping[str, str]) -> None:
    if name in allowed:
        return
    if name in WINDOW or name in LIVE:
        where = "observe()" if slot == "observe" else f"the slot '{slot}'"
        raise UserError(
            f"{key}: the signal '{name}' cannot be had in {where}, which runs before it exists; there are: "
            f"{', '.join(allowed)}."
        )
    made = f", nor a mark of that name, which '+mark={name}' would add" if slot in MARKED_SLOTS else ""
    raise UserError(
        f"{key}: there is no signal '{name}'{nearest(name, allowed)}{made}; there are: {', '.join(allowed)}."
    )


def _bare(call: Callable[..., Any]) -> Any:
    """A stage's function or object, without the settings bound to it."""
    return call.func if isinstance(call, functools.partial) else call


def _take_kinds(key: str, call: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """Split off the setting `kinds`, which is the pipeline's, unless the stage declares it itself."""
    declared = inspect.signature(_bare(call)).parameters.get("kinds")
    kinds = declared.default if declared is not None else (THINKING,)
    if isinstance(call, functools.partial) and "kinds" in call.keywords:
        kinds = call.keywords["kinds"]
        if declared is None:
            settings = {name: value for name, value in call.keywords.items() if name != "kinds"}
            call = functools.partial(call.func, *call.args, **settings)
    elif declared is None:
        kinds = getattr(call, "kinds", kinds)
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, Sequence) or not all(isinstance(kind, str) for kind in kinds):
        raise UserError(f"{key}.kinds: {kinds!r} is no list of kinds of rows; set it to [{THINKING}], or leave it out.")
    return call, tuple(kinds)
