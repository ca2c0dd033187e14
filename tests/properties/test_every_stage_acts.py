"""Every stage in conf/, added alone to plain GRPO, changes what is trained, or the configuration says that it will not.

The stages are those of the folders. Each is tried on a few made-up windows, on-policy and off-policy, with the settings
of its file: what it makes is compared with what GRPO has in its place, down to advantages, ratios and gradients.
"""

import functools
import logging
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError

from rltoken.combinations import check
from rltoken.config import register_schemas, to_grpo_config
from rltoken.errors import UserError
from rltoken.ops import group_mean
from rltoken.pipeline import build
from rltoken.running import apart, change_prompts
from rltoken.tiny.data import problems
from rltoken.tiny.world import World
from rltoken.types import LIVE, PUBLISHED, Progress
from tests.properties import test_every_shape_and_credit as rewarded
from tests.properties import test_every_token_stage as scored

CONF = Path(__file__).resolve().parents[2] / "conf"
SLOTS = {
    "prompt": "prompts", "control": "controls", "rows": "rows", "shape": "shapes", "credit": "credits",
    "mark": "marks", "bounds": "bounds", "weight": "weights", "ratio": "ratios", "aux": "aux",
}  # fmt: skip
STAGES = sorted(f"{path.parent.name}/{path.stem}" for group in SLOTS for path in CONF.glob(f"{group}/*.yaml"))
REFUSED = {
    **dict.fromkeys(("mark/class_balance", "mark/high_covariance"), "no stage names"),
    **dict.fromkeys(("aux/kl_cov", "aux/self_reward"), "there is no signal"),
    **dict.fromkeys(("weight/own_share", "ratio/sequence_mean", "credit/mrt"), "half a method"),
    **dict.fromkeys(("rows/extra_votes", "rows/mrt_episodes"), "thrown away"),
    **dict.fromkeys(
        ("control/brpo", "credit/hbpo", "credit/self_reward", "prompt/think_prune"), "which does not exist"
    ),
    **dict.fromkeys(
        ("credit/brpo", "credit/mrt_episodes", "shape/mrt_progress", "shape/ttrl_extra"), "no rows stage publish"
    ),
    "credit/group_centred": "only rows of the kind",
}
"""What makes no sense alone -> what is said of it."""
WARNED = {
    **dict.fromkeys(("bounds/clip_range", "bounds/hapo_entropy", "bounds/unclipped", "ratio/gspo_token"), "on-policy"),
    "control/think_prune": "always",  # its file has the paper's steps, beyond the run's last one
    "weight/mixed_groups": "always",  # groups of equal rewards have no advantage anyway
}
"""What changes nothing alone, on-policy or always, and is warned of."""
BEYOND = {
    "rows/brpo": "adds rows", "rows/forced_answer": "adds rows", "rows/mrt": "replaces rows",
    "rows/dynamic_sampling": "replaces rows",
}  # fmt: skip
"""What needs a sampler to act at all: tests/trl compares the weights of each with those without it."""
TOKENS = ("bounds", "weight", "ratio", "aux")
"""The groups whose stages may hang on whether a ratio has left 1."""
MOST_STEPS = 60


@functools.cache
def section(name):
    """The composed configuration of a stage alone."""
    group, _, stage = name.partition("/")
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        return compose("config", overrides=["+exp=grpo", f"+{group}={stage}"])


def checked(name, tmp_path, iterations):
    """The stage, after the configuration has been checked as a run checks it.

    Raises:
        UserError: it is refused.
    """
    cfg = section(name)
    args = to_grpo_config(cfg.trainer, output_dir=str(tmp_path), seed=0)
    args.num_iterations = iterations
    try:
        pipeline = build(instantiate(cfg.method, _convert_="object"))
    except InterpolationKeyError as error:
        raise UserError(f"{error}, which does not exist") from error  # in the words of rltoken.config.explain
    check(pipeline, args)
    (stage,) = pipeline[SLOTS[name.partition("/")[0]]]
    return stage


def window(slot, off_policy, seed):
    """The signals of a window under GRPO: its advantages are rewards above the mean of the group."""
    signals = rewarded.window(seed, "random") if slot in ("shapes", "credits") else scored.window(seed, "random")
    if not off_policy and slot not in ("shapes", "credits"):
        signals |= {"logps": signals["old_logps"].clone(), "ratio": torch.ones_like(signals["ratio"])}
    signals = {name: value for name, value in signals.items() if name not in PUBLISHED}
    centred = signals["rewards"] - group_mean(signals["rewards"], signals["group"])
    token = signals["mask"].to(centred.dtype)
    return signals | {"advantages": centred.unsqueeze(1) * token, "rng": torch.Generator().manual_seed(3)}


def surrogate(signals, eps_low, eps_high):
    """The clipped objective per token."""
    ratio, advantages = signals["ratio"], signals["advantages"]
    return torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)


def on_tokens(value, signals):
    """A number, [B] or [B, T] as what trained tokens have of it."""
    value = torch.as_tensor(value)
    whole = value.unsqueeze(1) if value.dim() == 1 else value
    return whole.expand(signals["mask"].shape)[signals["mask"] > 0]


def acts(stage, slot, signals):
    """Whether what the stage makes of the window trains anything else than GRPO does."""
    if stage.observer:
        seen = stage.observer.run(signals)
        signals = signals | ({} if slot == "controls" else {stage.observed: seen})
    leaves = {name: signals[name].clone().requires_grad_() for name in LIVE if name in signals} if slot == "aux" else {}
    stage.run(signals | leaves)  # a history of lengths begins with the window before
    found, _ = apart(stage.run(signals | leaves))
    if slot == "aux":
        total = on_tokens(found, signals).sum()
        return any(
            gradient is not None and bool(gradient.any())
            for gradient in torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        )
    if slot == "shapes":
        before, after = (value - group_mean(value, signals["group"]) for value in (signals["rewards"], found))
    elif slot == "bounds":
        before, after = (surrogate(signals, *bounds) for bounds in ((0.2, 0.2), map(torch.as_tensor, found)))
    elif slot == "ratios":
        before, after = signals["old_logps"], found
    else:
        before = signals["advantages"]
        after = before * torch.as_tensor(found).view(len(before), -1) if slot == "weights" else found
    before, after = (on_tokens(value, signals) for value in (before, after))
    return not torch.allclose(before.double(), after.double(), rtol=0, atol=1e-9)


def asked_otherwise(stage):
    """Whether a prompt stage changes any prompt."""
    inputs = [dict(one) for one in problems(2, world=World(), seed=0) for _ in range(4)]
    rng, group = torch.Generator().manual_seed(0), torch.arange(8) // 4
    return change_prompts(stage, [dict(one) for one in inputs], group, Progress(0, MOST_STEPS), rng) != inputs


def sampled_otherwise(stage, configured):
    """Whether a control, once it has seen a window, sets anything that is not configured anyway."""
    if stage.observer:
        stage.observer.run(scored.window(0))
    needed = {"progress": Progress(0, MOST_STEPS), "last_window": None}
    return any(value != configured.get(name) for name, value in stage.run(needed).items())


def changes(name, stage, off_policy):
    """Whether the stage changes anything."""
    slot = SLOTS[name.partition("/")[0]]
    if slot == "prompts":
        return asked_otherwise(stage)
    if slot == "controls":
        return sampled_otherwise(stage, {"max_completion_length": section(name).trainer.max_completion_length})
    return any(acts(stage, slot, window(slot, off_policy, seed)) for seed in range(3))


@pytest.mark.parametrize(
    ("name", "iterations"),
    [
        pytest.param(name, iterations, id=f"{name}-{told}")
        for name in STAGES
        for iterations, told in ((1, "on-policy"), (2, "off-policy"))
        if name not in BEYOND and (iterations == 1 or name.partition("/")[0] in TOKENS)
    ],
)
def test_each_stage_acts_or_is_told_not_to(tmp_path, caplog, name, iterations):
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            checked(name, tmp_path, iterations)
        return
    with caplog.at_level(logging.WARNING):
        stage = checked(name, tmp_path, iterations)
    idle = WARNED.get(name) == "always" or (name in WARNED and iterations == 1)
    assert (stage.key in caplog.text) == idle
    assert changes(name, stage, iterations > 1) == (not idle)


@pytest.mark.parametrize("name", ["weight/thr", "aux/kdrl", "credit/kdrl"])
def test_what_is_said_to_be_idle_changes_nothing(tmp_path, name):
    stage = checked(name, tmp_path, 2)
    section_of = OmegaConf.to_container(OmegaConf.select(section(name), stage.key))
    pipeline = build({SLOTS[name.partition("/")[0]]: {stage.name: instantiate(section_of | stage.idle_at)}})
    (idle,) = pipeline.stages()
    assert changes(name, stage, True) and not changes(name, idle, True)


def test_the_exceptions_are_stages():
    assert {*REFUSED, *WARNED, *BEYOND} <= set(STAGES) and len(STAGES) > 60
