"""docs/security.md: what is executed, what is loaded, where the server listens, what is written."""

import ast
import contextlib
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from rltoken import confidential, parts, resume, serve
from rltoken.errors import UserError
from tests.cli.test_serve import configured, options
from tests.trl.conftest import run, tiny

ROOT = Path(__file__).resolve().parents[2]
SECRET = "sk-0123456789abcdef"

__all__ = ["configured", "run", "tiny"]


def test_no_configuration_trusts_remote_code(configured):
    trusting = [
        path for path in ROOT.glob("conf/**/*.yaml") if re.search(r"trust_remote_code: *true", path.read_text())
    ]
    assert trusting == []
    for model in ("tiny", "smollm2", "r1"):
        cfg = configured("+exp=kdrl", f"model={model}")
        assert not (cfg.model.trust_remote_code or cfg.trainer.trust_remote_code or cfg.teacher.trust_remote_code)


@pytest.mark.parametrize("load", [parts.model, parts.tokenizer], ids=["model", "tokenizer"])
@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_comes_with_a_model_is_run_where_the_configuration_says_so_only(tmp_path, monkeypatch, load, trusted):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "model", tmp_path / "executed"
    folder.mkdir()
    (folder / "mine.py").write_text(f"open({str(mark)!r}, 'w').close()")
    names = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": ["mine.Mine", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Mine", "auto_map": names}))
    section = {"dtype": "float32", "attn_implementation": None, "think_end": None, "trust_remote_code": trusted}
    with contextlib.suppress(Exception):  # it is no model, trusted or not
        load(OmegaConf.create(section), str(folder))
    assert mark.exists() is trusted


def test_nothing_that_a_checkpoint_holds_is_unpickled():
    """Every torch.load is told so; pickle itself is between the grader's own processes, and NumPy's is never asked."""
    found = {}
    for path in [*ROOT.glob("rltoken/**/*.py"), *ROOT.glob("rewards/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                if names & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}:
                    found.setdefault("imports", []).append(str(path.relative_to(ROOT)))
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            told = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            assert "allow_pickle" not in told and node.func.attr != "read_pickle", path
            if node.func.attr == "load" and getattr(node.func.value, "id", "") == "torch":
                assert told.get("weights_only") is True, f"{path}:{node.lineno}"
                found.setdefault("loads", []).append(path)
    assert found["imports"] == ["rewards/grader.py", "rewards/worker.py"] and len(found["loads"]) == 2


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["rltoken_0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_with_an_object_in_it_executes_nothing(run, tmp_path, name):
    """With a manifest to match, as somebody would write who wants to be believed."""
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "output_dir": tmp_path / "run"}
    run({}, **saved | {"max_steps": 1})
    folder, mark = tmp_path / "run/checkpoint-1", tmp_path / "executed"
    torch.save({"step": Bomb(str(mark)), "param_groups": Bomb(str(mark))}, folder / name)
    torch.load(folder / name, weights_only=False)
    mark.unlink()  # it is there: that is what must not happen
    facts = {key: value for key, value in resume.read_manifest(folder).items() if key != "files"}
    resume.write_manifest(folder, **facts)
    if name == "training_args.bin":
        run({}, resume=str(folder), **saved)
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            run({}, resume=str(folder), **saved)
    assert not mark.exists()


@pytest.mark.parametrize("overrides", [(), ("rollout=vllm_server",), ("model=smollm2",)])
def test_a_server_is_reached_from_its_own_machine_only(configured, overrides):
    assert options(serve.arguments(configured(*overrides), "m", "float32", on_cpu=False))["--host"] == "127.0.0.1"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gpu-7"])
def test_another_address_is_warned_about(host):
    assert serve.exposed(host).startswith(f"warning: whoever reaches {host} can sample from this server")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_an_address_of_its_own_is_not(host):
    assert serve.exposed(host) is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"trainer": {"hub_token": "hf_x"}}, "trainer.hub_token: it would be written into the run directory"),
        ({"reward": {"funcs": {"judge": {"api_key": "x"}}}}, "reward.funcs.judge.api_key: it would be written"),
        ({"reward": {"funcs": {"judge": {"password": 123456}}}}, "reward.funcs.judge.password: it would be written"),
        ({"reward": {"funcs": {"judge": {"hf_token": "x"}}}}, "reward.funcs.judge.hf_token: it would be written"),
        ({"data": {"aws_secret_access_key": "x"}}, "data.aws_secret_access_key: it would be written"),
        ({"teacher": {"url": "http://me:word@gpu-7:8000"}}, "teacher.url: the password in its URL would be written"),
        ({"reward": {"funcs": {"judge": {"key": SECRET}}}}, r"judge.key: it holds the value of \$MINE_API_KEY, which"),
        (
            {"trainer": {"generation_kwargs": {"x": ["a", f"Bearer {SECRET}"]}}},
            r"kwargs.x: it holds the value of \$MINE",
        ),
    ],
)
def test_settings_that_are_secrets_are_refused_and_never_shown(monkeypatch, settings, told):
    monkeypatch.setenv("MINE_API_KEY", SECRET)
    with pytest.raises(UserError, match=told) as raised:
        confidential.refuse(OmegaConf.create(settings))
    assert SECRET not in str(raised.value) and "word@" not in str(raised.value)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("+hydra.job.env_set.WANDB_API_KEY=x", r"^hydra\.job\.env_set\.WANDB_API_KEY: it would be written"),
        (f"hydra.launcher.setup=[export X={SECRET}]", r"^hydra\.launcher\.setup: it holds the value of \$MINE_API_KEY"),
    ],
)
def test_so_are_those_of_hydra_which_the_command_holds(monkeypatch, argument, told):
    monkeypatch.setenv("MINE_API_KEY", SECRET)
    with pytest.raises(UserError, match=told):
        confidential.refuse(OmegaConf.create({}), ["--multirun", argument])
    for harmless in ("+hydra.job.env_set.HF_TOKEN=${oc.env:MINE_API_KEY}", "trainer.hub_token=null"):
        assert confidential.refuse(OmegaConf.create({}), [harmless]) is None


def test_settings_that_are_none_pass(monkeypatch):
    monkeypatch.setenv("SHORT_KEY", "tiny")
    cfg = {"trainer": {"hub_token": None, "max_tokens": 3}, "model": {"think_end": "</think>", "path": "tiny"}}
    cfg |= {"sft": {"trainer": {"eos_token": "</s>", "pad_token": "<pad>"}}}
    assert confidential.refuse(OmegaConf.create(cfg)) is None


def test_a_run_directory_holds_no_secret(cli, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    quick = ("name=x", "eval.before=false", "eval.after=false", "trainer.max_steps=1")
    refused = cli(*quick, "trainer.run_name=${oc.env:HF_TOKEN}")
    assert (
        refused.status == 2 and "trainer.run_name: it holds the value of $" in refused.err and not refused.runs.exists()
    )
    refused = cli(*quick, f"+hydra.job.env_set.MINE={SECRET}")
    assert refused.status == 2 and "hydra.job.env_set.MINE: it holds the value of $" in refused.err
    assert not refused.runs.exists()
    found = cli(*quick)
    assert found.status == 0, found.err
    holding = [path for path in found.runs.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding == [] and os.environ["HF_TOKEN"] == SECRET
