"""Start the vLLM server that a training run samples from: `python -m rltoken.serve +exp=brpo rollout=vllm_server`.

It takes the overrides of `rltoken.train`, so that model, dtype and port cannot differ, prints the command of vLLM that
it becomes, and serves until it is interrupted. More options of vLLM: +rollout.server_options.max_num_seqs=64.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlparse

import hydra
from omegaconf import DictConfig, OmegaConf

from rltoken import adapters, cli, confidential, config
from rltoken.errors import UserError

EXTENSION = "rltoken.rollout.vllm_worker.Fingerprinted"


def main() -> None:
    """The entry point."""
    if not {"--multirun", "-m"}.isdisjoint(sys.argv[1:]):
        cli.fail(UserError("--multirun: a server serves one model; start one for each, on ports of their own."))
    cli.main(_job, "config", config.TOP_LEVEL, "interrupted; no server was started", about=f"{__doc__}\n")


@hydra.main(config_path=f"pkg://{cli.CONFIG_MODULE}", config_name="config", version_base="1.3")
def _job(cfg: DictConfig) -> None:
    cli.attempt(lambda: serve(cfg))


def serve(cfg: DictConfig) -> None:
    """Become vLLM's server for the model of a configuration.

    Raises:
        UserError: whatever the user can mend.
    """
    from rltoken import models, parts

    adapters.settle(cfg)
    config.check_keys(cfg)
    OmegaConf.resolve(cfg)
    confidential.refuse(cfg)
    cfg.trainer.use_vllm = True
    args = config.to_grpo_config(cfg.trainer, output_dir=cfg.runs_dir, seed=cfg.seed)
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else models.torch_dtype(cfg.model.dtype)
    on_cpu = args.device.type == "cpu"
    path = parts.source(cfg.model)
    path = parts.base_of(cfg.model, path) if adapters.is_adapter(path) else path
    command = [sys.executable, *arguments(cfg, path, str(dtype).removeprefix("torch."), on_cpu)]
    if warning := exposed(str(urlparse(url_of(cfg.trainer)).hostname)):
        print(warning, file=sys.stderr)
    print(shlex.join(command), file=sys.stderr, flush=True)
    os.execve(command[0], command, environment(on_cpu))


def arguments(cfg: DictConfig, model: str, dtype: str, on_cpu: bool) -> list[str]:
    """What Python is to run: vLLM's server with what a trainer needs of it.

    Raises:
        UserError: vLLM on a CPU cannot serve the model.
    """
    from hydra.utils import instantiate

    from rltoken.pipeline import build
    from rltoken.rollout import logits

    trainer, url = cfg.trainer, urlparse(url_of(cfg.trainer))
    given = ["-m", "vllm.entrypoints.openai.api_server", f"--model={model}", f"--host={url.hostname}"]
    given += [f"--port={url.port}", f"--dtype={dtype}", "--max-logprobs=-1", "--disable-uvicorn-access-log"]
    if build(instantiate(cfg.method, _convert_="object")).changes_logits:
        given += [f"--logits-processors={logits.PROCESSOR}", f"--logprobs-mode={logits.LOGPROBS}"]
    else:
        given.append("--logprobs-mode=processed_logprobs")
    if trainer.vllm_max_model_length is not None:
        given.append(f"--max-model-len={trainer.vllm_max_model_length}")
    if cfg.model.trust_remote_code:
        given.append("--trust-remote-code")
    if on_cpu:
        from rltoken.rollout import vllm_cpu

        vllm_cpu.refuse_model(model, trust_remote_code=cfg.model.trust_remote_code)
        transfer = vllm_cpu.TRANSFER
        given += options(vllm_cpu.SETTINGS)
    else:
        transfer = "nccl"
        given.append(f"--worker-extension-cls={EXTENSION}")
    given.append(f"--weight-transfer-config={json.dumps({'backend': transfer})}")
    return [*given, *options(cfg.rollout.server_options)]


def options(settings: Mapping[str, Any]) -> list[str]:
    """Settings of vLLM as its command line has them: --name=value, or --name and --no-name."""
    spelt = {name.replace("_", "-"): value for name, value in settings.items()}
    return [
        (f"--{name}" if value else f"--no-{name}") if isinstance(value, bool) else f"--{name}={value}"
        for name, value in spelt.items()
    ]


def url_of(trainer: DictConfig) -> str:
    """Where the section `trainer` says that the server is.

    Raises:
        UserError: its URL has no host or no port.
    """
    found = trainer.vllm_server_base_url or f"http://{trainer.vllm_server_host}:{trainer.vllm_server_port}"
    try:
        whole = bool(urlparse(found).hostname and urlparse(found).port)
    except ValueError:  # a port that is no number
        whole = False
    if not whole:
        raise UserError(
            f"trainer.vllm_server_base_url: {found} names no host and port; write http://HOST:PORT, or set "
            "trainer.vllm_server_host and trainer.vllm_server_port."
        )
    return found.rstrip("/")


def exposed(host: str) -> str | None:
    """What to say of an address that other machines reach; None of a loopback one."""
    with contextlib.suppress(ValueError):  # a name
        if ipaddress.ip_address(host).is_loopback:
            return None
    if host == "localhost":
        return None
    return (
        f"warning: whoever reaches {host} can sample from this server and replace its weights: it asks nobody who they "
        "are. Keep it in a private network (docs/security.md)."
    )


def environment(on_cpu: bool) -> dict[str, str]:
    """This process's environment with what the server needs: development endpoints take the weights."""
    found = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "WARNING"} | os.environ
    if not on_cpu:
        return found
    from rltoken.rollout import vllm_cpu

    return vllm_cpu.ENVIRONMENT | {"TORCHDYNAMO_DISABLE": "1"} | found


if __name__ == "__main__":
    main()
