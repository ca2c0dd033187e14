"""Which teacher a run has: loaded where a method names its signal, refused in one line where it cannot be."""

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from rltoken import parts, teachers
from rltoken.config import check_keys, register_schemas
from rltoken.errors import UserError
from rltoken.methods.kdrl import Distillation
from rltoken.pipeline import build
from rltoken.teachers import Server, Teacher, existing, refuse_other_vocabulary
from rltoken.tiny.model import build_model
from rltoken.tiny.tokenizer import build_tokenizer
from rltoken.tiny.world import World
from rltoken.train import checked

KDRL = build({"aux": {"kdrl": Distillation()}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tiny model with its tokenizer."""
    path, tokenizer = tmp_path_factory.mktemp("tiny"), build_tokenizer(World())
    build_model(tokenizer, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def composed(*overrides):
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfg = compose("config", overrides=list(overrides))
    check_keys(cfg)
    return cfg


def made(cfg, tokenizer, pipeline=KDRL):
    OmegaConf.resolve(cfg)
    return parts.teacher(cfg, pipeline, tokenizer)


def refused(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hf(path, *others):
    return composed("+exp=kdrl", "teacher=hf", f"teacher.path={path}", *others)


def test_a_folder_is_loaded_in_the_dtype_of_the_model(folder, tokenizer):
    teacher = made(hf(folder, "model.dtype=bfloat16"), tokenizer)
    assert teacher.model.dtype == torch.bfloat16 and teacher.ends == {tokenizer.eos_token_id}
    assert made(hf(folder, "teacher.dtype=float32", "model.dtype=bfloat16"), tokenizer).model.dtype == torch.float32


def test_no_teacher_is_loaded_for_a_method_that_names_none(tokenizer):
    assert made(hf("nowhere"), tokenizer, build({})) is None


def test_the_base_of_an_adapter_needs_no_loading(tokenizer):
    assert made(composed("+exp=kdrl", "teacher=base"), tokenizer) == Teacher(None)


def test_a_server_is_asked_for_its_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(Server, "decode", lambda self, ids: tokenizer.decode(ids))
    monkeypatch.setattr(Server, "encode", lambda self, text: tokenizer.encode(text, add_special_tokens=False))
    cfg = composed("+exp=kdrl", "teacher=vllm_server", "teacher.url=http://127.0.0.1:1/")
    assert made(cfg, tokenizer).model.url == "http://127.0.0.1:1"
    monkeypatch.setattr(Server, "decode", lambda self, ids: tokenizer.decode([*ids][1:]))
    assert refused(made, cfg, tokenizer).startswith("teacher.url: http://127.0.0.1:1 has another tokenizer")


def test_a_servers_ends_are_those_that_are_named(tokenizer, monkeypatch):
    """No server tells: by default they are taken for the student's."""
    monkeypatch.setattr(Server, "decode", lambda self, ids: tokenizer.decode(ids))
    monkeypatch.setattr(Server, "encode", lambda self, text: tokenizer.encode(text, add_special_tokens=False))
    server = ["+exp=kdrl", "teacher=vllm_server", "teacher.url=http://127.0.0.1:1"]
    assert made(composed(*server), tokenizer).ends is None
    for named in ("teacher.ends=['<unk>']", "teacher.ends='<unk>'"):
        assert made(composed(*server, named), tokenizer).ends == {tokenizer.unk_token_id}
    told = refused(made, composed(*server, "teacher.ends=['<|endoftext|>']"), tokenizer)
    assert told.startswith("teacher.ends: '<|endoftext|>' is no token of the tokenizer;")


def test_nobody_answers(tokenizer):
    cfg = composed("+exp=kdrl", "teacher=vllm_server", "teacher.url=http://127.0.0.1:1")
    told = refused(made, cfg, tokenizer)
    assert told.startswith("teacher.url: no vLLM server answers at http://127.0.0.1:1") and "rltoken.serve" in told


def with_another_word(tokenizer):
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.add_tokens(["eleven"])
    return other


def test_another_vocabulary_is_refused_by_its_first_difference(tokenizer):
    refuse_other_vocabulary(tokenizer, AutoTokenizer.from_pretrained(tokenizer.name_or_path), "FOLDER", "teacher.path")
    more = with_another_word(tokenizer)
    told = refused(refuse_other_vocabulary, tokenizer, more, "FOLDER", "teacher.path")
    assert told.startswith("teacher.path: FOLDER has another tokenizer")
    assert f"'eleven' is no token here and token {len(more) - 1} there" in told
    told = refused(refuse_other_vocabulary, more, tokenizer, "FOLDER", "teacher.path")
    assert f"'eleven' is token {len(more) - 1} here and no token there" in told
    swapped = build_tokenizer(World(modulus=5))
    assert "here and" in refused(refuse_other_vocabulary, tokenizer, swapped, "FOLDER", "teacher.path")


def test_one_vocabulary_that_is_read_otherwise_is_refused(tokenizer):
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.encode = lambda text, **options: tokenizer.encode(text, **options)[1:]
    told = refused(refuse_other_vocabulary, tokenizer, other, "FOLDER", "teacher.path")
    assert "tokens here and" in told and told.endswith("whose tokenizer is the same.")


def test_another_tokenizer_is_refused_before_the_model_is_loaded(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(parts.models, "load_model", lambda *args, **options: pytest.fail("loaded"))
    told = refused(made, hf(folder), with_another_word(tokenizer))
    assert told.startswith(f"teacher.path: {folder} has another tokenizer than the model that is trained")


def test_adapters_and_folders_that_are_none_are_refused(tmp_path):
    assert refused(existing, str(tmp_path)).startswith(f"teacher.path: {tmp_path} holds no config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "python -m rltoken.merge" in refused(existing, str(tmp_path))
    told = refused(existing, str(tmp_path / "model.dtype"))
    assert told.startswith(f"teacher.path: there is no folder {tmp_path}/model.dtype. Set teacher.path to")


def test_a_tokenizer_that_is_not_there(tmp_path):
    told = refused(teachers.load_tokenizer, str(tmp_path), trust_remote_code=False)
    assert told.startswith(f"teacher.path: the tokenizer of {tmp_path} cannot be loaded")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+aux=kdrl"], "teacher: method.aux.kdrl needs one; choose teacher=hf"),
        (["+credit=kdrl"], "teacher: method.credits.kdrl needs one; choose teacher=hf"),
        (["+exp=kdrl", "teacher=base"], "teacher: there is no base beside the model"),
        (["+exp=kdrl", "teacher.kind=best"], "teacher.kind: there is no 'best'"),
        (
            ["+exp=kdrl", "teacher=vllm_server", "teacher.url=http://a:1", "trainer.temperature=0.7"],
            "trainer.temperature: a vLLM server gives a teacher's log-probabilities at temperature 1",
        ),
    ],
)
def test_refused_before_anything_is_loaded(overrides, message, tmp_path):
    assert refused(checked, composed(*overrides), tmp_path).startswith(message)


@pytest.mark.parametrize(
    "overrides",
    [
        ["+exp=kdrl", "teacher=base", "+lora=default"],
        ["+exp=kdrl", "trainer.temperature=0.7"],
        ["+exp=grpo", "teacher=base"],
    ],
)
def test_allowed(overrides, tmp_path):
    pipeline, args, _ = checked(composed(*overrides), tmp_path)
    assert pipeline.needs("teacher_logps") == ("+exp=grpo" not in overrides) and args.output_dir == str(tmp_path)


def test_a_mistyped_key():
    told = refused(composed, "+exp=kdrl", "teacher=vllm_server", "teacher.url=a", "+teacher.dtpye=float32")
    assert told.startswith("teacher.dtpye: nothing reads it (did you mean 'dtype'?)")
