"""Training on problems without gold answers: the vote decides, and what would need an answer is refused."""

import json

import pytest

from rltoken.report import read_metrics
from rltoken.tiny import problems


@pytest.fixture
def problems_alone(tmp_path):
    """Overrides for a file of problems to train on, without answers, and one with answers to evaluate on."""
    for role, rows in (("train", problems(32)), ("eval", problems(4, split="eval"))):
        kept = [{"problem": row["prompt"][0]["content"]} for row in rows]
        if role == "eval":
            kept = [line | {"answer": row["answer"]} for line, row in zip(kept, rows, strict=True)]
        (tmp_path / f"{role}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    return ["data=jsonl", "data.path=train.jsonl", "data.eval_path=eval.jsonl", 'data.template="{problem}"']


@pytest.mark.parametrize("method", ["+exp=ttrl", "+exp=ttrl/extra_votes"])
def test_votes_are_all_that_training_needs(cli, problems_alone, method):
    result = cli(method, "name=x", "data.answers=false", *problems_alone)
    assert result.status == 0, result.err
    assert "None" not in result.err and "nan" not in result.err
    lines = [line for line in read_metrics(result.runs / "x" / "metrics.jsonl") if "reward" in line]
    assert len(lines) == 2
    for line in lines:
        assert 0 <= line["reward"] <= 1 and line["rewards/accuracy/mean"] is None
        assert "ttrl/majority_share" in line and "ttrl/label_accuracy" not in line
    report = json.loads((result.runs / "x" / "report.json").read_text())
    assert 0 <= report["after"]["accuracy"] <= 1


def test_what_needs_answers_is_refused_without(cli, problems_alone):
    refused = cli("+exp=ttrl", *problems_alone)
    assert refused.status == 2 and "data.columns.answer: " in refused.err and "data.answers=false" in refused.err
    refused = cli("+exp=grpo", "data.answers=false", *problems_alone)
    assert refused.status == 2 and "reward.funcs.accuracy can say nothing without gold answers" in refused.err
    refused = cli("+exp=ttrl", "+rows=dynamic_sampling", "data.answers=false", *problems_alone)
    assert refused.status == 2 and "method.rows.dynamic_sampling looks at rewards before" in refused.err
    assert not refused.runs.exists() or not list(refused.runs.iterdir())
