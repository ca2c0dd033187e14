"""What every shape and credit in conf/ must keep, a new one too: the stages are those of the folders, not of a list."""

import functools
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from rltoken.config import register_schemas
from rltoken.methods.tldr_style import LEVELS
from rltoken.pipeline import build
from rltoken.signals import rows_of
from rltoken.types import Progress

CONF = Path(__file__).resolve().parents[2] / "conf"
STAGES = sorted(f"{path.parent.name}/{path.stem}" for group in ("shape", "credit") for path in CONF.glob(f"{group}/*"))
LASER = ("lowest=20", "highest=100", "interval=20", "bonus=3")
SETTINGS = {
    "shape/fast_math_r1": ("longest=60",),
    "shape/grpo_lead": ("longer_than=0",),
    "shape/hapo_history": ("weight=3",),
    "shape/hawkeye": ("weight=1e-3",),
    "shape/hbpo": ("alpha=0.2",),
    "shape/kimi_length": ("weight=4",),
    "shape/l1_exact": ("alpha=0.05",),
    "shape/l1_max": ("alpha=0.05",),
    "shape/laser": ("target=40",),
    "shape/laser_d": LASER,
    "shape/laser_de": LASER,
    "shape/optima": ("fewest=2", "most=60"),
    "shape/shorter_better": ("beta=0.05",),
    "shape/tldr_style": ("short=3",),
}
"""Constants at the size of these windows, large enough to lift wrong answers where nothing prevents it."""
BESIDE = {
    "shape/ada_grpo": ("model.formats.direct='so '", "model.formats.short='\\boxed{1}'", "model.structures=null"),
    "credit/hbpo": ("+shape=hbpo",),
    "credit/self_reward": ("+mark=class_balance", "+aux=self_reward", "method.credits.self_reward.after=0"),
}
LABEL_FREE = ("shape/ttrl", "shape/ttrl_extra")
"""Shapes that reward what the group agrees on, right or wrong."""
OF_PROGRESS = "shape/mrt_progress"
CASES = ("random", "all correct", "all wrong", "one success", "equal lengths")
PADDED = ("mask", "advantages", "old_entropy", "old_logps", "teacher_logps")


@functools.cache
def section(name):
    """The composed `method` of a stage alone."""
    group, _, stage = name.partition("/")
    own = [f"method.{group}s.{stage}.{setting}" for setting in SETTINGS.get(name, ())]
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        return compose("config", overrides=[f"+{name.replace('/', '=')}", *BESIDE.get(name, ()), *own]).method


def run(name, signals):
    """What the stage makes of a window after it has seen the window once, since some keep state."""
    pipeline = build(instantiate(section(name), _convert_="object"))
    (stage,) = pipeline[f"{name.partition('/')[0]}s"]
    stage.run(signals)
    found = stage.run(signals)
    return found[0] if isinstance(found, tuple) else found


def gated(name):
    """A shape whose configuration gates it, or that has no such setting since the form itself keeps the order."""
    if name in (*LABEL_FREE, OF_PROGRESS):
        return False
    return name.startswith("shape") and section(name).shapes[name.partition("/")[2]].get("gated", True)


def window(seed, case, groups=3, size=4, tokens=100):
    """Random signals of a window of completions up to the embedded world's length, with the trait that `case` names."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size
    group = torch.arange(rows) // size
    correct = torch.rand(rows, generator=generator) < 0.5
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    if case in ("all correct", "all wrong"):
        correct = torch.full_like(correct, case == "all correct")
    if case == "one success":
        correct = torch.arange(rows) % size == 1
    if case == "equal lengths":
        lengths = torch.full_like(lengths, 37)
    asked = torch.randint(1, 100, (groups,), generator=generator).tolist()
    columns = [
        {
            "budget": asked[g],
            "budget_kind": ("exact", "maximum")[g % 2],
            "length_level": LEVELS[g],
            "original_tokens": 90,
        }
        for g in group.tolist()
    ]
    return {
        "inputs": columns,
        "texts": [(r"\boxed{1} </think>", "so ")[i % 2] + "x" * n for i, n in enumerate(lengths.tolist())],
        "rewards": correct.float(),
        "correct": correct,
        "group": group,
        "prompt_id": [f"q{g}" for g in group.tolist()],
        "answers": torch.where(correct, 0, torch.randint(-1, 4, (rows,), generator=generator)),
        "lengths": lengths,
        "thinking_lengths": (lengths * 0.8).long(),
        "truncated": torch.rand(rows, generator=generator) < 0.3,
        "mask": (torch.arange(tokens) < lengths[:, None]).long(),
        "advantages": torch.randn(rows, 1, generator=generator).expand(rows, tokens).clone(),
        "old_entropy": torch.rand(rows, tokens, generator=generator),
        "old_logps": -torch.rand(rows, tokens, generator=generator),
        "teacher_logps": -torch.rand(rows, tokens, generator=generator),
        "progress": Progress(3, 10),
        "extra_answers": torch.randint(-1, 4, (groups, 3), generator=generator)[group],
        "old_appended": -23 + 5 * torch.randn(rows, generator=generator),
        "kind": ["summary" if i % 4 == 0 else "thinking" for i in range(rows)],
        "episodes": torch.tensor([[0, 25, 50, 100]]).expand(rows, 4),
        "episode_scores": torch.rand(rows, 4, generator=generator),
        "episode_progress": torch.rand(rows, generator=generator) - 0.5,
        "budgets": torch.tensor([[25, 50, 100]]).expand(rows, 3),
        "budget_scores": torch.rand(rows, 3, generator=generator),
        "completion_ids": [torch.randint(3, (n,), generator=generator).tolist() for n in lengths.tolist()],
    }


EACH = given(seed=st.integers(0, 10_000), case=st.sampled_from(CASES))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", STAGES)
def test_results_stay_finite_on_degenerate_groups(name, case):
    for seed in range(3):
        found = run(name, window(seed, case))
        assert found.size(0) == 12 and found.isfinite().all() and found.abs().max() < 1000


@pytest.mark.parametrize("name", STAGES)
@EACH
@settings(max_examples=6, deadline=None)
def test_the_order_of_rows_does_not_matter(name, seed, case):
    signals = window(seed, case)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(run(name, rows_of(signals, order)), run(name, signals)[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STAGES)
@EACH
@settings(max_examples=6, deadline=None)
def test_padding_does_not_matter(name, seed, case):
    """More padded tokens on the right, and whatever stands in them."""
    signals = window(seed, case)
    wider = signals | {key: pad(signals[key], (0, 7), value=9.0 if key != "mask" else 0) for key in PADDED}
    found, expected = run(name, wider), run(name, signals)
    if expected.dim() == 2:
        found, expected = found[:, :100] * signals["mask"], expected * signals["mask"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in STAGES if gated(name)])
@EACH
@settings(max_examples=15, deadline=None)
def test_no_wrong_answer_is_lifted_above_a_correct_one_of_its_group(name, seed, case):
    signals = window(seed, case)
    shaped = run(name, signals)
    for number in range(3):
        mine = signals["group"] == number
        right, wrong = shaped[mine & signals["correct"]], shaped[mine & ~signals["correct"]]
        assert not right.numel() or not wrong.numel() or right.min() >= wrong.max()


def test_the_only_shapes_that_lift_wrong_answers_are_published_for_it():
    """LASER-DE explores hard problems, MRT rewards progress without success, and a vote knows no gold."""
    found = [name for name in STAGES if name.startswith("shape") and not gated(name)]
    assert found == ["shape/laser_de", OF_PROGRESS, *LABEL_FREE]
