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
import itertools
import logging
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rltoken.errors import UserError, first_line, nearest
from rltoken.ranges import check as check_settings
from rltoken.rollout.logits import told
from rltoken.signals import NEVER_GATHERED, rows_of
from rltoken.types import LIVE, PUBLISHED, SAMPLED, SCORED, THINKING, Progress

if TYPE_CHECKING:
    from trl import GRPOConfig

logger = logging.getLogger(__name__)

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
TOKEN_SLOTS = ("bounds", "weights", "ratios")
MARKED_SLOTS = (*TOKEN_SLOTS, "aux")
"""The slots whose stages may name a mark: one that a micro-batch sees can so know what only the window tells."""
CONTROLLED = ("max_completion_length", "epsilon", "epsilon_high", "stop_at_think_end", "logits")
"""What a control stage may set. The length limits sampling only: dr_grpo's divisor stays the configured constant."""
OBSERVED = "observed"
"""How a forward stage calls what its own `observe` returned."""
KINDLESS = ("prompts", "controls", "rows", "shapes")
AFTER_SHUFFLE_LOST = frozenset({"parent", "rng"})
"""Window signals that mean nothing in a micro-batch: row numbers, and the window's random stream."""
METHODS = "rltoken.methods."
"""Where each file has one method: two shapes of one file are two forms of the same reward."""
ROW_LOSSES = ("grpo", "sapo", "dr_grpo", "luspo")
"""The loss types of TRL whose divisor counts rows."""
RESPONSE_MEANS = ("grpo", "sapo")
"""The loss types of TRL that average over the tokens of each response first."""


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
    per_response = _declared("per_response", False)
    """Whether it makes one term of a response out of the mean over its tokens, which the loss has to take."""

    @property
    def after(self) -> int:
        """Its setting `after`: the optimizer steps before which it changes nothing; 0 without one."""
        parameter = inspect.signature(self.call).parameters.get("after")
        return parameter.default if parameter is not None and isinstance(parameter.default, int) else 0

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

    def check(self, args: GRPOConfig, *, warn: bool = True) -> None:
        """Refuse combinations with the trainer's arguments that make no sense.

        Args:
            args: TRL's arguments.
            warn: also say which stages will change nothing.

        Raises:
            UserError: names the keys, the reason and the fix.
        """
        refuse_split_groups(args.per_device_train_batch_size, args.steps_per_generation, args.num_generations)
        _check_kinds(self)
        _check_published(self)
        _check_marks(self)
        _check_halves(self)
        _check_alternatives(self)
        _check_scale(self, args)
        _check_controls(self, args)
        _check_sampling(self, args)
        _check_nothing_is_discarded(self)
        _check_nothing_is_replaced(self)
        _check_token_credit(self, args)
        _check_loss_type(self, args)
        _check_anchor(self, args)
        _check_added_rows(self, args)
        if self["shapes"] and args.multi_objective_aggregation != "sum_then_normalize":
            raise UserError(
                f"{self['shapes'][0].key}: a shape stage needs the weighted sum of the rewards, which "
                f"trainer.multi_objective_aggregation={args.multi_objective_aggregation} never forms; set it to "
                "sum_then_normalize."
            )
        if warn:
            _warn_of_idle_stages(self, args)


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
    made = f", and what +mark={name} would make" if slot in MARKED_SLOTS else ""
    raise UserError(
        f"{key}: there is no signal '{name}'{nearest(name, allowed)}; there are: {', '.join(allowed)}{made}."
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


def refuse_split_groups(batch_size: int, steps_per_generation: int, num_generations: int) -> None:
    """Refuse a window in which a rank would not hold whole groups: their statistics are taken where they are.

    Raises:
        UserError: batch_size x steps_per_generation rows of a rank are no multiple of num_generations.
    """
    rows = batch_size * steps_per_generation
    if rows % num_generations:
        raise UserError(
            f"trainer.num_generations: a group of {num_generations} would be split over ranks or windows: a rank holds "
            f"per_device_train_batch_size x steps_per_generation = {batch_size} x {steps_per_generation} = {rows} "
            "rows; make that a multiple of num_generations."
        )


def check_controlled(stage: Stage, settings: Mapping[str, Any], longest: int) -> None:
    """Refuse what a control stage may not set.

    Args:
        settings: what the stage returned.
        longest: trainer.max_completion_length.

    Raises:
        UserError: no dict, a name that cannot be controlled, a length outside 1 to `longest`, or logits that it did not
            say it changes or that cannot be changed so.
    """
    if not isinstance(settings, Mapping):
        raise UserError(f"{stage.key}: the stage returned {reprlib.repr(settings)}; return a dict of settings.")
    unknown = settings.keys() - set(CONTROLLED)
    if unknown:
        raise UserError(f"{stage.key}: {sorted(unknown)} cannot be controlled; return {', '.join(CONTROLLED)}.")
    length = settings.get("max_completion_length")
    if length is not None and not 0 < length <= longest:
        raise UserError(
            f"{stage.key}: a completion length of {length} is outside 1 to trainer.max_completion_length={longest}; "
            "raise that, or lower the schedule."
        )
    if "logits" in settings:
        if not stage.changes_logits:
            raise UserError(f"{stage.key}: it changes logits unannounced; give it the attribute changes_logits = True.")
        try:
            told(settings["logits"])
        except ValueError as error:
            raise UserError(f"{stage.key}: {first_line(error).rstrip('.')}; see rltoken/rollout/logits.py.") from error


def _check_controls(pipeline: Pipeline, args: GRPOConfig) -> None:
    """Try the control stages on the first window's progress, each as a copy since it may count its calls."""
    set_by: dict[str, str] = {}
    for stage in pipeline["controls"]:
        settings = stage.copy().run({"progress": Progress(0, args.max_steps), "last_window": None})
        check_controlled(stage, settings, args.max_completion_length)
        _refuse_low_cap(stage.key, settings.get("epsilon_high", 1.0), args)
        for name in settings.keys() & set_by.keys():
            logger.warning("%s: it sets %s too, so that %s has no say in it.", stage.key, name, set_by[name])
        set_by |= dict.fromkeys(settings, stage.key)
        if settings.get("stop_at_think_end") and not pipeline["rows"]:
            raise UserError(
                f"{stage.key}: sampling stops at the end of thinking, so there is no answer to grade; add a rows stage "
                "that forces answers, such as +rows=brpo."
            )


def _check_sampling(pipeline: Pipeline, args: GRPOConfig) -> None:
    """Refuse to change logits where the back end would not, or where nothing could be compared any more."""
    if not pipeline.changes_logits:
        return
    changing = next(stage for stage in pipeline["controls"] if stage.changes_logits)
    key, temperature = changing.key, getattr(changing.call, "temperature", args.temperature)
    if temperature != args.temperature:
        raise UserError(
            f"{key}.temperature: it moves around {temperature:g}, while sampling and its entropies are at "
            f"trainer.temperature={args.temperature:g}; leave it out, and set trainer.temperature."
        )
    if args.use_transformers_continuous_batching:
        raise UserError(
            f"trainer.use_transformers_continuous_batching: its generation takes no change of the logits, which {key} "
            "makes; set it to false."
        )
    if args.repetition_penalty != 1:
        raise UserError(
            f"trainer.repetition_penalty: {key} sees the logits before the penalty with one back end and after it with "
            "the other; set it to 1."
        )
    plain = args.temperature == 1 and args.top_p == 1 and (args.top_k or -1) < 0 and not args.min_p
    compared = args.vllm_importance_sampling_correction or args.off_policy_mask_threshold is not None
    if args.use_vllm and compared and not plain:
        raise UserError(
            f"trainer.temperature: with {key} vLLM gives the log-probabilities of the model's own distribution, to be "
            "compared with the trainer's; set trainer.temperature=1 trainer.top_p=1 trainer.top_k=0 trainer.min_p=null "
            "or trainer.vllm_importance_sampling_correction=false, without trainer.off_policy_mask_threshold."
        )


def _check_kinds(pipeline: Pipeline) -> None:
    for stage in pipeline.stages():
        if THINKING not in stage.kinds and not pipeline["rows"]:
            raise UserError(
                f"{stage.key}.kinds: there are only rows of the kind '{THINKING}' without a rows stage, so it would do "
                f"nothing on {', '.join(stage.kinds)}; add one with +rows=..., or set it to [{THINKING}]."
            )


def _check_published(pipeline: Pipeline) -> None:
    """Refuse stages that name what no rows stage publishes, and rows stages that sample for nobody."""
    for stage in pipeline.stages() + pipeline.observers:
        for name in stage.needs:
            if name in PUBLISHED and not pipeline["rows"]:
                raise UserError(
                    f"{stage.key}: no rows stage publishes '{name}'; add one that does with '+rows=...', or choose "
                    "the method whole with '+exp=...'."
                )
    for stage in pipeline["rows"]:
        if stage.only_for and not pipeline.needs(stage.only_for):
            raise UserError(
                f"{stage.key}: no stage names '{stage.only_for}', so what it samples would be thrown away; choose the "
                "method whole with '+exp=...', or leave it out."
            )


def _check_marks(pipeline: Pipeline) -> None:
    for mark in pipeline["marks"]:
        if not pipeline.needs(mark.name):
            raise UserError(f"{mark.key}: no stage names '{mark.name}', so it would do nothing; leave it out.")


def _check_halves(pipeline: Pipeline) -> None:
    """Refuse a stage without the other one that its method is made of."""
    for stage in pipeline.stages():
        if stage.only_with and not any(other.is_of(stage.only_with) for other in pipeline.stages()):
            raise UserError(
                f"{stage.key}: alone it is half a method, whose other half is {stage.only_with.__module__}."
                f"{stage.only_with.__name__}; choose the method whole with '+exp=...', or leave it out."
            )


def _check_alternatives(pipeline: Pipeline) -> None:
    """Refuse two forms of one method, each of which would add its own terms."""
    chosen: dict[str, str] = {}
    for stage in pipeline["shapes"]:
        home = _bare(stage.call).__module__
        if home.startswith(METHODS) and home in chosen:
            raise UserError(
                f"{stage.key}: it is another form of {chosen[home]}, and each would add its terms to the reward; leave "
                "one of them out."
            )
        chosen[home] = stage.key
    for stage, other in itertools.permutations(pipeline.stages(), 2):
        if stage.instead_of and other.is_of(stage.instead_of):
            raise UserError(
                f"{stage.key}: it is another form of {other.key}, and the two would act twice; leave one of them out."
            )


def _check_scale(pipeline: Pipeline, args: GRPOConfig) -> None:
    """Refuse to mix standardised credit into TRL's advantages where these are in units of the reward."""
    for stage in pipeline["credits"]:
        if "advantages" not in stage.needs and THINKING in stage.kinds:
            return  # it makes advantages of its own
        if stage.among_standardised and args.scale_rewards == "none":
            raise UserError(
                f"trainer.scale_rewards: 'none' leaves advantages in units of the reward, while {stage.key} mixes them "
                "with something in standard deviations of the group; set it to group."
            )


def _check_nothing_is_discarded(pipeline: Pipeline) -> None:
    """Refuse what a stage that computes rewards, or advantages of thinking rows, anew would leave without effect."""
    for earlier, stage in itertools.pairwise(pipeline["shapes"]):
        if stage.relabels:
            raise UserError(
                f"{earlier.key}: {stage.key} comes after it and makes rewards of its own, so it would do nothing; "
                "choose them in the other order, as '+shape=[vote,other]', or leave one out."
            )
    credits = [stage for stage in pipeline["credits"] if THINKING in stage.kinds]
    for earlier, stage in itertools.pairwise(credits):
        if "advantages" not in stage.needs:
            other_order = "choose them in the other order, as +credit=[first,second], or leave one out"
            raise UserError(
                f"{earlier.key}: {stage.key} comes after it and computes the advantages anew, so it would do nothing; "
                f"{other_order if 'advantages' in earlier.needs else 'leave one out'}."
            )
    if pipeline["shapes"] and credits and {"advantages", "rewards"}.isdisjoint(credits[0].needs):
        raise UserError(
            f"{pipeline['shapes'][0].key}: {credits[0].key} takes its credit from something else than the reward, so a "
            "shaped reward would do nothing; leave one of them out."
        )


def _check_nothing_is_replaced(pipeline: Pipeline) -> None:
    """Refuse bounds and ratios whose every row gets those of a later stage, which does not build on them."""
    for slot in ("bounds", "ratios"):
        in_order = pipeline.stages(slot, live=False) + pipeline.stages(slot, live=True)
        for earlier, stage in itertools.combinations(in_order, 2):
            if set(earlier.kinds) <= set(stage.kinds) and {"eps_low", "eps_high"}.isdisjoint(stage.needs):
                raise UserError(
                    f"{earlier.key}: {stage.key} acts on the same rows after it and replaces what it gives, so it "
                    "would do nothing; leave one of them out."
                )


def _check_token_credit(pipeline: Pipeline, args: GRPOConfig) -> None:
    token_stages = [*pipeline.stages(*TOKEN_SLOTS), *(stage for stage in pipeline["credits"] if stage.per_token)]
    if token_stages and args.importance_sampling_level == "sequence":
        raise UserError(
            f"trainer.importance_sampling_level: 'sequence' averages the ratio over a response and so erases the "
            f"per-token effect of {token_stages[0].key}; set it to 'token' and add '+ratio=gspo_token'."
        )


def _check_loss_type(pipeline: Pipeline, args: GRPOConfig) -> None:
    """Refuse losses in which a stage would do nothing, or something else than it says."""
    token_stages = pipeline.stages(*TOKEN_SLOTS)
    if args.loss_type == "vespo" and (pipeline["credits"] or token_stages):
        raise UserError(
            f"trainer.loss_type: 'vespo' weighs whole sequences, so {(pipeline['credits'] or token_stages)[0].key} "
            "cannot act on its tokens; use grpo, dr_grpo, dapo or cispo."
        )
    if pipeline["bounds"] and args.loss_type == "sapo":
        raise UserError(
            f"trainer.loss_type: '{args.loss_type}' does not clip, so {pipeline['bounds'][0].key} would do nothing; "
            "use grpo, dr_grpo, dapo, bnpo, luspo or cispo."
        )
    if args.loss_type == "cispo" and (around := [stage.key for stage in pipeline["bounds"] if stage.around_one]):
        raise UserError(
            f"trainer.loss_type: 'cispo' caps the ratio at trainer.epsilon_high itself, while {around[0]} gives "
            "distances from a ratio of 1; use grpo, dr_grpo or dapo."
        )
    means = [stage.key for stage in token_stages if stage.per_response]
    if means and args.loss_type not in RESPONSE_MEANS:
        raise UserError(
            f"trainer.loss_type: '{args.loss_type}' sums over the tokens of a response, so the importance weight that "
            f"{means[0]} makes of their mean would count once per token; use {' or '.join(RESPONSE_MEANS)}."
        )
    for stage in pipeline["bounds"]:
        if not stage.needs:
            # a copy, since it may count its calls
            _, cap = act(stage.copy(), {}, *torch.ones(2, 1), kinds=stage.kinds[:1])
            _refuse_low_cap(stage.key, cap.item(), args)
    if not pipeline["bounds"]:
        _refuse_low_cap("trainer.epsilon_high", _epsilon_high(args), args)


def _refuse_low_cap(key: str, cap: float, args: GRPOConfig) -> None:
    """Refuse a distance from a ratio of 1 as the ratio at which CISPO caps."""
    if args.loss_type == "cispo" and cap < 1:
        raise UserError(
            f"{key}: trainer.loss_type=cispo caps the ratio itself, here at {cap:g}, so that even on-policy, at a "
            "ratio of 1, every update shrinks to that share; set 1 or more (TRL recommends 5), or another loss type."
        )


def _epsilon_high(args: GRPOConfig) -> float:
    """The upper clip range, which is the lower one unless it is set."""
    return args.epsilon if args.epsilon_high is None else args.epsilon_high


def _check_anchor(pipeline: Pipeline, args: GRPOConfig) -> None:
    """Refuse TRL's KL term, which no weight reaches, beside an anchor that follows the weights."""
    for stage in pipeline["aux"]:
        if {"ref_logps", "weight"} <= set(stage.needs) and args.beta != 0.0:
            raise UserError(
                f"trainer.beta: {args.beta:g} would add TRL's KL term on every token, while {stage.key} anchors only "
                "the tokens that the weights keep; set trainer.beta=0, and the strength by the stage's own setting."
            )


def _warn_of_idle_stages(pipeline: Pipeline, args: GRPOConfig) -> None:
    """Say which stages will change nothing, or something else than they say, in this run or beside these stages."""
    stages = pipeline.stages()
    updates = args.num_iterations * args.steps_per_generation / args.gradient_accumulation_steps
    idle = [*pipeline["bounds"], *(stage for stage in stages if stage.off_policy_only)]
    if idle and updates <= 1:
        logger.warning(
            "%s: each window is trained in one optimizer step, where every ratio is 1, so it changes nothing; set "
            "trainer.num_iterations=2, or trainer.steps_per_generation above trainer.gradient_accumulation_steps.",
            ", ".join(stage.key for stage in idle),
        )
    for stage in stages:
        if stage.on_policy_only and updates > 1:
            logger.warning(
                "%s.importance: each window is trained in %g optimizer steps, and without a weight by the ratio the "
                "gradient is that of the divergence in the first one alone; set it to detached.",
                stage.key,
                updates,
            )
        if 0 < args.max_steps <= stage.after:
            logger.warning(
                "%s.after: it begins after %d optimizer steps, and trainer.max_steps=%d ends the run before; lower it.",
                stage.key,
                stage.after,
                args.max_steps,
            )
    for stage in pipeline["controls"]:
        if _sets_what_is_configured(stage, args):
            logger.warning(
                "%s: in the first and in the last step of the run it sets what is configured anyway; begin earlier, or "
                "raise trainer.max_steps=%d.",
                stage.key,
                args.max_steps,
            )
    for stage in pipeline["weights"]:
        # a credit may give groups an advantage that have none by their rewards
        if stage.only_for and not pipeline.needs(stage.only_for) and not pipeline["credits"]:
            logger.warning(
                "%s: it matters to stages that name '%s' alone, and there is none; add one, or leave it out.",
                stage.key,
                stage.only_for,
            )


def _sets_what_is_configured(stage: Stage, args: GRPOConfig) -> bool:
    """Whether a control that goes by the progress alone changes nothing at either end of a run of a known length."""
    if set(stage.needs) - {"progress"} or stage.observer or hasattr(stage.call, "state_dict") or args.max_steps <= 0:
        return False
    configured = {
        "max_completion_length": args.max_completion_length,
        "epsilon": args.epsilon,
        "epsilon_high": _epsilon_high(args),
    }
    ends = (Progress(step, args.max_steps) for step in (0, args.max_steps - 1))
    return all(stage.copy().run({"progress": progress}).items() <= configured.items() for progress in ends)


def _check_added_rows(pipeline: Pipeline, args: GRPOConfig) -> None:
    if not pipeline["rows"]:
        return
    key = pipeline["rows"][0].key
    if args.loss_type == "bnpo":
        raise UserError(
            f"trainer.loss_type: 'bnpo' divides by the tokens of a micro-batch, so the rows that {key} may add would "
            "change its divisor at random; use dapo, dr_grpo or grpo."
        )
    if args.mask_truncated_completions:
        raise UserError(
            f"trainer.mask_truncated_completions: {key} may add rows that end without an end-of-sequence token, which "
            "this would silently mask; set it to false."
        )
    if args.entropy_coef or args.use_adaptive_entropy:
        raise UserError(
            f"trainer.entropy_coef: TRL's entropy bonus would also act on the rows that {key} may add; use "
            "'+aux=entropy_bonus' instead, which acts on thinking rows."
        )
