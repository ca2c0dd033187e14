"""The warm start: what its cache key covers, how it is written, and what it leaves alone."""

import importlib
import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rltoken.errors import UserError
from rltoken.tiny import World, accuracy, problems, warm_start
from rltoken.tiny.tokenizer import build_tokenizer

module = importlib.import_module("rltoken.tiny.warm_start")

CHANGED = {
    "modulus": 5,
    "min_operations": 1,
    "max_operations": 6,
    "noise": 0.1,
    "styles": (0.1, 0.2),
    "max_passes": 3,
    "single": 0.3,
    "stop": 0.5,
    "plan": 0.5,
    "hesitation": 0.2,
    "verbosity": 0.2,
    "cut": 0.3,
    "last": 0.4,
    "shortcut": 0.1,
    "formats": 2,
    "longest": 120,
    "tagged": True,
}


def key(world: World, *, seed: int = 0, steps: int = 3) -> str:
    return module.cache_key(module.describe(world, build_tokenizer(world), seed=seed, steps=steps))


def weights(folder: str) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("knob", [field.name for field in fields(World)])
def test_every_knob_changes_the_key(knob):
    base = World(last=0.5)
    assert key(replace(base, **{knob: CHANGED[knob]})) != key(base)


def test_seed_steps_model_template_source_and_versions_change_the_key(monkeypatch, tmp_path):
    base = key(World())
    assert key(World()) == base
    others = [key(World(), seed=1), key(World(), steps=4)]
    for library in (module.torch, module.transformers):
        with monkeypatch.context() as patched:
            patched.setattr(library, "__version__", "0")
            others.append(key(World()))
    with monkeypatch.context() as patched:
        config, tokenizer_of_another_size = module.model_config, build_tokenizer(World(modulus=5))
        patched.setattr(module, "model_config", lambda _: config(tokenizer_of_another_size))
        others.append(key(World()))
    with monkeypatch.context() as patched:
        patched.setattr("rltoken.tiny.tokenizer.CHAT_TEMPLATE", "{{ messages }}")
        others.append(key(World()))
    with monkeypatch.context() as patched:
        (tmp_path / "world.py").write_text("# another world")
        patched.setattr(module, "__file__", str(tmp_path / "warm_start.py"))
        others.append(key(World()))
    assert len({base, *others}) == 8


def test_the_same_arguments_give_the_same_weights_and_another_seed_others(tmp_path):
    first, again = (warm_start(steps=3, cache_dir=tmp_path / name) for name in ("a", "b"))
    other = warm_start(steps=3, seed=1, cache_dir=tmp_path / "a")
    assert Path(first).name == Path(again).name != Path(other).name
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))


def test_training_takes_steps(tmp_path):
    assert not same(*(weights(warm_start(steps=steps, cache_dir=tmp_path)) for steps in (0, 2)))


def test_the_second_call_finds_the_first(tmp_path, monkeypatch):
    folder = warm_start(steps=1, cache_dir=tmp_path)
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained although cached"))
    assert warm_start(steps=1, cache_dir=tmp_path) == folder
    recipe = json.loads((Path(folder) / "recipe.json").read_text())
    assert (recipe["steps"], recipe["world"]["noise"]) == (1, World().noise)


def test_the_environment_names_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLTOKEN_CACHE", str(tmp_path))
    assert Path(warm_start(steps=0)).parent == tmp_path / "tiny"
    monkeypatch.delenv("RLTOKEN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(warm_start(steps=0)).parent == tmp_path / ".cache" / "rltoken" / "tiny"


def test_a_failure_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            warm_start(steps=0, cache_dir=tmp_path)
    assert [path for path in (tmp_path / "tiny").iterdir() if path.is_dir()] == []
    assert weights(warm_start(steps=0, cache_dir=tmp_path))


def test_processes_at_once_share_one_training(tmp_path):
    code = f"from rltoken.tiny import warm_start; print(warm_start(steps=2, cache_dir={str(tmp_path)!r}))"
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": root}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    folders = {output for output, _ in outputs}
    assert len(folders) == 1
    assert sum("2/2" in errors for _, errors in outputs) == 1
    assert weights(folders.pop().strip())


def test_generators_and_threads_are_left_alone(tmp_path):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    try:
        warm_start(steps=2, cache_dir=tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_only_problems_of_the_train_split_are_seen():
    held_out = {prompt[0]["content"] for prompt in problems(150, split="eval")["prompt"]}
    tokenizer = build_tokenizer(World())
    rows = itertools.islice(module.batches(random.Random(0), World(), tokenizer), 40)
    seen = {text.split(" = ")[0] for ids, _ in rows for text in tokenizer.batch_decode(ids)}
    assert not seen & held_out


def test_batches_are_padded_on_the_right_without_loss():
    tokenizer = build_tokenizer(World())
    ids, mask = next(module.batches(random.Random(0), World(), tokenizer))
    assert ids.shape == mask.shape
    padding = ids == tokenizer.pad_token_id
    assert not mask[padding].any()
    assert not padding[:, 0].any()


def test_the_learning_rate_warms_up_and_decays_to_a_twentieth():
    rates = [module._rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 30)
    assert rates[29:501] == [1.0] * 472
    assert rates[-1] == pytest.approx(0.05, abs=0.002)


def test_negative_steps_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.source\.steps"):
        warm_start(steps=-1, cache_dir=tmp_path)


@pytest.mark.slow
def test_the_full_warm_start_is_right_often_but_not_always(tmp_path):
    folder = warm_start(cache_dir=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = problems(400, split="eval")
    prompts = tokenizer.apply_chat_template(
        list(rows["prompt"]), add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )

    def generate(**settings) -> tuple[float, torch.Tensor]:
        ids = model.generate(**prompts, max_new_tokens=160, **settings)[:, prompts["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        lengths = (ids != tokenizer.pad_token_id).sum(1).float()
        return float(np.mean(accuracy(texts, list(rows["answer"])))), lengths

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampled = [generate(do_sample=True, temperature=1.0, top_k=0) for _ in range(3)]
    greedy, _ = generate(do_sample=False)
    lengths = torch.cat([lengths for _, lengths in sampled])
    assert 0.80 <= np.mean([right for right, _ in sampled]) <= 0.90
    assert greedy >= 0.98
    assert lengths.quantile(0.9) > 2 * lengths.quantile(0.1)
    assert (lengths > World().longest).float().mean() < 0.01
