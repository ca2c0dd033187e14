"""The benchmarks of `conf/eval`: where they come from, how many problems, the literal prompts, how they are sampled."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from rltoken import config, parts
from rltoken.errors import UserError
from rltoken.evaluate import TOP_LEVEL
from rltoken.models import load_tokenizer
from rltoken.tiny import warm_start

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(
    path.stem for path in (ROOT / "conf/eval").glob("*.yaml") if path.stem[0] != "_" and path.stem != "default"
)
FILES = {
    "aime24": "aime24.jsonl",
    "aime25": "aime25.jsonl",
    "amc23": "amc23.jsonl",
    "math500": "math500.jsonl",
    "gsm8k": "gsm8k_test.jsonl",
    "olympiadbench": "olympiadbench_en_math.jsonl",
}
ASK = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def composed(*overrides):
    """The configuration of `rltoken.evaluate`, checked as a command's is."""
    config.register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfg = compose("evaluate", overrides=list(overrides))
    config.check_keys(cfg, TOP_LEVEL)
    config.check_values(cfg)
    return cfg


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(warm_start(steps=2, cache_dir=tmp_path_factory.mktemp("cache"))), think_end="</think>")


@pytest.mark.parametrize(
    ("name", "count", "first", "gold"),
    [
        ("aime24", 30, "Every morning Aya goes for a $9$-kilometer-long walk", "204"),
        ("aime25", 30, "Find the sum of all integer bases $b>9$ for which $17_b$ is a divisor of $97_b.$", "70"),
        ("amc23", 40, "Cities $A$ and $B$ are $45$ miles apart.", "27"),
        ("math500", 500, "Convert the point $(0,3)$ in rectangular coordinates", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("gsm8k", 1319, "Janet\u2019s ducks lay 16 eggs per day.", "18"),
        ("olympiadbench", 675, "Xenia and Sergey play the following game.", "2"),
    ],
)
def test_every_problem_of_a_local_file_is_there(data_dir, tokenizer, name, count, first, gold):
    cfg = composed(f"eval={name}", f"data.eval_path={data_dir / FILES[name]}")
    found = parts.problems(cfg.data, "eval", tokenizer)
    parts.check_count(cfg, len(found))
    assert len(found) == count == len(set(found["id"]))
    (turn,) = found[0]["prompt"]
    assert turn["role"] == "user" and turn["content"].startswith(first) and turn["content"].endswith(ASK)
    assert found[0]["answer"] == gold


def test_a_prompt_word_for_word(data_dir, tokenizer):
    cfg = composed("eval=aime25", f"data.eval_path={data_dir}/${{eval.benchmark}}.jsonl")
    assert parts.problems(cfg.data, "eval", tokenizer)[0]["prompt"][0]["content"] == (
        "Find the sum of all integer bases $b>9$ for which $17_b$ is a divisor of $97_b.$\n\n"
        "Please reason step by step, and put your final answer within \\boxed{}."
    )


@pytest.mark.parametrize(
    ("name", "samples", "hub", "subset", "split"),
    [
        ("aime24", 64, "HuggingFaceH4/aime_2024", None, "train"),
        ("aime25", 64, "math-ai/aime25", None, "test"),
        ("aime26", 64, "MathArena/aime_2026", None, "train"),
        ("amc23", 16, "math-ai/amc23", None, "test"),
        ("math500", 4, "HuggingFaceH4/MATH-500", None, "test"),
        ("gsm8k", 1, "openai/gsm8k", "main", "test"),
        ("olympiadbench", 4, "math-ai/olympiadbench", None, "test"),
        ("minerva", 4, "math-ai/minervamath", None, "test"),
    ],
)
def test_sampling_and_source(name, samples, hub, subset, split):
    cfg = composed(f"eval={name}")
    found = cfg.eval
    assert (found.benchmark, found.samples, found.temperature, found.top_p) == (name, samples, 0.6, 0.95)
    assert (found.max_new_tokens, found.budgets, found.limit) == (32768, None, None)
    assert (cfg.data.eval.hub, cfg.data.eval.name, cfg.data.eval.split, cfg.data.eval.path) == (
        hub,
        subset,
        split,
        None,
    )
    assert cfg.reward.funcs.accuracy._target_ == "rltoken.rewards.math.accuracy"


def test_there_are_no_others():
    assert sorted(["aime24", "aime25", "aime26", "amc23", "gsm8k", "math500", "minerva", "olympiadbench"]) == NAMES


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_a_scale_does_not_change_how_a_benchmark_is_sampled(scale):
    budgets = "eval.budgets=[1000,2000]"
    one, other = (
        OmegaConf.to_container(composed("eval=math500", budgets, *more).eval, resolve=True)
        for more in ((), (f"scale={scale}",))
    )
    assert one["max_answer_tokens"] == 128, "four tokens, as of the tiny world, would cut every forced answer"
    assert one["self_reward"].pop("temperature") and other["self_reward"].pop("temperature"), "that of training"
    assert one == other


def test_the_command_line_goes_before_a_benchmark(tmp_path):
    cfg = composed("eval=aime24", "eval.samples=8", "eval.budgets=[1000,2000]", "data.template='{problem} Go.'")
    assert (cfg.eval.samples, list(cfg.eval.budgets), cfg.data.eval.template) == (8, [1000, 2000], "{problem} Go.")


def test_columns_as_the_hub_has_them(tmp_path, tokenizer):
    """The same loader on folders in the form of GSM8K, of OlympiadBench (a list of answers) and of AMC (numbers)."""
    rows = {
        "gsm8k": {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
        "olympiadbench": {"question": "2 + 3?", "final_answer": ["5"], "solution": ["By hand."]},
        "amc23": {"id": 0, "question": "2 + 3?", "answer": 5.0},
        "aime24": {"id": 60, "problem": "2 + 3?", "solution": "By hand.", "answer": "005"},
    }
    for name, row in rows.items():
        folder = tmp_path / name
        folder.mkdir()
        split = composed(f"eval={name}").data.eval_split
        Dataset.from_list([row]).to_parquet(folder / f"{split}.parquet")
        cfg = composed(f"eval={name}", f"data.eval_hub={folder}", "data.eval_subset=null")
        (found,) = parts.problems(cfg.data, "eval", tokenizer)
        assert found["prompt"][0]["content"] == "2 + 3?" + ASK
        grade = parts.correctness(parts.rewards(cfg.reward)[0])
        assert grade(completions=["Hm.</think>\\boxed{5}", "</think>\\boxed{6}"], answer=[found["answer"]] * 2) == [
            1.0,
            0.0,
        ]


@pytest.mark.parametrize(
    ("found", "overrides", "refused"),
    [(30, (), False), (29, (), True), (29, ("eval.count=null",), False), (5, ("data.eval_limit=5",), False)],
)
def test_a_benchmark_of_which_problems_are_missing_is_refused(found, overrides, refused):
    cfg = composed("eval=aime24", *overrides)
    if not refused:
        return parts.check_count(cfg, found)
    with pytest.raises(UserError, match=r"^eval\.count: aime24 has 30 problems, and 29 were found; .*eval\.count=null"):
        parts.check_count(cfg, found)


def test_both_numbers_of_olympiadbench_pass():
    cfg = composed("eval=olympiadbench")
    parts.check_count(cfg, 674)
    parts.check_count(cfg, 675)
    with pytest.raises(UserError, match="has 674 or 675 problems"):
        parts.check_count(cfg, 673)


@pytest.mark.parametrize("value", ["0.0", "1.5", "-1"])
def test_top_p_out_of_range_is_refused(value):
    with pytest.raises(UserError, match=r"^eval\.top_p: .* set it to a number above 0 and up to 1"):
        composed(f"eval.top_p={value}")


def test_any_set_by_a_file(tmp_path, tokenizer):
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "2 + 3?", "label": "5"}) + "\n")
    names = ("data.columns.prompt=text", "data.columns.answer=label", "eval.temperature=0", "eval.samples=1")
    cfg = composed("data=jsonl", "reward=math", f"data.eval_path={tmp_path}/own.jsonl", *names)
    assert parts.problems(cfg.data, "eval", tokenizer)[0]["answer"] == "5"
