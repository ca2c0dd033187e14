"""`python -m rltoken.star`: what is kept of a trace, the file for a supervised stage, and what is refused."""

import json

import pandas as pd
import pytest

from rltoken import star
from rltoken.evals.generate import Settings
from rltoken.rewards.outcomes import Outcome
from rltoken.tiny import World, accuracy, build_tokenizer
from rltoken.types import Template

TOKENIZER = build_tokenizer(World())
END = TOKENIZER.convert_tokens_to_ids("</think>")
ENDS = frozenset([TOKENIZER.eos_token_id])
ONCE = "S 5 A +3 1 so 1"
TWICE = f"{ONCE} wait check {ONCE}"
PROMPT = [{"role": "user", "content": "S 5 A +3"}]
MADE = (
    "model.source.steps=2", "data.train.n=8", "eval.samples=2", "eval.max_new_tokens=24", "star.answers=2",
    "reward.funcs.accuracy._target_=tests.cli.test_star.even", "model.episodes.markers=[wait,A,B,so,hmm]",
)  # fmt: skip


def even(completion_ids, log_extra=None, **_):
    """Right are completions of an even number of tokens; the last of them says nothing of what comes."""
    right = [len(ids) % 2 == 0 for ids in completion_ids]
    if log_extra:
        log_extra("outcome", [str(Outcome.CORRECT if one else Outcome.WRONG) for one in right])
    return [float(one) for one in right]


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


class Scripted:
    """Says its traces in turn; after </think> the answers of the episode that was cut there, in turn."""

    together, besides, prefilled, ends = None, None, None, ENDS

    def __init__(self, said, answers):
        self.said, self.answers = iter(said), {thinking: iter(own) for thinking, own in answers.items()}

    def complete(self, contexts, max_new_tokens, stops, seeds, begun=()):
        if not begun:
            return [ids(next(self.said)) for _ in contexts]
        thinking = [TOKENIZER.decode(context).partition("<think>")[2].strip() for context in contexts]
        return [ids(next(self.answers[one.removesuffix("</think>").strip()])) for one in thinking]


def kept(said, answers, n=2, most=8):
    """The one row of a single trace, n answers behind each J."""
    model = Scripted([said], answers)
    settings = Settings(samples=1, temperature=1.0, max_new_tokens=64, batch_size=1, seed=0)
    problems = [{"prompt": PROMPT, "answer": "1"}]
    source = star.Source(model, TOKENIZER, Template(END, (END,)), problems, accuracy, settings)

    def episodes(tokens):
        return star.episodes_of(source, tokens, separator=None, markers=["wait"], most=most)

    (row,) = star.traces(source, [(0, 0)], answers=n, episodes=episodes)
    return row


RIGHT, WRONG, OPEN = "1 <eos>", "4 <eos>", "1"


def test_a_trace_is_cut_after_the_episode_of_most_progress():
    """J is 0, 1/2 and 1: the first of equal ones, and there the answer that is right."""
    row = kept(
        f"{TWICE} </think> 1 <eos>",
        {"": [WRONG, WRONG], ONCE: [WRONG, RIGHT], TWICE: [RIGHT, RIGHT]},
    )
    assert row == {
        "problem": 0, "sampled_tokens": 16, "right": True, "completion": f"{ONCE} </think> 1", "tokens": 7,
        "progress": 0.5,
    }  # fmt: skip


def test_a_trace_that_goes_on_to_progress_stays_whole():
    """J is 1/2, 0 and 1; that the trace itself came to a wrong answer does not matter."""
    row = kept(f"{TWICE} </think> 4 <eos>", {"": [RIGHT, WRONG], ONCE: [WRONG] * 2, TWICE: [RIGHT] * 2})
    assert (row["completion"], row["tokens"], row["progress"], row["right"]) == (f"{TWICE} </think> 1", 16, 1.0, False)


@pytest.mark.parametrize(
    ("said", "answers"),
    [
        (TWICE, {"": [RIGHT, WRONG], ONCE: [RIGHT, WRONG], TWICE: [WRONG, WRONG]}),
        (ONCE, {"": [WRONG, WRONG], ONCE: [OPEN, OPEN]}),
        ("", {"": [RIGHT, WRONG]}),
    ],
    ids=["no progress", "no answer that ends", "no thinking"],
)
def test_a_trace_without_progress_or_answer_is_left_out(said, answers):
    row = kept(f"{said} </think> 1 <eos>", answers)
    assert (row["completion"], row["tokens"], row["progress"], row["right"]) == (None, None, None, True)


@pytest.mark.parametrize(("said", "completion"), [(f"{ONCE} </think> 1 <eos>", f"{ONCE} </think> 1"), (ONCE, None)])
def test_without_a_cut_right_traces_stay_whole(said, completion):
    row = kept(said, {}, n=0)
    assert (row["completion"], row["progress"], row["sampled_tokens"]) == (completion, None, 7)


def test_the_file_is_learnt_from(cli):
    made = cli.star(*MADE, "out=cut.jsonl")
    assert made.status == 0, made.err
    assert made.out.startswith("cut.jsonl: ") and "of 16 traces" in made.out
    lines = [json.loads(line) for line in (made.cwd / "cut.jsonl").read_text().splitlines()]
    assert all(line["tokens"] <= line["sampled_tokens"] and line["progress"] > 0 for line in lines)
    assert all("</think>" in line["completion"] and line["id"].startswith("tiny-train-") for line in lines)
    assert not (made.cwd / "cut.jsonl.shards").exists()
    whole = cli.star(*MADE, "out=whole.jsonl", "star.cut=none")
    assert whole.status == 0, whole.err
    short = ("sft.trainer.max_steps=1", "eval.before=false", "eval.after=false", "trainer.max_steps=1")
    for exp, choice, path in (("grpo", "traces", "cut"), ("tldr_style", "levels", "whole")):
        done = cli(f"+exp={exp}", f"sft={choice}", f"sft.traces.path={path}.jsonl", *short, f"name={path}")
        assert done.status == 0, done.err
        assert (done.runs / path / "sft/final/model.safetensors").exists()
    of_a_run = cli.star("runs=[runs/cut]", "out=again.jsonl", "star.cut=none", *MADE[1:])
    assert of_a_run.status == 0 and "of 16 traces" in of_a_run.out, of_a_run.err


def test_finished_batches_are_not_sampled_again(cli, monkeypatch):
    work, sizes = star.traces, []

    def counted(source, batch, **settings):
        sizes.append(len(batch))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return work(source, batch, **settings)

    expected = cli.star(*MADE, "eval.batch_size=4", "out=whole.jsonl")
    monkeypatch.setattr(star, "traces", counted)
    assert cli.star(*MADE, "eval.batch_size=4", "out=t.jsonl").status == 130
    other = cli.star(*MADE, "eval.batch_size=4", "out=t.jsonl", "star.answers=3")
    assert other.status == 2 and "star.answers was 2 and is 3" in other.err
    done = cli.star(*MADE, "eval.batch_size=4", "out=t.jsonl")
    assert done.status == 0 and sizes == [4] * 5, "two of four batches were kept"
    assert (done.cwd / "t.jsonl").read_bytes() == (expected.cwd / "whole.jsonl").read_bytes()


REFUSED = {
    "star.cut=longest": r"star.cut: there is no 'longest'; choose one of: progress, none",
    "star.answers=0": r"star.answers: 0 is not possible",
    "star.most_episodes=many": r"star.most_episodes: many is not possible",
    "model.episodes.markers=[]": r"model.episodes.markers: [] opens no episodes; set model.episodes.markers to texts",
    "model.episodes=null": r"model.episodes.markers: None opens no episodes",
    "server=http://localhost:1/v1": r"server: traces are cut by token ids",
    "models=[a,b]": r"runs: traces are those of one model, and 2 are named",
    "eval.format=short": r"eval.format: ",
    "out=taken": r"out: taken is there already",
    "+eval.prompts={l1: {least: 4}}": r"eval.prompts.l1: the method has no such prompt",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(cli, tmp_path, override):
    (tmp_path / "taken").touch()
    found = cli.star(override)
    assert found.status == 2 and found.err.count("\n") == 1
    assert found.err.startswith(f"error: {REFUSED[override]}"), found.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_problems_without_answers_give_no_traces(cli):
    found = cli.star("data=jsonl", "data.path=p.jsonl", "data.answers=false")
    assert found.status == 2 and found.err.startswith(
        "error: data.answers: traces are kept where their answer is right"
    )


def test_nothing_kept_is_told(cli):
    found = cli.star(*MADE[:5], "eval.limit=1")
    assert found.status == 2 and "star: none of 2 traces is kept" in found.err
    assert not (found.cwd / "traces.jsonl").exists()


def test_a_template_that_forces_nothing_is_refused(cli):
    found = cli.star(*MADE, "model.think_end=null")
    assert found.status == 2 and found.err.startswith("error: model.forced.header: no answer can be forced")


def test_progress_that_was_not_measured_is_not_written():
    row = {"problem": 0, "sampled_tokens": 7, "right": True, "completion": "x", "tokens": 7, "progress": None}
    (line,) = star.written(pd.DataFrame.from_records([row]), [{"prompt": PROMPT, "id": "a"}])
    assert line == {"prompt": PROMPT, "completion": "x", "id": "a", "tokens": 7, "sampled_tokens": 7}
