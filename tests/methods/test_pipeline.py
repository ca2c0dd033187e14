"""Signatures as declarations: what is read from them, and what is refused."""

import functools

import pytest
import torch
from trl import GRPOConfig

from rltoken.errors import UserError
from rltoken.pipeline import SLOTS, Stage, act, build
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


def test_objects_keep_state():
    class Counter:
        def __init__(self):
            self.calls = 0

        def __call__(self, rewards):
            self.calls += 1
            return rewards

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    pipeline, other = build({"shapes": {"c": Counter()}}), build({"shapes": {"c": Counter()}})
    pipeline["shapes"][0].run({"rewards": torch.ones(1)})
    other.load_state_dict(pipeline.state_dict())
    assert other["shapes"][0].call.calls == 1
    with pytest.raises(UserError, match=r"method\.shapes\.c"):
        build({}).load_state_dict(pipeline.state_dict())


def keyword_without_value(mask, *, rho):
    return mask


def swallows(mask, **settings):
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
    "no callable": ("weights", 3, r"method\.weights\.mine: 3 is no stage"),
    "row numbers in a shuffled micro-batch": (
        "weights",
        lambda entropy, parent: entropy,
        r"'parent' belongs to the whole window",
    ),
    "random stream in a micro-batch": ("weights", lambda entropy, rng: entropy, r"'rng' belongs to the whole window"),
    "kinds where rows have none": (
        "shapes",
        functools.partial(lambda rewards: rewards, kinds=("summary",)),
        r"method\.shapes\.mine\.kinds: ",
    ),
    "aux without gradient": ("aux", lambda old_entropy: old_entropy, r"without a live signal has no gradient"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_signatures(name):
    slot, call, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as found:
        build({slot: {"mine": call}})
    assert "\n" not in str(found.value)


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
        pipeline.check(args)
    build({}).check(args)


def test_split_group_is_refused():
    args = arguments()
    args.per_device_train_batch_size = 6  # as on two ranks, whose global batch of 12 holds three groups of 4
    with pytest.raises(UserError, match=r"trainer\.num_generations: .*split over ranks.*multiple of num_generations"):
        build({}).check(args)


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

    def look(rewards, parent, kind):
        seen.update(rewards=rewards.tolist(), parent=parent.tolist(), kind=kind)
        return rewards

    stage = Stage("method.credits.mine", look, ("rewards", "parent", "kind"), kinds=("summary", "thinking"))
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


def test_every_signal_is_described():
    assert all(isinstance(text, str) and text for slot in SLOTS.values() for text in slot.values())
    assert not set(SAMPLED) & set(SCORED) and not (set(SAMPLED) | set(SCORED)) & set(LIVE)
