"""Length rewards: numbers of the specifications or worked by hand; their prompts, state and configurations."""

import copy
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf
from trl import GRPOConfig

from rltoken.config import register_schemas
from rltoken.errors import UserError
from rltoken.methods.fast_math_r1 import boxed_while_thinking, cosine_reward, fast_math_r1
from rltoken.methods.hapo_history import HapoHistory
from rltoken.methods.hawkeye import hawkeye
from rltoken.methods.kimi_length import kimi_length
from rltoken.methods.l1 import l1_exact, l1_max, l1_prompt
from rltoken.methods.laser import LaserD, difficulty, laser, repetitive
from rltoken.methods.optima import optima
from rltoken.methods.shorter_better import shorter_better
from rltoken.methods.think_prune import within_limit
from rltoken.methods.tldr_style import LEVELS, by_length, level_prompt, tldr_style
from rltoken.ops import group_amax, group_amin
from rltoken.parts import rewards
from rltoken.pipeline import build

C = torch.tensor([1.0, 1.0, 0.0, 1.0])
RIGHT = C > 0.5
ONE = torch.zeros(4, dtype=torch.long)
N = torch.tensor([1000, 3000, 4000, 2000])
GATES = [False, True]


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=2e-6)
    return True


def grpo(rewards):
    """TRL's advantage of one group."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def rows(**columns):
    return [columns] * 4


TLDR = {
    "short": ([0.75, 0.25, 0.0, 0.5], [1.161535, -0.387178, -1.161535, 0.387178]),
    "medium": ([0.875, 0.625, 0.0, 0.75], [0.803878, 0.160776, -1.44698, 0.482327]),
    "long": ([1.0, 1.0, 0.0, 1.0], [0.4999, 0.4999, -1.4997, 0.4999]),
}


@pytest.mark.parametrize("level", TLDR)
def test_tldr_style(level):
    shaped = tldr_style(rows(length_level=level), C, RIGHT, ONE, N, longest=4000)
    assert close(shaped, TLDR[level][0]) and close(grpo(shaped), TLDR[level][1])


def test_tldr_style_ungated_penalises_wrong_answers():
    shaped = tldr_style(rows(length_level="medium"), C, RIGHT, ONE, N, longest=4000, gated=False)
    assert close(shaped, [0.875, 0.625, -0.5, 0.75])


def test_l1_exact():
    shaped = l1_exact(rows(budget=2000), C, RIGHT, ONE, N, gated=False)
    assert close(shaped, [0.7, 0.7, -0.6, 1.0])
    assert close(grpo(shaped), [0.350021, 0.350021, -1.470088, 0.770046])
    assert close(l1_exact(rows(budget=2000), C, RIGHT, ONE, N), [0.7, 0.7, 0.0, 1.0])


L1_MAX = {
    "paper": ([0.8, 0.2, 0.0, 0.5], [1.213939, -0.499857, -1.071123, 0.357041]),
    "code": ([0.65, 0.35, 0.0, 0.5], [0.987474, -0.08977, -1.346556, 0.448852]),
}


@pytest.mark.parametrize("gated", GATES)
@pytest.mark.parametrize("reading", L1_MAX)
def test_l1_max(reading, gated):
    shaped = l1_max(rows(budget=2000, budget_kind="maximum"), C, RIGHT, ONE, N, reading=reading, gated=gated)
    assert close(shaped, L1_MAX[reading][0]) and close(grpo(shaped), L1_MAX[reading][1])


def test_l1_max_gives_prompts_for_an_exact_length_the_exact_reward():
    shaped = l1_max(rows(budget=2000, budget_kind="exact"), C, RIGHT, ONE, N, gated=False)
    assert close(shaped, [0.7, 0.7, -0.6, 1.0])


def test_l1_max_of_both_kinds_in_one_window_and_of_prompts_that_name_no_kind():
    inputs = [{"budget": 2000, "budget_kind": kind} for kind in ("exact", "maximum", "exact")] + [{"budget": 2000}]
    groups = torch.arange(4)
    assert close(l1_max(inputs, C, RIGHT, groups, N, gated=False), [0.7, 0.2, -0.6, 0.5])
    assert close(l1_max(inputs, C, RIGHT, groups, N), [0.7, 0.2, 0.0, 0.5])


def test_kimi_length():
    shaped = kimi_length(C, RIGHT, ONE, N, gated=False)
    assert close(shaped, [1.5, 0.833333, -0.5, 1.166667])
    assert close(grpo(shaped), [0.85543, 0.095048, -1.425717, 0.475239])
    assert close(kimi_length(C, RIGHT, ONE, N), [1.5, 0.833333, 0.0, 1.166667])
    assert close(kimi_length(C, RIGHT, ONE, torch.full((4,), 7), gated=False), [1.0, 1.0, 0.0, 1.0])


def test_shorter_better():
    shaped = shorter_better(C, RIGHT, ONE, N, gated=False)
    assert close(shaped, [2.0, 0.0, -3.0, 1.0])
    assert close(grpo(shaped), [0.925777, 0.0, -1.388666, 0.462889])
    assert close(shorter_better(C, RIGHT, ONE, N), [2.0, 0.0, 0.0, 1.0])


def test_shorter_better_aims_at_the_mean_length_where_nothing_is_correct():
    # the mean of 1000, 3000, 4000, 2000 is 2500
    shaped = shorter_better(C * 0, C < 0, ONE, N, gated=False)
    assert close(shaped, [-1.5, -0.5, -1.5, -0.5])


@pytest.mark.parametrize("gated", GATES)
def test_within_limit(gated):
    shaped = within_limit(C, RIGHT, ONE, N, limit=2500, gated=gated)
    assert close(shaped, [1.0, 0.0, 0.0, 1.0])
    assert close(grpo(shaped), [0.865875, -0.865875, -0.865875, 0.865875])
    assert close(within_limit(C, RIGHT, ONE, N, limit=0.625, gated=gated), shaped.tolist())  # 2500 of 4000


def test_within_limit_gates_what_would_fall_below_a_wrong_answer_with_a_reward():
    partly = torch.tensor([1.0, 1.0, 0.25, 1.0])
    assert close(within_limit(partly, RIGHT, ONE, N, limit=2500), [1.0, 0.25, 0.25, 1.0])
    assert close(within_limit(partly, RIGHT, ONE, N, limit=2500, gated=False), [1.0, 0.0, 0.0, 1.0])


def test_laser():
    shaped = laser(C, RIGHT, N, target=2500)
    assert close(shaped, [1.5, 1.0, -0.5, 1.5])
    assert close(grpo(shaped), [0.660268, 0.132054, -1.452591, 0.660268])


def laser_with_target(target, **settings):
    """A LaserD whose targets were chosen and are not chosen anew."""
    stage = LaserD(**settings)
    stage.load_state_dict({**stage.state_dict(), "windows": 1, "targets": [target] * 3})
    return stage


def test_laser_de_and_d():
    texts = ["a b c d e f"] * 4
    shaped = laser_with_target(1500, gated=False)(C, RIGHT, ONE, N, texts)
    assert close(shaped, [1.5, 1.0, 0.0, 1.0])
    assert close(grpo(shaped), [0.993241, 0.198648, -1.390538, 0.198648])
    assert close(laser_with_target(1500)(C, RIGHT, ONE, N, texts), [1.5, 1.0, -0.5, 1.0])
    assert close(laser_with_target(1500, gated=False)(C, RIGHT, ONE, N, ["a b c d " * 3] * 4), [1.5, 1.0, -0.5, 1.0])


def test_repetition_is_four_words_three_times():
    assert repetitive("wait let me see. x wait let me see. y wait let me see.")
    assert not repetitive("wait let me see. x wait let me see. y") and not repetitive("")


def test_difficulty_is_the_groups_accuracy_in_thirds():
    correct = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0]).bool()
    rewards = correct.float()
    rewards[11] = torch.nan  # of the last group two of two graded answers are correct
    assert difficulty(rewards, correct, torch.arange(12) // 3).tolist() == [2] * 3 + [1] * 3 + [0] * 3 + [2] * 3


def window_of(correct, lengths):
    """A group of eight for LaserD."""
    correct = torch.tensor(correct).bool()
    return correct.float(), correct, torch.zeros(8, dtype=torch.long), torch.tensor(lengths), [""] * 8


def test_laser_d_chooses_the_smallest_target_that_covers_enough():
    """Eight answers: easy needs 1/5 of them covered, medium 1/2, hard all."""
    lengths = [90, 110, 190, 210, 290, 310, 390, 400]
    stage = LaserD(lowest=100, highest=400, interval=100, every=2)
    stage(*window_of([1, 1, 1, 1, 1, 1, 0, 0], lengths))
    assert stage.targets == [400, 400, 200], "1 of 8 is below 1/5, 3 of 8 are not; nothing medium or hard was seen"
    stage(*window_of([1, 1, 1, 0, 0, 0, 0, 0], [1] * 8))
    assert stage.targets == [400, 400, 200], "targets stay for two windows"
    stage(*window_of([1, 0, 0, 0, 0, 0, 0, 0], [300] * 7 + [301]))
    assert stage.targets == [400, 100, 400], "the medium window was counted, the first one is forgotten"


def test_hapo_history():
    stage = HapoHistory(gated=False)
    rewards, correct = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([True, True, False])
    group, prompts = torch.zeros(3, dtype=torch.long), ["a", "a", "a"]
    assert close(stage(rewards, correct, group, prompts, torch.tensor([100, 300, 7])), [1.0, 1.0, 0.0])
    # against 100: cos(pi/4) for 50, cos(3 pi/4) for 150, cut at -0.7, cos(pi) for 200 and more
    assert close(stage(rewards, correct, group, prompts, torch.tensor([50, 150, 900])), [1.707107, 0.3, -1.0])
    assert stage.state_dict() == {"a": 50}
    # against 50, a short wrong answer gains nothing; b has no history
    assert close(stage(rewards, correct, group, ["a", "b", "a"], torch.tensor([50, 150, 10])), [1.0, 1.0, 0.0])
    assert stage.state_dict() == {"a": 50, "b": 150}


def test_hapo_history_gated_leaves_wrong_answers_alone():
    stage = HapoHistory()
    stage.load_state_dict({"a": 100})
    assert close(stage(C, RIGHT, ONE, ["a"] * 4, torch.tensor([100, 150, 400, 50])), [1.0, 0.3, 0.0, 1.707107])


COSINE = {0: 1.0, 7500: 0.868198, 15000: 0.55, 22500: 0.231802, 30000: 0.1, 60000: 0.1}


def test_fast_math_cosine():
    share = torch.tensor(list(COSINE)) / 30000
    assert close(cosine_reward(share, share >= 0), list(COSINE.values()))
    assert close(cosine_reward(share, share < 0), [-value for value in COSINE.values()])


def test_fast_math_format_is_a_box_within_the_thinking():
    boxed = functools.partial(boxed_while_thinking, think_end="</think>")
    assert boxed(r"a \boxed{3} b</think>c") and boxed("a \\boxed{3}\n b\n</think>\nc")
    assert not boxed(r"a</think>\boxed{3}") and not boxed(r"\boxed{3}") and not boxed(r"\boxed{3</think>}")


FAST_CORRECT = torch.tensor([True, True, False, False])


def fast_math(gated=False, **settings):
    counts = [6000, 12000, 18000, 30000]
    texts = [r"\boxed{3}</think>" if marked else "" for marked in (1, 0, 1, 0)]
    texts = [text.ljust(count) for text, count in zip(texts, counts, strict=True)]
    return fast_math_r1(texts, FAST_CORRECT.float(), FAST_CORRECT, ONE, torch.tensor(counts), gated=gated, **settings)


@pytest.mark.parametrize("settings", [{"unit": "characters"}, {"unit": "tokens", "longest": 30000}])
def test_fast_math_r1(settings):
    shaped = fast_math(**settings)
    assert close(shaped, [2.414058, 0.939058, 0.589058, -0.6])
    assert close(grpo(shaped), [1.271356, 0.083372, -0.198523, -1.156205])


def test_fast_math_r1_gated_has_no_length_for_wrong_answers():
    # the boxed wrong answer keeps the format's 1, below which the second, correct answer is not let
    assert close(fast_math(gated=True, unit="characters"), [2.414058, 1.0, 1.0, 0.0])
    # in tokens the cosine ends at 10000: 0.1 + 0.45 (1 + cos(0.6 pi)) = 0.410942 for the first, 0.1 for the second
    assert close(fast_math(unit="tokens"), [1.910942, 0.35, 0.9, -0.6])


HAWKEYE = {"tokens": [1.0, 0.9, -0.1, -3.9], "ratio": [1.0, 0.99, -0.01, 0.51]}


@pytest.mark.parametrize("unit", HAWKEYE)
def test_hawkeye(unit):
    rewards, lengths = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([250, 400, 400, 1000])
    settings = {"unit": unit, "weight": {"tokens": 1e-5, "ratio": 1.0}[unit]}
    inputs = rows(original_tokens=1000)
    assert close(hawkeye(inputs, rewards, RIGHT, ONE, lengths, **settings, gated=False), HAWKEYE[unit])
    gated = [max(value, 0.0) for value in HAWKEYE[unit]]
    assert close(hawkeye(inputs, rewards, RIGHT, ONE, lengths, **settings), gated)


def test_optima_without_its_readability_term():
    # 200 of 400 tokens cost 0.3; the longest, wrong, costs 0.6
    shaped = optima(C, RIGHT, ONE, torch.tensor([200, 40, 400, 41]), weight=0.6, gated=False)
    assert close(shaped, [0.7, 0.0, -0.6, 0.9385])
    # 2100 of 2100 tokens cost 0.6, and 1 for being more than 2000
    shaped = optima(C, RIGHT, ONE, torch.tensor([2100, 2000, 2100, 1050]), weight=0.6, gated=False)
    assert close(shaped, [-0.6, 0.428571, -1.6, 0.7])
    assert close(optima(C, RIGHT, ONE, torch.tensor([2100, 2000, 2100, 1050]), weight=0.6), [0.0, 0.428571, 0.0, 0.7])


def test_group_extremes_leave_out_what_they_are_told_to():
    values, group = torch.tensor([1.0, 5.0, torch.nan, 2.0, 7.0]), torch.tensor([3, 3, 3, 0, 0])
    assert group_amax(values, group).tolist() == [5.0, 5.0, 5.0, 7.0, 7.0]
    among = torch.tensor([True, False, True, False, False])
    assert group_amin(values, group, among).tolist() == [1.0, 1.0, 1.0, math.inf, math.inf]


PROMPTS = [{"prompt": [{"role": "user", "content": f"q{i // 4}"}], "answer": "1"} for i in range(160)]
GROUPS = torch.arange(160) // 4


def by_group(changed, name):
    """The column's value of each group, which all of its rows must share."""
    values = [example[name] for example in changed]
    assert all(len(set(values[i : i + 4])) == 1 for i in range(0, len(values), 4))
    return values[::4]


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


@pytest.mark.parametrize("ask", ["exact", "maximum", "both"])
def test_l1_prompts_draw_a_length_per_group(ask):
    changed = l1_prompt(PROMPTS, GROUPS, torch.Generator().manual_seed(0), least=100, most=4000, ask=ask)
    budgets, kinds = by_group(changed, "budget"), by_group(changed, "budget_kind")
    assert all(100 <= budget <= 4000 for budget in budgets) and len(set(budgets)) > 30
    assert set(kinds) == ({"exact", "maximum"} if ask == "both" else {ask})
    sentence = {"exact": "Think for {} tokens.", "maximum": "Think for maximum {} tokens."}[kinds[0]]
    assert changed[0]["prompt"][-1]["content"] == "q0 " + sentence.format(budgets[0])


def test_an_empty_range_of_lengths_is_refused():
    with pytest.raises(ValueError, match="least=9 to most=8; raise most"):
        l1_prompt(PROMPTS, GROUPS, torch.Generator(), least=9, most=8)
    assert l1_prompt(PROMPTS, GROUPS, torch.Generator(), least=8, most=8)[0]["budget"] == 8


def test_a_missing_column_says_what_fills_it():
    for stage, message in (
        (l1_exact, r"no column 'budget'; add \+prompt=l1"),
        (functools.partial(tldr_style, longest=9), r"no column 'length_level'; add \+prompt=tldr_style"),
        (hawkeye, r"no column 'original_tokens'; add it to the data set"),
    ):
        with pytest.raises(ValueError, match=message):
            stage(rows(), C, RIGHT, ONE, N)
        assert build({"shapes": {"mine": stage}})["shapes"][0].needs[0] == "inputs"


def history_windows():
    generator = torch.Generator().manual_seed(0)
    group, texts = torch.arange(16) // 4, [""] * 16
    for _ in range(7):
        correct = torch.rand(16, generator=generator) < 0.6
        lengths = torch.randint(1, 500, (16,), generator=generator)
        yield {
            "rewards": correct.float(),
            "correct": correct,
            "group": group,
            "lengths": lengths,
            "texts": texts,
            "prompt_id": [f"p{number % 3}" for number in group.tolist()],
        }


STATEFUL = {
    "hapo_history": functools.partial(HapoHistory, gated=False),
    "laser_d": functools.partial(LaserD, lowest=50, highest=500, interval=50, every=3),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_restored_state_has_the_same_future(name):
    windows = list(history_windows())
    first = build({"shapes": {name: STATEFUL[name]()}})
    for window in windows[:4]:
        first["shapes"][0].run(window)
    state = first.state_dict()
    kept, second = copy.deepcopy(state), build({"shapes": {name: STATEFUL[name]()}})
    second.load_state_dict(state)
    for window in windows[4:]:
        assert torch.equal(first["shapes"][0].run(window), second["shapes"][0].run(window))
    assert state == kept, "what was saved must not change as training goes on"
    assert first.state_dict() == second.state_dict() != state


def test_another_grid_is_refused_on_resume():
    state = LaserD(lowest=100, highest=400, interval=100).state_dict()
    with pytest.raises(ValueError, match="another grid"):
        LaserD().load_state_dict(state)
    assert LaserD(lowest=10, highest=40, interval=10).load_state_dict(state) is None


CONF = Path(__file__).resolve().parents[2] / "conf"
SHAPES = sorted(path.stem for path in CONF.glob("shape/*.yaml"))
BLOCKS = [("shape", "shapes", name) for name in SHAPES] + [("prompt", "prompts", name) for name in ("l1", "tldr_style")]


@functools.cache
def composed(*overrides):
    """The configuration of a command line; not to be changed."""
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))


def stages(choice, *overrides):
    """The pipeline of a configuration group's choice; overrides are key=value under method."""
    cfg = copy.deepcopy(composed(choice))
    for override in overrides:
        key, value = override.split("=")
        OmegaConf.update(cfg.method, key, value if value.isalpha() else float(value))
    OmegaConf.resolve(cfg)
    return build(instantiate(cfg.method, _convert_="object"))


@pytest.mark.parametrize(("group", "slot", "name"), BLOCKS)
def test_every_configuration_builds(group, slot, name):
    (stage,) = stages(f"+{group}={name}")[slot]
    assert stage.key == f"method.{slot}.{name}" and not stage.live
    first, second, *_ = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert first == f"# @package method.{slot}.{name}" and second.startswith("# ")


def test_trls_overlong_punishment_is_added_to_a_reward():
    settings = ("trainer.max_completion_length=4000", "reward.funcs.overlong.soft_punish_cache=1500")
    funcs, _, _ = rewards(composed("reward=[math,overlong]", *settings).reward)
    punished = funcs["overlong"](completions=[""] * 4, completion_ids=[[0] * n for n in N.tolist()])
    assert list(funcs) == ["accuracy", "overlong"] and close(C + torch.tensor(punished), [1.0, 0.666667, -1.0, 1.0])


PAPER = {
    "l1_exact": {"alpha": 3e-4, "gated": True},
    "l1_max": {"alpha": 3e-4, "delta": 0.5, "reading": "paper"},
    "shorter_better": {"alpha": 2.0, "beta": 0.001},
    "laser": {"target": 8192, "bonus": 0.5, "wrong": -0.5},
    "laser_d": {"lowest": 4096, "highest": 16384, "interval": 1024, "every": 20, "gated": True},
    "laser_de": {"lowest": 4096, "highest": 16384, "interval": 1024, "every": 20, "gated": False},
    "hapo_history": {"weight": 1.0, "floor": -0.7},
    "hawkeye": {"share": 0.3, "unit": "tokens"},
    "think_prune": {"limit": 0.5},
    "fast_math_r1": {"unit": "tokens", "longest": None},
}


@pytest.mark.parametrize("name", PAPER)
def test_configurations_have_the_papers_settings(name):
    section = composed(f"+shape={name}").method.shapes[name]
    assert {key: section[key] for key in PAPER[name]} == PAPER[name]


FORMS = [("laser_d", "laser_de"), ("laser_de", "laser_d"), ("laser", "laser_d"), ("l1_exact", "l1_max")]


@pytest.mark.parametrize(("first", "second"), FORMS)
def test_two_forms_of_one_length_reward_are_refused_by_name(first, second):
    args = GRPOConfig(output_dir="unused", bf16=False, use_cpu=True, report_to="none")
    pipeline = build(instantiate(composed(f"+shape=[{first},{second}]").method, _convert_="object"))
    message = rf"method\.shapes\.{second}: it is another form of method\.shapes\.{first}, .*leave one of them out"
    with pytest.raises(UserError, match=message):
        pipeline.check(args)
    build(instantiate(composed(f"+shape=[{first},kimi_length]").method, _convert_="object")).check(args)


def test_two_shapes_of_a_users_own_file_are_not_forms_of_one_reward():
    args = GRPOConfig(output_dir="unused", bf16=False, use_cpu=True, report_to="none")
    pipeline = build({"shapes": {"one": lambda rewards: rewards, "two": lambda rewards: rewards}})
    pipeline.check(args)
    assert [stage.key for stage in pipeline["shapes"]] == ["method.shapes.one", "method.shapes.two"]


def test_exp_fast_math_r1_is_grpo_with_the_three_rewards():
    cfg = composed("+exp=fast_math_r1")
    assert list(cfg.method.shapes) == ["fast_math_r1"] and not any(cfg.method[slot] for slot in ("prompts", "credits"))
    assert cfg.method.shapes.fast_math_r1.longest == cfg.rollout.max_thinking_tokens
    assert (cfg.trainer.loss_type, cfg.trainer.scale_rewards) == ("bnpo", "group")
    assert cfg.sft.traces._target_ == "rltoken.tiny.traces" and cfg.sft.trainer.max_steps == 150
    assert composed("+exp=fast_math_r1", "scale=paper").sft.traces._target_ == "rltoken.data.load_traces"
    assert composed("+exp=fast_math_r1", "sft=none").sft.traces is None


OUT_OF_RANGE = {
    "+shape=l1_exact": ["shapes.l1_exact.alpha=-1", "shapes.l1_exact.gated=maybe"],
    "+shape=l1_max": ["shapes.l1_max.reading=papr", "shapes.l1_max.delta=2"],
    "+shape=tldr_style": ["shapes.tldr_style.short=-1", "shapes.tldr_style.longest=0"],
    "+shape=kimi_length": ["shapes.kimi_length.weight=-1"],
    "+shape=shorter_better": ["shapes.shorter_better.alpha=0"],
    "+shape=think_prune": ["shapes.think_prune.limit=1.5", "shapes.think_prune.limit=4000"],
    "+shape=laser": ["shapes.laser.wrong=1", "shapes.laser.target=0"],
    "+shape=fast_math_r1": ["shapes.fast_math_r1.unit=words", "shapes.fast_math_r1.longest=-1"],
    "+shape=hawkeye": ["shapes.hawkeye.share=-1"],
    "+shape=optima": ["shapes.optima.fewest=-1"],
    "+prompt=l1": ["prompts.l1.ask=often", "prompts.l1.least=0"],
}


@pytest.mark.parametrize("choice", OUT_OF_RANGE)
def test_settings_out_of_range_are_refused_by_name(choice):
    for override in OUT_OF_RANGE[choice]:
        with pytest.raises(UserError) as refused:
            stages(choice, override)
        assert str(refused.value).startswith(f"method.{override.partition('=')[0]}: ")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LaserD(interval=0), "interval"),
        (lambda: LaserD(lowest=5000, highest=4000), "highest"),
        (lambda: LaserD(bonus="much"), "bonus"),
        (lambda: LaserD(gated="yes"), "gated"),
        (lambda: HapoHistory(floor=0.5), "floor"),
        (lambda: HapoHistory(weight=-1), "weight"),
    ],
)
def test_settings_of_classes_are_refused_by_name(make, name):
    with pytest.raises(ValueError) as refused:
        make()
    assert str(refused.value).startswith(f"{name}: ")
