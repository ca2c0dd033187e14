"""Signatures as declarations: what is read from them, and what is refused."""

import functools
import inspect
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from trl import GRPOConfig

from rltoken.combinations import check
from rltoken.errors import UserError
from rltoken.methods.brpo import brpo, thinking_only
from rltoken.methods.clip_range import clip_range
from rltoken.methods.dynamic_sampling import dynamic_sampling
from rltoken.methods.forced_answer import forced_answer
from rltoken.methods.hapo_entropy import tempered
from rltoken.methods.ttrl import majority_vote
from rltoken.pipeline import SLOTS, Stage, build
from rltoken.ranges import Count, Range, Share
from rltoken.running import act, look
from rltoken.types import LIVE, SAMPLED, SCORED


def stage_of(slot, call):
    return build({slot: {"mine": call}})[slot][0]


def test_names_become_needs_and_timing():
    window = stage_of("weights", lambda old_entropy, mask, *, rho=0.2: old_entropy)
    live = stage_of("weights", lambda entropy, mask: entropy)
    assert (window.needs, window.live) == (("old_entropy", "mask"), False)
    assert (live.needs, live.live) == (("entropy", "mask"), True)


def test_partial_settings_are_no_signals():
    def weight(mask, *, rho):
        return mask * rho

    stage = stage_of("weights", functools.partial(weight, rho=0.5))
    assert stage.needs == ("mask",)
    assert stage.run({"mask": torch.ones(1, 2)}).tolist() == [[0.5, 0.5]]


class RunningBaseline:
    """Advantages above a running mean of the rewards, where a group is too small for a mean of its own."""

    def __init__(self, decay: float = 0.9):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay, self.mean = decay, 0.0

    def __call__(self, rewards: Tensor) -> Tensor:
        advantages = rewards - self.mean
        self.mean = self.decay * self.mean + (1 - self.decay) * float(rewards.nan_to_num(self.mean).mean())
        return advantages

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean = state["mean"]


RUNNING_BASELINE = """
# @package method.credits.running_baseline
# Advantages above a running mean of the rewards
_target_: my_stages.RunningBaseline
decay: 0.9  # share of the mean that one window leaves as it was
"""


def baseline_pipeline(monkeypatch, **settings):
    monkeypatch.setitem(sys.modules, "my_stages", SimpleNamespace(RunningBaseline=RunningBaseline))
    return build({"credits": {"c": instantiate(OmegaConf.create(RUNNING_BASELINE), **settings)}})


def test_objects_keep_state(monkeypatch):
    pipeline, other = baseline_pipeline(monkeypatch), baseline_pipeline(monkeypatch)
    assert pipeline["credits"][0].run({"rewards": torch.tensor([1.0, 3.0])}).tolist() == [1.0, 3.0]
    other.load_state_dict(pipeline.state_dict())
    # 0.9 * 0 + 0.1 * 2 = 0.2
    assert other["credits"][0].run({"rewards": torch.ones(1)}).tolist() == pytest.approx([0.8])
    with pytest.raises(UserError, match=r"method\.credits\.c"):
        build({}).load_state_dict(pipeline.state_dict())


def test_a_class_needs_no_partial(monkeypatch):
    with pytest.raises(UserError, match=r"method\.credits\.c: a class needs no _partial_; remove it"):
        baseline_pipeline(monkeypatch, _partial_=True)


class SavesOnly:
    def __call__(self, rewards):
        return rewards

    def state_dict(self):
        return {}


class LoadsOnly(RunningBaseline):
    state_dict = property()


class SettingsOfCall:
    def __call__(self, mask, *, rho=0.2):
        return mask


class Observes:
    """A stage whose signals are those of the lambda it is made with, and that observes what `observe` names."""

    def __init__(self, observe, call):
        self.observe, self.call = observe, call
        self.__signature__ = inspect.signature(call)

    def __call__(self, *needed):
        return self.call(*needed)


def keyword_without_value(mask, *, rho):
    return mask


def swallows(mask, **settings):
    return mask


def unequal(value):
    if value[0] == value[1]:
        raise ValueError(f"{value} are equal.")


def ranged(
    mask,
    *,
    share: Share = 0.5,
    count: Count = 1,
    factor: Annotated[float, Range(least=0, below=1)] = 0.0,
    mode: Literal["mean", "sum"] = "mean",
    pair: Annotated[Sequence[float], unequal] = (0.0, 1.0),
):
    return mask


REFUSED = {
    "unknown signal": (
        "weights",
        lambda entropi, mask: mask,
        r"method\.weights\.mine: .*'entropi'.*did you mean 'entropy'",
    ),
    "signal that cannot be had": (
        "shapes",
        lambda old_logps: old_logps,
        r"method\.shapes\.mine: .*'old_logps' cannot be had",
    ),
    "live signal in a credit": ("credits", lambda logps: logps, r"'logps' cannot be had in the slot 'credits'"),
    "setting without a value": (
        "weights",
        keyword_without_value,
        r"method\.weights\.mine\.rho: .*set method\.weights\.mine\.rho=",
    ),
    "kwargs": ("weights", swallows, r"takes \*settings"),
    "state that is only saved": ("shapes", SavesOnly(), r"method\.shapes\.mine: .*without load_state_dict; define it"),
    "state that is only loaded": ("shapes", LoadsOnly(), r"method\.shapes\.mine: .*without state_dict; define it"),
    "settings of a call": ("weights", SettingsOfCall(), r"method\.weights\.mine\.rho: .*move it to .*__init__"),
    "class": ("shapes", RunningBaseline, r"method\.shapes\.mine: a class needs no _partial_"),
    "no callable": ("weights", 3, r"method\.weights\.mine: 3 is no stage"),
    "row numbers in a shuffled micro-batch": (
        "weights",
        lambda entropy, parent: entropy,
        r"'parent' belongs to the whole window",
    ),
    "random stream in a micro-batch": ("weights", lambda entropy, rng: entropy, r"'rng' belongs to the whole window"),
    "kinds that are no texts": (
        "weights",
        functools.partial(lambda mask: mask, kinds=[1]),
        r"method\.weights\.mine\.kinds: \[1\] is no list of kinds of rows; set it to \[thinking\]",
    ),
    "no kinds": (
        "weights",
        functools.partial(lambda mask: mask, kinds=None),
        r"\.mine\.kinds: None is no list of kinds",
    ),
    "kinds where rows have none": (
        "shapes",
        functools.partial(lambda rewards: rewards, kinds=("summary",)),
        r"method\.shapes\.mine\.kinds: ",
    ),
    "an observer of what the stage sees itself": (
        "credits",
        Observes(lambda mask: mask, lambda rewards: rewards),
        r"method\.credits\.mine: observe\(\) is for a control, or .* names 'observed'",
    ),
    "an observer whose result nobody names": (
        "weights",
        Observes(lambda mask: mask, lambda ratio: ratio),
        r"method\.weights\.mine: observe\(\) is for a control, or .* names 'observed'",
    ),
    "an observer of the forward": (
        "weights",
        Observes(lambda entropy: entropy, lambda ratio, observed: observed),
        r"method\.weights\.mine: the signal 'entropy' cannot be had in observe\(\)",
    ),
    "an observer of nothing that there is": (
        "controls",
        Observes(lambda old_entropi: None, lambda progress: {}),
        r"method\.controls\.mine: there is no signal 'old_entropi' \(did you mean 'old_entropy'",
    ),
    "an observer whose state would differ between ranks": (
        "controls",
        Observes(lambda old_hidden: None, lambda progress: {}),
        r"method\.controls\.mine: each rank has 'old_hidden' of its own rows only",
    ),
    "what nobody observed": ("weights", lambda ratio, observed: observed, r"there is no signal 'observed'"),
    "aux without gradient": ("aux", lambda old_entropy: old_entropy, r"without a live signal has no gradient"),
}


OUT_OF_RANGE = {
    "share": ([0, 1.5, "high", None, True, float("nan")], r"is not possible; set it to a number above 0 and up to 1\."),
    "count": ([0, 1.5, True], r"is not possible; set it to a whole number from 1\."),
    "factor": ([-0.1, 1], r"is not possible; set it to a number from 0 and below 1\."),
    "mode": (["men", 3], r"there is no .*; choose one of: mean, sum\."),
    "pair": ([[1, 1], 3], r"(are equal|not subscriptable)\."),
}


@pytest.mark.parametrize("setting", OUT_OF_RANGE)
def test_settings_out_of_range_are_refused(setting):
    values, message = OUT_OF_RANGE[setting]
    for value in values:
        with pytest.raises(UserError, match=rf"method\.weights\.mine\.{setting}: .*{message}"):
            build({"weights": {"mine": functools.partial(ranged, **{setting: value})}})
    build({"weights": {"mine": functools.partial(ranged, share=1, count=3, factor=0.99, mode="sum", pair=[1, 2])}})


@pytest.mark.parametrize("name", REFUSED)
def test_refused_signatures(name):
    slot, call, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as found:
        build({slot: {"mine": call}})
    assert "\n" not in str(found.value)


def test_what_a_stage_observes_is_its_own():
    pipeline = build(
        {
            "controls": {"c": Observes(lambda old_entropy: None, lambda progress: {})},
            "weights": {
                name: Observes(lambda old_hidden: old_hidden, lambda ratio, observed: observed) for name in ("v", "w")
            },
        }
    )
    (control,), (v, w) = pipeline["controls"], pipeline["weights"]
    assert (control.live, control.observer.needs, control.observer.live) == (False, ("old_entropy",), False)
    assert (v.live, v.needs, w.needs) == (
        True,
        ("ratio", v.observed),
        ("ratio", w.observed),
    ) and v.observed != w.observed
    assert pipeline.needs("old_entropy") and pipeline.naming("old_hidden") == [v.observer, w.observer]


def test_a_control_observes_thinking_rows_only():
    seen = []
    control = stage_of("controls", Observes(lambda mask: seen.append(mask.tolist()), lambda progress: {}))
    mask = torch.tensor([[1, 1], [0, 1], [1, 0]])
    look(control.observer, {"mask": mask, "kind": ["thinking", "summary", "thinking"]})
    look(control.observer, {"mask": mask, "kind": ["thinking"] * 3})
    assert seen == [[[1, 1], [1, 0]], mask.tolist()]


def changing(**attributes):
    """A control that changes logits, with attributes."""

    def control(progress):
        return {"logits": functools.partial(tempered, tau=0.1)}

    vars(control).update(attributes)
    return control


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, r"method\.controls\.mine: it changes logits unannounced; give it the attribute changes_logits = True"),
        ({"changes_logits": True}, r"method\.controls\.mine: rltoken_logits: tempered\(.* is not to be called"),
    ],
)
def test_a_change_of_logits_is_announced_and_can_be_called(attributes, message):
    pipeline = build({"controls": {"mine": changing(**attributes)}})
    assert pipeline.changes_logits == bool(attributes)
    with pytest.raises(UserError, match=message):
        check(pipeline, arguments())


def test_unknown_slot_names_the_nearest():
    with pytest.raises(UserError, match=r"method\.weight: .*did you mean 'weights'"):
        build({"weight": {}})


def arguments(**changes):
    settings = {
        "output_dir": "unused",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "bf16": False,
        "use_cpu": True,
    }
    return GRPOConfig(**settings | changes)


COMBINATIONS = {
    "sequence ratios": (
        {"weights": {"w": lambda mask: mask}},
        {"importance_sampling_level": "sequence"},
        r"importance_sampling_level",
    ),
    "bounds that do nothing": ({"bounds": {"b": lambda: (0.1, 0.2)}}, {"loss_type": "sapo"}, r"loss_type: 'sapo'"),
    "vespo": ({"credits": {"c": lambda rewards: rewards}}, {"loss_type": "vespo"}, r"loss_type: 'vespo'"),
    "bnpo with rows": ({"rows": {"r": lambda rollout: rollout}}, {"loss_type": "bnpo"}, r"loss_type: 'bnpo'"),
    "masked truncation": (
        {"rows": {"r": lambda rollout: rollout}},
        {"mask_truncated_completions": True},
        r"mask_truncated_completions",
    ),
    "entropy bonus": ({"rows": {"r": lambda rollout: rollout}}, {"entropy_coef": 0.1}, r"trainer\.entropy_coef"),
    "shapes": (
        {"shapes": {"s": lambda rewards: rewards}},
        {"multi_objective_aggregation": "normalize_then_sum"},
        r"multi_objective_aggregation",
    ),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_are_refused_before_anything_loads(name):
    stages, changes, message = COMBINATIONS[name]
    pipeline, args = build(stages), arguments(**changes)
    with pytest.raises(UserError, match=message):
        check(pipeline, args)
    check(build({}), args)


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({}, True),
        ({"num_iterations": 2}, False),
        ({"steps_per_generation": 2}, False),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 2}, True),
    ],
    ids=str,
)
def test_bounds_that_never_act_are_warned_of(caplog, changes, idle):
    check(build({"bounds": {"range": clip_range}}), arguments(**changes))
    assert ("method.bounds.range: each window is trained in one optimizer step" in caplog.text) == idle


def test_split_group_is_refused():
    args = arguments()
    args.per_device_train_batch_size = 6  # as on two ranks, whose global batch of 12 holds three groups of 4
    with pytest.raises(UserError, match=r"trainer\.num_generations: .*split over ranks.*multiple of num_generations"):
        check(build({}), args)


def test_a_stage_that_raises_names_itself():
    def broken(mask):
        raise KeyError("lost")

    with pytest.raises(UserError, match=r"method\.weights\.mine: the stage raised KeyError: 'lost'") as found:
        stage_of("weights", broken).run({"mask": torch.ones(1, 1)})
    assert isinstance(found.value.__cause__, KeyError)


def test_act_leaves_other_kinds_alone():
    stage = Stage("method.weights.mine", lambda mask: mask * 0 + 5.0, ("mask",), kinds=("summary",))
    base, mask = torch.ones(3, 2), torch.ones(3, 2, dtype=torch.long)
    (found,) = act(stage, {"mask": mask}, base, kinds=["thinking", "summary", "thinking"])
    assert found.tolist() == [[1.0, 1.0], [5.0, 5.0], [1.0, 1.0]]
    (untouched,) = act(stage, {"mask": mask}, base)
    assert untouched is base


def test_act_shows_a_stage_its_own_rows_only():
    seen = {}

    def recorded(rewards, parent, kind):
        seen.update(rewards=rewards.tolist(), parent=parent.tolist(), kind=kind)
        return rewards

    stage = Stage("method.credits.mine", recorded, ("rewards", "parent", "kind"), kinds=("summary", "thinking"))
    signals = {
        "rewards": torch.tensor([1.0, 2.0, 3.0]),
        "parent": torch.tensor([0, 1, 1]),
        "kind": ["padding", "thinking", "summary"],
    }
    act(stage, signals, torch.zeros(3), kinds=signals["kind"])
    assert seen == {"rewards": [2.0, 3.0], "parent": [0, 0], "kind": ["thinking", "summary"]}


@pytest.mark.parametrize("value", [torch.ones(2, 3), torch.ones(5), (torch.ones(3), torch.ones(3))])
def test_results_of_another_shape_are_refused(value):
    stage = Stage("method.weights.mine", lambda mask: value, ("mask",))
    with pytest.raises(UserError, match=r"method\.weights\.mine: the stage returned"):
        act(stage, {"mask": torch.ones(3, 2)}, torch.ones(3, 2))


@pytest.mark.parametrize("value", [None, "high", [[1.0], [1.0, 2.0]], {"loss": 1.0}])
def test_results_that_are_no_numbers_are_refused(value):
    stage = Stage("method.weights.mine", lambda mask: value, ("mask",))
    with pytest.raises(UserError, match=r"method\.weights\.mine: the stage returned .*no number and no tensor"):
        act(stage, {"mask": torch.ones(2, 2)}, torch.ones(2, 2))


def test_every_signal_is_described():
    assert all(isinstance(text, str) and text for slot in SLOTS.values() for text in slot.values())
    assert not set(SAMPLED) & set(SCORED) and not (set(SAMPLED) | set(SCORED)) & set(LIVE)


EARLY = {
    "a published signal that nobody publishes": (
        {"credits": {"brpo": functools.partial(brpo)}},
        r"method\.credits\.brpo: no rows stage publishes 'budget_scores'; add one",
    ),
    "a length beyond the longest completion": (
        {"controls": {"long": lambda progress: {"max_completion_length": 17}}},
        r"method\.controls\.long: a completion length of 17 is outside 1 to trainer\.max_completion_length=16",
    ),
    "thinking without answers": (
        {"controls": {"think": functools.partial(thinking_only, budgets=[4, 8], longest=8)}},
        r"method\.controls\.think: sampling stops at the end of thinking, .* add a rows stage",
    ),
    "rewards before there are answers": (
        {
            "controls": {"think": functools.partial(thinking_only, budgets=[4, 8], longest=8)},
            "rows": {"dynamic": dynamic_sampling},
        },
        r"method\.rows\.dynamic: there is no reward yet, .*, by ~method\.controls\.think\.$",
    ),
    "thinking replaced where rows have grown from it": (
        {"rows": {"force": forced_answer, "dynamic": dynamic_sampling}},
        r"method\.rows\.dynamic: .* must come before method\.rows\.force; .*'\+rows=\[dynamic,force\]'",
    ),
    "a kind that no row has": (
        {"weights": {"w": functools.partial(lambda mask: mask, kinds=["summary"])}},
        r"method\.weights\.w\.kinds: there are only rows of the kind 'thinking' without a rows stage",
    ),
    "two credits that start anew": (
        {"credits": {"one": lambda rewards: rewards, "two": lambda rewards: rewards}},
        r"method\.credits\.one: .*would do nothing; leave one out\.$",
    ),
    "a reward that a vote replaces": (
        {"shapes": {"short": lambda rewards: rewards, "vote": majority_vote}},
        r"method\.shapes\.short: method\.shapes\.vote comes after it and makes rewards of its own, .* other order",
    ),
    "a length in parts of a token": (
        {"controls": {"half": lambda progress: {"max_completion_length": 8.5}}},
        r"method\.controls\.half: a completion length of 8\.5 is no whole number",
    ),
    "a clip range that is no number": (
        {"controls": {"clip": lambda progress: {"epsilon": float("nan")}}},
        r"method\.controls\.clip: epsilon=nan is no finite number from 0",
    ),
    "a control that returns nothing": (
        {"controls": {"none": lambda progress: None}},
        r"method\.controls\.none: the stage returned None; return a dict",
    ),
}


@pytest.mark.parametrize("name", EARLY)
def test_what_only_the_first_window_would_show_is_refused_before_it(name):
    stages, message = EARLY[name]
    with pytest.raises(UserError, match=message):
        check(build(stages), arguments(max_completion_length=16))


def test_trying_a_control_stage_leaves_its_state_alone():
    class Counter:
        calls = 0

        def __call__(self, progress):
            self.calls += 1
            return {"max_completion_length": 8}

    counter = Counter()
    check(build({"controls": {"counter": counter}}), arguments())
    assert counter.calls == 0


def test_trying_a_bounds_stage_leaves_its_state_alone():
    """It is asked for its clip range, which CISPO would take for a cap of the ratio."""

    class Counter:
        calls = 0

        def __call__(self):
            self.calls += 1
            return 0.2, 5.0

    counter = Counter()
    check(build({"bounds": {"counter": counter}}), arguments())
    assert counter.calls == 0


def test_budgets_that_round_to_the_same_number_are_refused_with_the_setting_beside_them():
    stage = functools.partial(thinking_only, budgets=[0.25, 0.5, 1.0], longest=2)
    with pytest.raises(UserError, match=r"method\.controls\.b\.budgets: .* of 2 tokens are \[0, 1, 2\]"):
        build({"controls": {"b": stage}})
    build({"controls": {"b": functools.partial(thinking_only, budgets=[0.25, 0.5, 1.0], longest=8)}})


def test_an_error_about_a_setting_is_told_under_its_key():
    stage = stage_of("credits", functools.partial(brpo, prior=[1, 2, 3]))
    signals = {"budget_scores": torch.zeros(2, 2), "budgets": torch.tensor([[1, 2]] * 2), "group": torch.zeros(2)}
    with pytest.raises(
        UserError, match=r"^method\.credits\.mine\.prior: 3 weights for 2 budgets; give one for each\.$"
    ):
        stage.run(signals | {"mask": torch.ones(2, 2)})
