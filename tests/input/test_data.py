"""Data sets: columns, gold answers, what is dropped and said, what is refused, and the configuration groups."""

import json
import logging

import pytest
from datasets import Dataset
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from transformers import PreTrainedTokenizerFast

from rltoken.data import check_prompt_lengths, load, warn_shared
from rltoken.errors import UserError
from rltoken.rewards.math import accuracy

GSM8K = [
    {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "A thousand and one?", "answer": "It is 1,001.\n#### 1,001"},
]
MATH = [
    {
        "problem": "Half?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": r"First \boxed{1}, so $\boxed{\frac{1}{2}}$.",
    },
    {"problem": "Who?", "level": "Level 2", "type": "Algebra", "solution": r"It is $\boxed{\text{Evelyn}}$."},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problems(count, **changes):
    return [{"id": f"p{n}", "problem": f"{n} + 1?", "answer": str(n + 1)} | changes for n in range(count)]


def refused(**settings):
    with pytest.raises(UserError) as caught:
        load(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_get_prompt_answer_and_id_and_keep_the_rest(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"id": 7, "problem": " 1 + 1? ", "answer": 2, "level": 3}])
    data = load(path=path, template="Q: {problem}\nUse \\boxed{}.")
    assert data.column_names == ["prompt", "answer", "id", "level"]
    assert data[0] == {
        "prompt": [{"role": "user", "content": "Q: 1 + 1?\nUse \\boxed{}."}],
        "answer": "2",
        "id": "7",
        "level": 3,
    }


@pytest.mark.parametrize("raw", [True, {"value": "2"}, [["2"]], ["2", None]])
def test_only_a_text_or_a_number_is_a_gold_answer(tmp_path, raw):
    told = refused(path=write(tmp_path / "p.jsonl", [{"problem": "1 + 1?", "answer": raw}]))
    assert "cannot be read by the grader" in told


def test_without_answers_the_column_is_not_looked_for(tmp_path):
    rows = [{"problem": "1 + 1?", "answer": "no number at all {"}, {"problem": "", "answer": "2"}, {"problem": "2?"}]
    data = load(path=write(tmp_path / "p.jsonl", rows), answers=False)
    assert data["answer"] == [None, None] and data["id"] == ["p-0", "p-2"]
    assert accuracy(["It is 2."] * 2, answer=data["answer"]) == [None, None]


def test_gsm8k_and_math_as_the_hub_has_them(tmp_path):
    gsm8k = load(path=write(tmp_path / "gsm8k.jsonl", GSM8K))
    assert gsm8k["answer"][:] == ["4", "1,001"]
    assert gsm8k["id"][:] == ["gsm8k-0", "gsm8k-1"]
    assert gsm8k[0]["prompt"][0]["content"] == "Two and two?"
    math = load(path=write(tmp_path / "math.jsonl", MATH))
    assert math["answer"][:] == [r"\frac{1}{2}", r"\text{Evelyn}"]
    assert set(math.column_names) == {"prompt", "answer", "id", "level", "type"}


def test_a_parquet_file_a_json_list_and_a_folder_in_place_of_the_hub(tmp_path):
    rows = problems(3)
    Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    (tmp_path / "p.json").write_text(json.dumps(rows))
    folder = tmp_path / "hub"
    folder.mkdir()
    write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", rows[:1])
    sets = [
        load(path=str(tmp_path / "p.parquet")),
        load(path=str(tmp_path / "p.json")),
        load(hub=str(folder), split="train"),
    ]
    assert [data["id"][:] for data in sets] == [["p0", "p1", "p2"]] * 3
    assert load(hub=str(folder), split="test")["id"][:] == ["p0"]


def test_columns_are_mapped_by_name_or_by_alternatives(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"text": "1 + 1?", "label": "2", "key": "a", "problem": "no", "answer": "no!"}])
    data = load(path=path, columns={"prompt": "text", "answer": ["gold", "label"], "id": "key"})
    assert (data[0]["prompt"][0]["content"], data[0]["answer"], data[0]["id"]) == ("1 + 1?", "2", "a")


def test_a_problem_that_is_a_conversation_is_taken_as_it_is(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    data = load(path=write(tmp_path / "p.jsonl", [{"prompt": turns, "answer": "2"}]), template="Please: {problem}")
    assert data[0]["prompt"] == turns


def test_what_is_dropped_is_counted_and_said_in_one_line(tmp_path, caplog):
    rows = [*problems(40), problems(1)[0], {"id": "e", "problem": " ", "answer": "1"}]
    rows += [{"id": "u", "problem": "?", "answer": "???"}, {"id": "n", "problem": "?", "answer": None}]
    with caplog.at_level(logging.INFO, logger="rltoken.data"):
        data = load(path=write(tmp_path / "p.jsonl", rows))
    assert len(data) == 40
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.endswith(
        "40 problems from 44 of 44 rows; dropped 4: 1 with repeated id (the first is p0), 1 with empty problem (the "
        "first is e: ''), 1 with unreadable gold answer (the first is u: '???'), 1 with no gold answer (the first "
        "is n: null)."
    )


def test_problems_that_are_trained_and_evaluated_are_told(tmp_path, caplog):
    train = load(path=write(tmp_path / "train.jsonl", problems(5)))
    known = [{"problem": " 3  + 1?", "answer": "4"}, {"problem": "4 + 1?", "answer": "5"}]
    mixed = load(path=write(tmp_path / "test.jsonl", [{"problem": "9 + 1?", "answer": "10"}, *known]))
    warn_shared(train, mixed)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(
        "data.eval_path: 2 of 3 evaluated problems are trained on too, for example '3 + 1?"
    )
    warn_shared(train, load(path=write(tmp_path / "new.jsonl", [{"problem": "9 + 1?", "answer": "10"}])))
    assert len(caplog.records) == 1


def test_columns_that_trl_hands_to_rewards_itself_are_left_out_and_said(tmp_path, caplog):
    path = write(tmp_path / "p.jsonl", problems(2, completions="x", images="y", level=1))
    data = load(path=path)
    assert data.column_names == ["prompt", "answer", "id", "level"]
    assert "left out columns completions, images" in caplog.text


def test_limit_draws_a_reproducible_sample(tmp_path):
    path = write(tmp_path / "p.jsonl", problems(50))
    first, again, other = (load(path=path, limit=10, seed=seed)["id"][:] for seed in (1, 1, 2))
    assert len(set(first)) == 10 and first == again and first != other
    assert len(load(path=path, limit=99)) == 50


@pytest.mark.parametrize(
    ("gold", "raw", "answer"),
    [
        ("auto", "so\n#### 4", "4"),
        ("auto", r"so \boxed{5}", "5"),
        ("auto", "6", "6"),
        ("plain", r"\boxed{5}", r"\boxed{5}"),
        ("hash", "1 #### 2 #### 3", "3"),
        ("boxed", r"#### 4 \boxed{5}", "5"),
        ("auto", ["7"], "7"),
    ],
)
def test_ways_to_write_a_gold_answer(tmp_path, gold, raw, answer):
    data = load(path=write(tmp_path / "p.jsonl", [{"problem": "?", "answer": raw}]), gold=gold)
    assert data["answer"][:] == [answer]


def test_a_missing_column_is_told_with_the_columns_there_are(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"question": "1 + 1?", "solutions": "2"}])
    told = "data.columns.answer: the data set has no column 'answer'; it has: question, solutions. "
    assert refused(path=path, columns={"answer": "answer"}).startswith(told)
    assert refused(path=path).endswith("Set data.columns.answer=solutions.")
    bare = write(tmp_path / "bare.jsonl", [{"id": "a", "question": "1 + 1?"}])
    told = "it has: id, question. Add it to the file"
    assert refused(path=bare).endswith(f"{told}, or data.answers=false to train on votes alone (+exp=ttrl).")
    assert refused(path=bare, role="eval").endswith(f"{told}.")
    assert refused(path=path, columns={"prompt": "questions"}).endswith("Set data.columns.prompt=question.")
    assert refused(path=path, columns={"answer": "solutions", "id": "key"}).startswith("data.columns.id: ")


def test_gold_answers_that_no_grader_can_read_are_refused_with_an_example(tmp_path):
    rows = problems(20) + problems(2, id="x", answer="left as an exercise to the reader")
    told = refused(path=write(tmp_path / "p.jsonl", rows))
    assert told.startswith("data.columns.answer: 2 of 22 gold answers")
    assert "'left as an exercise to the reader'" in told and "data.max_unparsable" in told
    assert len(load(path=write(tmp_path / "q.jsonl", rows), max_unparsable=0.2)) == 20
    assert len(load(path=write(tmp_path / "r.jsonl", rows[:21]))) == 20
    assert refused(path=write(tmp_path / "s.jsonl", rows[20:21])).startswith("data.columns.answer: 1 of 1")


def test_ids_that_mostly_repeat_are_refused(tmp_path):
    told = refused(path=write(tmp_path / "p.jsonl", problems(10, id="same")))
    assert told.startswith("data.columns.id: 9 of 10 rows") and "[]" in told
    assert len(load(path=str(tmp_path / "p.jsonl"), columns={"id": []})) == 10


def test_sources_that_cannot_be_read(tmp_path):
    assert refused(path=str(tmp_path / "no.jsonl")).startswith("data.path: there is no file")
    assert refused(path=str(tmp_path / "no.jsonl"), role="eval").startswith("data.eval_path: there is no file")
    assert refused(role="eval").startswith("data.eval_path: there is no eval data")
    for name, content, told in [
        ("p.csv", "a", "by its ending"),
        ("p.jsonl", "", "is empty"),
        ("q.jsonl", "{", "as json"),
    ]:
        (tmp_path / name).write_text(content)
        assert told in refused(path=str(tmp_path / name))
    assert refused(hub=str(tmp_path / "nowhere")).startswith("data.hub: ")
    assert refused(hub="nobody/nothing", role="eval").startswith(
        "data.eval_hub: nobody/nothing [train] cannot be loaded"
    )


def test_settings_that_make_no_sense(tmp_path):
    path = write(tmp_path / "p.jsonl", problems(2))
    assert refused(path=path, template="Solve it.").startswith("data.template: ")
    assert refused(path=path, limit=0).startswith("data.limit: ")
    assert refused(path=path, limit=0, role="eval").startswith("data.eval_limit: ")
    assert refused(path=path, gold="box").startswith("data.gold: ")
    empty = write(tmp_path / "e.jsonl", problems(2, problem=" "))
    assert refused(path=empty).startswith("data.columns.prompt: ")


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"?": 0, "a": 1, "user": 2, "go": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} go{% endif %}"
    )
    return made


def test_long_prompts_are_refused_or_dropped_never_silently(tokenizer, caplog):
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "a " * n}], "id": str(n)} for n in (1, 2, 5, 9)])
    assert check_prompt_lengths(data, tokenizer, None) is data
    assert check_prompt_lengths(data, tokenizer, 11) is data
    with pytest.raises(UserError) as caught:
        check_prompt_lengths(data, tokenizer, 4)
    assert str(caught.value) == (
        "data.max_prompt_tokens: 2 of 4 prompts exceed 4 tokens (the longest has 11). "
        "Set data.max_prompt_tokens=11, or data.too_long=drop to train without them."
    )
    assert not caplog.records
    assert check_prompt_lengths(data, tokenizer, 4, "drop")["id"][:] == ["1", "2"]
    assert "2 of 4 prompts exceed 4 tokens" in caplog.text
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens: 4 of 4"):
        check_prompt_lengths(data, tokenizer, 1, "drop")
    with pytest.raises(UserError, match=r"data\.too_long"):
        check_prompt_lengths(data, tokenizer, 4, "cut")


def composed(*overrides):
    with initialize_config_module("rltoken.conf", version_base=None):
        return compose(overrides=["+model=smollm2", *overrides])


@pytest.mark.parametrize(
    ("choice", "rows"), [("gsm8k", GSM8K), ("math", MATH), ("deepscaler", problems(2)), ("jsonl", problems(2))]
)
def test_every_data_group_serves_a_local_file(tmp_path, choice, rows):
    train, test = write(tmp_path / "train.jsonl", rows), write(tmp_path / "test.jsonl", rows[:1])
    config = composed(f"+data={choice}", f"data.path={train}", f"data.eval_path={test}", "data.limit=2")
    assert [len(instantiate(config.data[part])) for part in ("train", "eval")] == [2, 1]
    named = composed(f"+data={choice}", f"data.path={train}", "data.columns.answer=nowhere")
    with pytest.raises(Exception, match=r"data\.columns\.answer: the data set has no column 'nowhere'"):
        instantiate(named.data.train)


@pytest.mark.parametrize(
    ("choice", "train", "test"),
    [
        ("gsm8k", ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")),
        ("math", ("DigitalLearningGmbH/MATH-lighteval", None, "train"), ("HuggingFaceH4/MATH-500", None, "test")),
        (
            "deepscaler",
            ("agentica-org/DeepScaleR-Preview-Dataset", None, "train"),
            ("HuggingFaceH4/MATH-500", None, "test"),
        ),
    ],
)
def test_every_data_group_asks_the_hub_by_default(choice, train, test, monkeypatch):
    asked = []
    monkeypatch.setattr("rltoken.data.load_dataset", lambda *a, **k: asked.append((*a, k["split"])) or hub_set(*a))
    config = composed(f"+data={choice}")
    for part in ("train", "eval"):
        assert len(instantiate(config.data[part])) == 2
    assert asked == [train, test]


def hub_set(hub, _):
    """Two rows with the columns that the hub's data set of this name has."""
    rows = {"openai/gsm8k": GSM8K, "DigitalLearningGmbH/MATH-lighteval": MATH}
    unnamed = [{"problem": f"{n}?", "solution": "s", "answer": "1", "unique_id": f"u{n}"} for n in range(2)]
    return Dataset.from_list(rows.get(hub, unnamed))


def test_the_reward_group_follows_the_models_end_of_thinking():
    config = composed("+reward=math")
    assert instantiate(config.reward.funcs.accuracy)([r"\boxed{7}"], answer=["7"]) == [1.0]
    config.model.think_end = "</think>"
    assert instantiate(config.reward.funcs.accuracy)([r"\boxed{7}"], answer=["7"]) == [0.0]
    texts = [r"</think>\boxed{0.5}", r"\boxed{0.5}", r"</think>\boxed{\frac12}", r"</think>\boxed{7}"]
    assert instantiate(config.reward.classes)(texts, [0] * 4) == [0, -1, 0, 1]


def test_published_data_sets_load_whole(data_dir):
    for name, rows in (("gsm8k_train", 7473), ("gsm8k_test", 1319), ("math500", 500)):
        assert len(load(path=str(data_dir / f"{name}.jsonl"))) == rows


def test_several_gold_answers_are_kept_where_a_problem_has_them(tmp_path):
    rows = [
        {"problem": "a?", "answer": ["1", r"\boxed{2}"]},
        {"problem": "b?", "answer": ["3"]},
        {"problem": "c?", "answer": ["4", None]},
        {"problem": "d?", "answer": []},
    ]
    data = load(path=write(tmp_path / "many.jsonl", rows), max_unparsable=0.5)
    assert data["answer"][:] == [["1", "2"], ["3"]]
    assert load(path=write(tmp_path / "one.jsonl", rows[1:2]))["answer"][:] == ["3"]
    assert accuracy([r"\boxed{2}", r"\boxed{4}"], data["answer"][:]) == [1.0, 0.0]


def test_unreadable_gold_answers_are_kept_where_every_problem_counts(tmp_path, caplog):
    rows = [
        *problems(40),
        {"id": "u", "problem": "Why?", "answer": "???"},
        {"id": "e", "problem": "Who?", "answer": ""},
    ]
    path = write(tmp_path / "kept.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        data = load(path=path, unreadable="keep")
    assert len(data) == 41 and data[40]["answer"] == "???" and len(load(path=path)) == 40
    assert "41 problems from 42 of 42 rows; 1 of them with unreadable gold answer, so never right" in caplog.text
    assert accuracy(["\\boxed{???}"], ["???"]) == [None]
    assert refused(path=path, unreadable="count").startswith("data.unreadable: there is no 'count'.")


def test_too_many_unreadable_gold_answers_are_refused_although_they_would_be_kept(tmp_path):
    rows = [{"id": f"u{n}", "problem": "Why?", "answer": "???"} for n in range(3)]
    assert "3 of 3 gold answers" in refused(path=write(tmp_path / "q.jsonl", rows), unreadable="keep")
