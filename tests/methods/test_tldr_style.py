"""In the style of TLDR: prompts of each level, its reward, traces that teach the levels, and settings."""

import copy
import functools
import json

import pytest
import torch

from rltoken.errors import UserError
from rltoken.methods.tldr_style import LEVELS, by_length, level_prompt, tldr_style
from rltoken.pipeline import build
from tests.methods.configured import assert_refused
from tests.methods.worked import (
    CORRECT,
    GROUP,
    GROUPS,
    LENGTHS,
    PROMPTS,
    REWARDS,
    assert_close,
    by_group,
    grpo,
    rows,
)

TLDR = {
    "short": ([0.75, 0.25, 0.0, 0.5], [1.161535, -0.387178, -1.161535, 0.387178]),
    "medium": ([0.875, 0.625, 0.0, 0.75], [0.803878, 0.160776, -1.44698, 0.482327]),
    "long": ([1.0, 1.0, 0.0, 1.0], [0.4999, 0.4999, -1.4997, 0.4999]),
}


@pytest.mark.parametrize("level", TLDR)
def test_tldr_style(level):
    shaped = tldr_style(rows(length_level=level), REWARDS, CORRECT, GROUP, LENGTHS, longest=4000)
    assert_close(shaped, TLDR[level][0])
    assert_close(grpo(shaped), TLDR[level][1])


def test_tldr_style_ungated_penalises_wrong_answers():
    shaped = tldr_style(rows(length_level="medium"), REWARDS, CORRECT, GROUP, LENGTHS, longest=4000, gated=False)
    assert_close(shaped, [0.875, 0.625, -0.5, 0.75])


def test_levels_are_drawn_per_group_and_asked_for():
    before = copy.deepcopy(PROMPTS)
    changed = level_prompt(PROMPTS, GROUPS, torch.Generator().manual_seed(0), short=" <s>", medium=" <m>", long=" <l>")
    levels = by_group(changed, "length_level")
    assert set(levels) == set(LEVELS) and before == PROMPTS
    assert changed[0]["prompt"][-1]["content"] == f"q0 <{levels[0][0]}>"


def test_one_level_alone_is_asked_for():
    changed = level_prompt(PROMPTS, GROUPS, torch.Generator().manual_seed(0), long=" <l>", levels=["long"])
    assert {example["length_level"] for example in changed} == {"long"}
    assert all(example["prompt"][-1]["content"].endswith(" <l>") for example in changed)


def stored(path, rows):
    """A file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_traces_are_told_their_level_by_their_length(tmp_path):
    """Of seven, sorted, i goes to level 3 i // 7: three, two and two; of equal lengths the first in the file."""
    lengths = [50, 10, 20, 60, 20, 30, 70]
    rows = [{"prompt": f"q{i}", "completion": f"c{i}", "tokens": n} for i, n in enumerate(lengths)]
    found = by_length(
        stored(tmp_path / "t.jsonl", rows), short=" <s>", medium=" <m>", long=" <l>", template="Do {problem}."
    )
    assert [(row["prompt"][0]["content"], row["completion"]) for row in found] == [
        ("Do q1. <s>", "c1"), ("Do q2. <s>", "c2"), ("Do q4. <s>", "c4"), ("Do q5. <m>", "c5"), ("Do q0. <m>", "c0"),
        ("Do q3. <l>", "c3"), ("Do q6. <l>", "c6"),
    ]  # fmt: skip


def test_traces_without_lengths_have_no_level(tmp_path):
    with pytest.raises(UserError, match=r"sft\.traces\.path: .* has no column 'tokens'; name a file of python -m rlt"):
        by_length(stored(tmp_path / "t.jsonl", [{"prompt": "q", "completion": "c"}]), short="", medium="", long="")


def test_a_missing_column_says_what_fills_it():
    with pytest.raises(ValueError, match=r"no column 'length_level'; add \+prompt=tldr_style"):
        tldr_style(rows(), REWARDS, CORRECT, GROUP, LENGTHS, longest=9)
    assert build({"shapes": {"mine": functools.partial(tldr_style, longest=9)}})["shapes"][0].needs[0] == "inputs"


@pytest.mark.parametrize("setting", ["method.shapes.tldr_style.short=-1", "method.shapes.tldr_style.longest=0"])
def test_settings_out_of_range_are_refused(setting):
    assert_refused("+shape=tldr_style", setting)
