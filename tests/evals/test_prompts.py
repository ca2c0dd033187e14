"""Problems asked through a method's own prompts: what `eval.prompts` makes of them, and what is refused."""

import copy
import json

import pandas as pd
import pytest
from datasets import Dataset
from omegaconf import OmegaConf

from rltoken.errors import UserError
from rltoken.evals.prompts import ask, settle
from rltoken.train import checked
from tests.cli.conftest import cache, cli
from tests.methods.configured import composed

__all__ = ["cache", "cli"]

PROBLEMS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"q{i}"}], "answer": str(i), "id": f"p{i}"} for i in range(40)]
)


def asked(choice, prompts):
    """The problems as a run of the choice asks them with these entries of `eval.prompts`."""
    cfg = copy.deepcopy(composed(choice))
    cfg.eval.prompts = prompts
    settle(cfg.eval, cfg.method.prompts)
    return ask(PROBLEMS, cfg.eval)


WAYS = {
    "+prompt=tldr_style": ({"tldr_style": {"levels": ["medium"]}}, " Think at moderate length."),
    "+prompt=budget": ({"budget": {"budgets": [32]}}, " Think for 32 tokens."),
    "+prompt=l1": ({"l1": {"least": 512, "most": 512, "ask": "maximum"}}, " Think for maximum 512 tokens."),
    "+prompt=hbpo": ({"hbpo": {"budgets": [24]}}, " I will answer the question within 24 tokens."),
}


@pytest.mark.parametrize("choice", WAYS)
def test_every_problem_is_asked_in_the_one_way_that_is_chosen(choice):
    prompts, sentence = WAYS[choice]
    found = asked(choice, prompts)
    assert [row["prompt"][0]["content"] for row in found] == [f"q{i}{sentence}" for i in range(40)]
    assert found["answer"] == PROBLEMS["answer"] and found["id"] == PROBLEMS["id"]


def test_several_ways_are_drawn_for_each_problem_from_the_seed_of_the_evaluation():
    prompts = {"tldr_style": {"levels": ["short", "long"]}}
    found = asked("+prompt=tldr_style", prompts)
    assert set(found["length_level"]) == {"short", "long"}
    assert asked("+prompt=tldr_style", prompts)["prompt"][:] == found["prompt"][:]


def test_a_system_prompt_that_follows_training_is_that_of_its_end():
    settings = {"stages": [[0, 40], [360, 20]], "longest": 40}
    stage = {"_target_": "rltoken.methods.think_prune.limit_prompt", "_partial_": True} | settings
    found = asked("+exp=grpo", {"think_prune": stage})
    assert found[0]["prompt"][0] == {
        "role": "system",
        "content": "The output of the assistant should be within 20 tokens.",
    }


def test_nothing_chosen_changes_nothing():
    assert asked("+prompt=tldr_style", {}) is PROBLEMS


def test_a_whole_stage_needs_no_method():
    whole = OmegaConf.to_container(composed("+prompt=budget").method.prompts.budget)
    found = asked("+exp=grpo", {"mine": whole | {"budgets": [8]}})
    assert found[0]["prompt"][0]["content"] == "q0 Think for 8 tokens."


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            {"tldr_styl": {"levels": ["short"]}},
            r"eval\.prompts\.tldr_styl: the method has no such prompt \(did you mean 'tldr_style'",
        ),
        ({"tldr_style": "short"}, r"eval\.prompts\.tldr_style: 'short' is no settings"),
        ({"tldr_style": {"levels": ["brief"]}}, r"eval\.prompts\.tldr_style\.levels: \['brief'\] is not possible"),
        (
            {"tldr_style": {"levles": ["short"]}},
            r"prompts\.tldr_style\.levles: there is no such setting \(did you mean 'levels'",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(prompts, message, tmp_path):
    cfg = copy.deepcopy(composed("+prompt=tldr_style"))
    cfg.eval.prompts = prompts
    with pytest.raises(UserError, match=message):
        checked(cfg, tmp_path)


def test_a_run_is_asked_by_its_own_words(cli):
    """Training with other words than the default, evaluated within a run, and afterwards by the command line's way."""
    words = ("method.prompts.tldr_style.short=' quick'", "method.prompts.tldr_style.long=' plan'")
    trained = cli("+exp=tldr_style", *words, "+eval.prompts.tldr_style.levels=[long]", "name=x", "eval.budgets=null")
    assert trained.status == 0, trained.err
    inside = pd.read_parquet(trained.runs / "x/evaluation_after.parquet")
    for level, alike in (("long", True), ("short", False)):
        way = () if alike else (f"+eval.prompts.tldr_style.levels=[{level}]",)
        found = cli.evaluate("runs=[runs/x]", *way, f"out={level}")
        assert found.status == 0, found.err
        settings = json.loads((found.cwd / level / "metrics.json").read_text())["settings"]["x"]["eval"]["prompts"]
        assert (settings["tldr_style"]["levels"], settings["tldr_style"]["short"]) == ([level], " quick")
        table = pd.read_parquet(found.cwd / level / "x.parquet")
        assert (table["text"].tolist() == inside["text"].tolist()) == alike
    refused = cli.evaluate("runs=[runs/x]", "+eval.prompts.l1.least=4", "out=other")
    assert refused.status == 2 and refused.err.startswith("error: eval.prompts.l1: the method has no such prompt")


def test_a_model_without_a_method_is_asked_by_a_whole_stage(cli):
    short = ("model.source.steps=2", "data.eval.n=4", "eval.samples=1", "eval.max_new_tokens=16", "eval.budgets=null")
    found = cli.evaluate(*short, "+prompt@eval.prompts.budget=budget", "eval.prompts.budget.budgets=[8]", "out=e")
    assert found.status == 0, found.err
    settings = json.loads((found.cwd / "e/metrics.json").read_text())["settings"]["tiny"]["eval"]["prompts"]
    assert settings["budget"]["budgets"] == [8]
