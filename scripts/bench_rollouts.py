#!/usr/bin/env python
"""Tokens per second of the back ends that rollouts come from, in one run, by turns.

    .venv-vllm/bin/python scripts/bench_rollouts.py                                         # the tiny world's model
    .venv-vllm/bin/python scripts/bench_rollouts.py --turns 3 'scale=small trainer.max_completion_length=64'

Each back end gets a trainer of its own from the same overrides, and the server is started by rltoken.serve. They take
turns: one window's prompts are completed, with the hand-over of weights before it as in training, then the same prompts
by the next one. Every completion is as long as allowed, whatever ends one, so that all sample equally many tokens.
Absolute figures depend on the machine; the ratios to hf are what may be quoted.
"""

import argparse
import contextlib
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from hydra import compose, initialize_config_module
from rich.console import Console
from rich.table import Table
from torch.distributed.elastic.utils.distributed import get_free_port

from rltoken import adapters, train
from rltoken.config import register_schemas

BACK_ENDS = ("hf", "vllm_colocate", "vllm_server")
START_SECONDS = 600


def trainer(back_end, overrides, folder, port):
    """The trainer that a run with these overrides would have."""
    given = [*overrides, f"rollout={back_end}", "trainer.log_completions=false"]
    given += [f"trainer.vllm_server_port={port}"] if back_end == "vllm_server" else []
    cfg = compose("config", overrides=given)
    adapters.settle(cfg)
    pipeline, args, lora = train.checked(cfg, folder / back_end)
    made, _ = train.assemble(cfg, folder / back_end, pipeline, args, lora, [])
    return made


@contextlib.contextmanager
def server(overrides, port, log):
    """A server for those overrides, until the context ends."""
    command = [
        sys.executable,
        "-m",
        "rltoken.serve",
        *overrides,
        "rollout=vllm_server",
        f"trainer.vllm_server_port={port}",
    ]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                break
            if process.poll() is not None or time.monotonic() > until:
                sys.exit(f"bench_rollouts: the server did not start:\n{Path(log).read_text()[-2000:]}")
            time.sleep(0.5)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def window(made):
    """Sampled tokens per second of one window, hand-over of weights included; completions of the full length."""
    rows = made.args.generation_batch_size
    group = made.num_generations
    prompts = made.tokenize([made.train_dataset[i // group] for i in range(rows)])
    if made.use_vllm:
        made.vllm_generation.generation_kwargs = {"ignore_eos": True}
    else:
        made.generation_config.min_new_tokens = made.max_completion_length
    made.state.global_step += 1  # as after an optimizer step, so that the weights are handed over
    started = time.perf_counter()
    ids, _ = made.sample(prompts, num_generations=group)
    return sum(map(len, ids)) / (time.perf_counter() - started)


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="?", default="", help="of rltoken.train, in one argument")
    parser.add_argument(
        "--turns", type=int, default=5, help="windows of each back end (default 5), after one to warm up"
    )
    options = parser.parse_args()
    overrides = ["+exp=grpo", *shlex.split(options.overrides)]
    register_schemas()
    port = get_free_port()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(initialize_config_module("rltoken.conf", version_base="1.3"))
        stack.enter_context(server(overrides, port, Path(folder) / "server.log"))
        trainers = {name: trainer(name, overrides, Path(folder), port) for name in BACK_ENDS}
        for made in trainers.values():
            stack.callback(made.close)
        rates = {name: [] for name in BACK_ENDS}
        for turn in range(options.turns + 1):
            for name, made in trainers.items():
                rate = window(made)
                if turn:
                    rates[name].append(rate)
        show(rates, trainers["hf"])


def show(rates, made):
    """The table: medians, and quartiles of the ratio to hf turn by turn."""
    rows, length = made.args.generation_batch_size, made.max_completion_length
    table = Table(title=f"{rows} completions of {length} tokens each turn, groups of {made.num_generations}")
    for column in ("rollout", "tokens per second (median)", "over hf (median)", "quartiles"):
        table.add_column(column, justify="right")
    for name, found in rates.items():
        ratios = sorted(rate / base for rate, base in zip(found, rates["hf"], strict=True))
        low, high = (statistics.quantiles(ratios, n=4)[i] for i in (0, 2)) if len(ratios) > 1 else (ratios[0],) * 2
        table.add_row(
            name, f"{statistics.median(found):.0f}", f"{statistics.median(ratios):.2f}", f"{low:.2f} to {high:.2f}"
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
