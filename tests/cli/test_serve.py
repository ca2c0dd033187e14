"""`rltoken.serve` becomes vLLM's server with what a trainer needs; here what it would run, without vLLM."""

import json
import os
import sys

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from rltoken import cli as entry
from rltoken import serve
from rltoken.config import register_schemas
from rltoken.errors import UserError
from rltoken.rollout import vllm_cpu


@pytest.fixture
def configured(monkeypatch):
    """configured(*overrides) -> the configuration; every model fits a CPU."""
    monkeypatch.setattr(vllm_cpu, "refuse_model", lambda *args, **options: None)

    def made(*overrides):
        GlobalHydra.instance().clear()
        register_schemas()
        with initialize_config_module("rltoken.conf", version_base="1.3"):
            return compose("config", overrides=list(overrides))

    yield made
    GlobalHydra.instance().clear()


def options(command):
    """--name=value and --name of a command line."""
    return {item.partition("=")[0]: item.partition("=")[2] for item in command if item.startswith("--")}


def test_a_server_for_a_gpu(configured):
    command = serve.arguments(configured("rollout=vllm_server"), "some/model", "bfloat16", on_cpu=False)
    assert command[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    given = options(command)
    assert given["--model"] == "some/model" and given["--dtype"] == "bfloat16"
    assert (given["--host"], given["--port"]) == ("127.0.0.1", "8000")
    assert json.loads(given["--weight-transfer-config"]) == {"backend": "nccl"}
    assert given["--worker-extension-cls"] == "rltoken.rollout.vllm_worker.Fingerprinted"
    assert given["--logprobs-mode"] == "processed_logprobs"
    assert not {"--worker-cls", "--enforce-eager", "--max-model-len", "--trust-remote-code"} & given.keys()
    assert serve.environment(on_cpu=False)["VLLM_SERVER_DEV_MODE"] == "1"


def test_a_server_for_a_cpu(configured):
    given = options(serve.arguments(configured("rollout=vllm_server"), "m", "float32", on_cpu=True))
    assert json.loads(given["--weight-transfer-config"]) == {"backend": vllm_cpu.TRANSFER}
    assert given["--worker-cls"] == "rltoken.rollout.vllm_cpu_worker.Worker" and given["--block-size"] == "32"
    assert given["--enforce-eager"] == given["--no-enable-chunked-prefill"] == ""
    assert "--worker-extension-cls" not in given
    assert serve.environment(on_cpu=True)["TORCHDYNAMO_DISABLE"] == "1"


def test_a_method_that_changes_logits_has_its_processor_served(configured):
    given = options(serve.arguments(configured("+exp=hapo_entropy", "rollout=vllm_server"), "m", "float32", True))
    assert given["--logits-processors"] == "rltoken.rollout.processors:ChangedLogits"
    assert given["--logprobs-mode"] == "raw_logprobs"


def test_settings_that_reach_the_server(configured):
    cfg = configured(
        "rollout=vllm_server", "trainer.vllm_server_base_url=http://gpu-7:9000/", "trainer.vllm_max_model_length=4096",
        "+rollout.server_options.max_num_seqs=64",
        "+rollout.server_options.enable_prefix_caching=false", "model.trust_remote_code=true",
    )  # fmt: skip
    command = serve.arguments(cfg, "m", "bfloat16", on_cpu=False)
    given = options(command)
    assert (given["--host"], given["--port"], given["--max-model-len"]) == ("gpu-7", "9000", "4096")
    assert "--trust-remote-code" in given and command[-2:] == ["--max-num-seqs=64", "--no-enable-prefix-caching"]
    assert serve.url_of(cfg.trainer) == "http://gpu-7:9000"


@pytest.mark.parametrize("url", ["gpu-7", "http://gpu-7", "http://:80", "http://gpu-7:abc"])
def test_a_url_without_host_or_port(configured, url):
    with pytest.raises(UserError, match=r"trainer\.vllm_server_base_url: .*write\s+http://HOST:PORT"):
        serve.url_of(configured("rollout=vllm_server", f"trainer.vllm_server_base_url='{url}'").trainer)


def test_the_command_of_vllm_is_printed_and_run(cli, monkeypatch, configured, capfd):
    started = []
    monkeypatch.setattr(vllm_cpu, "refuse", lambda settings: None)
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["rltoken.serve", "+exp=grpo", "rollout=vllm_server", "model.source.steps=2"])
    entry.STATUSES.clear()
    with pytest.raises(SystemExit) as left:
        serve.main()
    (program, command, environment) = started[0]
    assert left.value.code == 0 and program == sys.executable == command[0]
    assert options(command)["--dtype"] == "float32" and os.path.isdir(options(command)["--model"])
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "vllm.entrypoints.openai.api_server --model=" in capfd.readouterr().err


def test_a_sweep_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rltoken.serve", "rollout=vllm_server", "seed=0,1", "--multirun"])
    with pytest.raises(SystemExit) as left:
        serve.main()
    assert left.value.code == 2 and capsys.readouterr().err.startswith("error: --multirun: a server serves one model")


def test_help_says_what_it_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rltoken.serve", "--help"])
    with pytest.raises(SystemExit) as left:
        serve.main()
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert shown.startswith("Start the vLLM server") and "+exp=METHOD" in shown
