"""Ada-GRPO: the numbers of the specification, the gate on formats, what traces look like, and its configurations."""

import copy
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rltoken.errors import UserError
from rltoken.methods.ada_grpo import TAGS, ada_grpo, closing, diversity_scale, format_of, written
from rltoken.tiny.world import TAGS as TINY
from rltoken.tiny.world import World, problem, tagged_trace
from rltoken.train import checked
from rltoken.types import Progress
from tests.methods.configured import composed

CONF = Path(__file__).resolve().parents[2] / "conf"
BODY = {
    "direct": "<ANSWER>\n4\n</ANSWER>",
    "short": "<COT>\n2 and 2\n</COT>\n<ANSWER>\n4\n</ANSWER>",
    "code": "<CODE>\nprint(2 + 2)\n</CODE>\n<ANSWER>\n4\n</ANSWER>",
    "long": "<LONG_COT>\nWait.\n</LONG_COT>\n<ANSWER>\n4\n</ANSWER>",
}
FORMS = ["direct", "short", "short", "code", "long", "long", "long", "long"]
TEXTS = [BODY[form] for form in FORMS]
REWARDS = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
GROUP = torch.zeros(8, dtype=torch.long)
NUMBERS = torch.tensor([list(TAGS).index(form) for form in FORMS])


def close(found, expected):
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=0, atol=2e-6)
    return True


def advantages(shaped, eps):
    """GRPO's, of one group."""
    return (shaped - shaped.mean()) / (shaped.std() + eps)


def shaped_at(t, steps=100, texts=TEXTS, rewards=REWARDS, **settings):
    """Rewards at step t, which counts from 1 as in the paper's code."""
    group = torch.zeros(len(texts), dtype=torch.long)
    return ada_grpo(texts, rewards, rewards > 0.5, group, Progress(t - 1, steps), **settings)[0]


@pytest.mark.parametrize(
    ("t", "rare", "short", "long"),
    [(0, 8.0, 4.0, 2.0), (25, 6.974874, 3.560660, 1.853553), (50, 4.5, 2.5, 1.5), (100, 1.0, 1.0, 1.0)],
)
def test_the_scale_falls_from_rarity_to_one(t, rare, short, long):
    assert close(diversity_scale(NUMBERS, GROUP, t / 100), [rare, short, short, rare, long, long, long, long])


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0, [1.486242, -1.016902, 0.234670, 1.486242, -0.391116, -0.391116, -1.016902, -0.391116]),
        (25, [1.476363, -1.040740, 0.244236, 1.476363, -0.371827, -0.371827, -1.040740, -0.371827]),
        (50, [1.426493, -1.141194, 0.285299, 1.426493, -0.285299, -0.285299, -1.141194, -0.285299]),
        (100, [0.540061, -1.620182, 0.540061, 0.540061, 0.540061, 0.540061, -1.620182, 0.540061]),
    ],
)
def test_advantages_of_the_worked_example(t, expected):
    shaped = shaped_at(t, rewards=REWARDS.double())
    assert close(advantages(shaped, 1e-6), expected)


def test_advantages_with_trls_epsilon():
    found = advantages(shaped_at(0, rewards=REWARDS.double()), 1e-4)
    assert close(found[:5], [1.486196, -1.016871, 0.234662, 1.486196, -0.391104])


def test_at_the_last_step_it_is_grpo_and_at_the_first_it_is_not():
    assert torch.equal(shaped_at(100), REWARDS)
    assert close(shaped_at(1)[:1], [1 + 3.5 * (1 + math.cos(math.pi / 100))])


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=12), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_the_form_of_the_code_is_that_of_the_paper(forms, done):
    """G / F times the decay F / G + (1 - F / G) (1 + cos(pi t / T)) / 2."""
    form = torch.tensor(forms)
    share = torch.tensor([forms.count(one) / len(forms) for one in forms], dtype=torch.double)
    decay = share + (1 - share) * (1 + math.cos(math.pi * done)) / 2
    found = diversity_scale(form, torch.zeros_like(form), done)
    torch.testing.assert_close(found, decay / share)


def test_formats_are_counted_within_their_group_alone():
    group = torch.tensor([0, 0, 1, 1])
    assert close(diversity_scale(torch.tensor([0, 1, 0, 0]), group, 0.0), [2.0, 2.0, 1.0, 1.0])


def test_a_first_window_without_any_format_is_told(caplog):
    """Not of later windows, nor of the empty completions with which a trainer tries its stages."""
    untaught = ["S 2 A +3 5", "</COT> 4"] * 4
    for texts, step in ((untaught, 1), (["", ""] * 4, 0), ([*untaught[1:], BODY["short"]], 0)):
        ada_grpo(texts, REWARDS, REWARDS > 0.5, GROUP, Progress(step, 100))
    assert not caplog.messages
    ada_grpo(untaught, REWARDS, REWARDS > 0.5, GROUP, Progress(0, 100))
    (told,) = caplog.messages
    assert told.startswith("method.shapes.ada_grpo.tags: no completion of the first window is in a format")
    assert "supervised stage, as sft=tiny or sft=paper" in told and "<ANSWER>, <COT>, <CODE>, <LONG_COT>" in told


@pytest.mark.parametrize("form", TAGS)
def test_a_written_completion_has_its_format(form):
    reasoning = {"short": "2 and 2", "code": "print(2 + 2)", "long": " Wait.\n"}.get(form)
    text = written(form, reasoning, "4")
    assert text == BODY[form]
    assert format_of(text, TAGS) == (list(TAGS).index(form), True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 4.", (-1, False)),
        ("So <COT>2</COT><ANSWER>4</ANSWER>", (-1, False)),
        ("<CODE>1</CODE> <COT>", (2, False)),
        ("<CODE>1</COT><ANSWER>4</ANSWER>", (2, False)),
        ("<LONG_COT>1</LONG_COT><ANSWER>4</ANSWER>", (3, True)),
        ("<ANSWER>4</ANSWER></LONG_COT>", (0, False)),
        ("<COT> <ANSWER>4</ANSWER> <ANSWER>5</ANSWER>", (1, True)),
        ("", (-1, False)),
    ],
)
def test_the_gate(text, expected):
    assert format_of(text, TAGS) == expected


WORLD = World(tagged=True, min_operations=1)
STRUCTURES = OmegaConf.load(CONF / "model/tiny.yaml").structures
STEPS = "S 4 A -2 2 so 2"


@given(st.integers(0, 2**32), st.sampled_from(list(TINY)))
@settings(max_examples=100, deadline=None)
def test_every_trace_of_the_embedded_world_has_its_structure_but_a_long_one_without_room(seed, form):
    rng = random.Random(seed)
    text = " ".join(tagged_trace(rng, problem(rng, WORLD), WORLD, form).completion[:-1])
    rechecked = form != "long" or "wait" in text
    assert format_of(text, TINY, STRUCTURES) == (list(TINY).index(form), rechecked)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<DIRECT> </think> 2", (0, True)),
        (f"<DIRECT> {STEPS} </think> 2", (0, False)),
        (f"<COT> {STEPS} </think> 2", (1, True)),
        (f"<COT> {STEPS} wait check {STEPS} </think> 2", (1, False)),
        ("<COT> 4 -2 2 </think> 2", (1, False)),
        ("<CODE> 4 -2 2 </think> 2", (2, True)),
        ("<CODE> 4 -2 2 # 5 </think> 5", (2, True)),
        (f"<CODE> {STEPS} </think> 2", (2, False)),
        ("<CODE> 4 </think> 2", (2, False)),
        (f"<LONG_COT> {STEPS} wait check {STEPS} </think> 2", (3, True)),
        (f"<LONG_COT> {STEPS} </think> 2", (3, False)),
        ("<LONG_COT> </think> 2", (3, False)),
        ("<COT> S 4 A -2", (1, False)),
    ],
)
def test_the_structures_of_the_embedded_world(text, expected):
    assert format_of(text, TINY, STRUCTURES) == expected
    assert format_of(text, TINY) == (expected[0], True), "as published, the tag is enough"


def test_what_has_another_structure_than_its_format_is_worth_nothing_and_stays_in_the_counts():
    texts = [f"<DIRECT> {STEPS} </think> 2", "<DIRECT> </think> 2", f" <COT> {STEPS} </think> 2\n", "<CODE> 2"]
    kept = {"direct": STRUCTURES.direct, "short": STRUCTURES.short}
    assert close(shaped_at(0, texts=texts, rewards=torch.ones(4), tags=TINY, structures=kept), [0.0, 2.0, 4.0, 4.0])
    assert close(shaped_at(0, texts=texts, rewards=torch.ones(4), tags=TINY), [2.0, 2.0, 4.0, 4.0])


def test_a_structure_may_span_lines():
    kept = {"short": "<COT>.*</COT>.*</ANSWER>"}
    assert format_of(BODY["short"], TAGS, kept) == (1, True)
    assert format_of(BODY["short"] + " and more", TAGS, kept) == (1, False)


def test_without_diversity_it_is_the_gate_alone():
    texts = [*TEXTS[:7], "no format"]
    assert torch.equal(shaped_at(0, texts=texts, diversity=False), REWARDS * torch.tensor([1.0] * 7 + [0.0]))


def test_a_tag_of_its_own_for_the_format_without_thinking_is_foreign_to_others():
    tags = TAGS | {"direct": "<DIRECT>"}
    assert format_of("<COT> 1 <DIRECT> </think> 4", tags) == (1, False)
    assert format_of("<DIRECT> </think> 4", tags) == (0, True)
    assert written("direct", None, "4", tags) == "<DIRECT>\n</DIRECT>\n<ANSWER>\n4\n</ANSWER>"
    assert closing("<DIRECT>") == "</DIRECT>"


def test_what_breaks_its_format_is_worth_nothing_and_stays_in_the_counts():
    texts = ["It is 4.", "<COT>2</COT>", "<COT>2</COT></CODE>", "<CODE>2</CODE>"]
    rewards = torch.ones(4)
    assert close(shaped_at(0, texts=texts, rewards=rewards), [0.0, 2.0, 0.0, 4.0])
    metrics = ada_grpo(texts, rewards, rewards > 0.5, torch.zeros(4).long(), Progress(0, 9))[1]
    assert metrics == {
        "format/direct": 0.0, "format/short": 0.5, "format/code": 0.25, "format/long": 0.0, "format/broken": 0.5,
    }  # fmt: skip


def test_other_rewards_than_0_and_1():
    """Nothing lifts a wrong answer; what has no reward keeps none."""
    rewards = torch.tensor([0.3, -1.0, math.nan, 2.0])
    texts = [BODY["short"], "no format", BODY["code"], BODY["long"]]
    found = shaped_at(0, texts=texts, rewards=rewards)
    torch.testing.assert_close(found, torch.tensor([0.3, -1.0, math.nan, 8.0]), equal_nan=True)


def test_white_space_before_a_tag():
    texts, rewards = ["\n" + BODY["short"], BODY["code"]], torch.ones(2)
    assert close(shaped_at(0, texts=texts, rewards=rewards), [2.0, 2.0])
    assert close(shaped_at(0, texts=texts, rewards=rewards, strip=False), [0.0, 2.0])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{verse: a}", r"there is no format 'verse'; set structures of: direct, short, code, long"),
        ("[a]", r"\['a'\] is no mapping; set structures={short: EXPRESSION}, or null"),
        ("{short: 'a('}", r"short has 'a\(', no regular expression .*; correct it"),
    ],
)
def test_structures_that_cannot_be_checked_are_refused(value, message, tmp_path):
    cfg = copy.deepcopy(composed("+exp=ada_grpo", "sft=none"))
    OmegaConf.update(cfg, "model.structures", OmegaConf.create(value), merge=False)
    with pytest.raises(UserError, match=rf"method\.shapes\.ada_grpo\.structures: {message}"):
        checked(cfg, tmp_path)


@pytest.mark.parametrize(
    "value", ["{direct: a, short: ab}", "{direct: '', short: b}", "{a: <A>, b: <A>}", "{}", "[<A>]"]
)
def test_tags_that_cannot_be_told_apart_are_refused(value, tmp_path):
    cfg = copy.deepcopy(composed("+exp=ada_grpo", "sft=none"))
    OmegaConf.update(cfg, "method.shapes.ada_grpo.tags", OmegaConf.create(value), merge=False)
    with pytest.raises(UserError, match=r"method\.shapes\.ada_grpo\.tags: .*set"):
        checked(cfg, tmp_path)


def test_a_model_without_formats_is_refused(tmp_path):
    cfg = copy.deepcopy(composed("+exp=ada_grpo", "sft=none"))
    cfg.model.formats = None
    with pytest.raises(UserError, match=r"method\.shapes\.ada_grpo\.tags: None are no formats; set tags="):
        checked(cfg, tmp_path)


def test_the_exp_teaches_the_formats_that_it_rewards():
    cfg = composed("+exp=ada_grpo")
    assert cfg.world.tagged and cfg.sft.traces._target_ == "rltoken.tiny.traces"
    assert dict(cfg.method.shapes.ada_grpo.tags) == TAGS | {"direct": "<DIRECT>"}
    assert (cfg.trainer.loss_type, cfg.trainer.scale_rewards) == ("dapo", "group")
    assert cfg.method.shapes.ada_grpo.structures.keys() == TAGS.keys()
    control = composed("+exp=ada_grpo/grpo")
    assert cfg.method.shapes.ada_grpo.diversity and not control.method.shapes.ada_grpo.diversity
    assert (control.sft, control.trainer, control.world) == (cfg.sft, cfg.trainer, cfg.world)
    real = composed("+exp=ada_grpo", "scale=paper", "data.traces_path=traces.jsonl")
    assert dict(real.method.shapes.ada_grpo.tags) == TAGS == dict(real.sft.traces.formats)
    assert real.method.shapes.ada_grpo.structures is None, "as published"
