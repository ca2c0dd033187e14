"""The tokenizer: one id a word, there and back, also through a folder and `AutoTokenizer`."""

import random

import jinja2
import pytest
from transformers import AutoTokenizer

from rltoken.tiny.model import build_model, model_config
from rltoken.tiny.tokenizer import build_tokenizer
from rltoken.tiny.world import EOS, PAD, THINK, THINK_END, World, problem, trace, vocabulary

TEXT = "S 5 A +3 B *2 = <think> S 5 A +3 1 B *2 2 so 2 </think> ans 2"


@pytest.fixture(params=["built", "loaded", "saved twice"])
def tokenizer(request, tmp_path):
    tokenizer = build_tokenizer(World())
    for _ in range(("built", "loaded", "saved twice").index(request.param)):
        model_config(tokenizer).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    return tokenizer


def test_one_id_a_word_there_and_back(tokenizer):
    words = vocabulary(World(formats=3))
    assert len(tokenizer) == len(words) == len(set(words))
    assert tokenizer(" ".join(words))["input_ids"] == list(range(len(words)))
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


def test_traces_survive_the_round_trip(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        text = " ".join(trace(rng, problem(rng, World()), World()).tokens)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix(f" {EOS}")


def test_only_padding_end_and_unknown_are_special(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, EOS)
    special = set(tokenizer.all_special_ids)
    assert len(special) == 3
    assert not special & set(tokenizer.convert_tokens_to_ids([THINK, THINK_END]))
    assert tokenizer(THINK_END)["input_ids"] == [tokenizer.convert_tokens_to_ids(THINK_END)]
    assert tokenizer("nonsense")["input_ids"] == [tokenizer.unk_token_id]


def test_the_chat_template_gives_the_training_text(tokenizer):
    rng = random.Random(1)
    drawn = problem(rng, World())
    row = trace(rng, drawn, World())
    user = {"role": "user", "content": drawn.prompt}
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == list(row.tokens[: row.prompt_length])
    assert ids[-1] == tokenizer.convert_tokens_to_ids(THINK)
    reply = {"role": "assistant", "content": " ".join(row.completion[:-1])}
    whole = tokenizer.apply_chat_template([user, reply], return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(whole) == list(row.tokens)


def test_another_role_is_refused(tokenizer):
    with pytest.raises(jinja2.TemplateError, match="user and assistant only"):
        tokenizer.apply_chat_template([{"role": "system", "content": "S 1"}])


def test_prompts_are_padded_on_the_left(tokenizer):
    ids = tokenizer(["S 1", "S 1 A +3"], padding=True)["input_ids"]
    assert ids[0][:2] == [tokenizer.pad_token_id] * 2


def test_the_model_fits_vllm_and_the_tokenizer():
    tokenizer = build_tokenizer(World())
    model = build_model(tokenizer, seed=0)
    assert model.config.head_dim in (32, 64, 80, 96, 112, 128)
    assert model.config.vocab_size == len(tokenizer)
    assert model.get_input_embeddings().weight is model.lm_head.weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.num_parameters() < 250_000
