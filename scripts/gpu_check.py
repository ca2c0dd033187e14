#!/usr/bin/env python
"""What only a GPU shows: every method trains two steps in bfloat16, with its seconds and the memory it took.

    python scripts/gpu_check.py                          # every conf/exp but those of papers, then again with LoRA
    python scripts/gpu_check.py --only 'thr.*' --also model=hf --also model.path=FOLDER
    python scripts/gpu_check.py --hardware cpu --only grpo   # to try the script itself

Exit status 1 if one does not train. It says nothing of how well a method works. What goes with it:

    # step against stock TRL
    python scripts/bench.py --common 'hardware=gpu' --arm '+exp=grpo' --arm '+exp=brpo' --arm '+exp=thr'
    # FlexAttention against the split one, and against rows
    python scripts/bench_packing.py --device cuda --model wide --thinking 2000 8000 --answer 118 --rows-up-to 8000
    # vLLM against transformers
    python scripts/bench_rollouts.py

torch and TRL are imported once, and every run is a fork of the process that did (scripts/forks.py).
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # set before torch looks: a fork cannot use a GPU its parent used

import torch
from forks import run, training
from fuzz import NEEDED, SMALL, exps, outcome
from rich.console import Console
from rich.progress import track

from rltoken.report import read_metrics

VARIANTS = {"all weights": (), "LoRA": ("+lora=default",)}


def measured(overrides: list[str]) -> Callable[[], None]:
    """What a process is to do: train, and write down the most memory of the GPU that it had, in MB."""

    def work() -> None:
        try:
            training(overrides)()
        finally:
            Path("peak.json").write_text(json.dumps(torch.cuda.max_memory_allocated() / 2**20))

    return work


def checked(name: str, extra: tuple[str, ...], folder: Path) -> tuple[str, str]:
    """('trained' or what else happened, the rest of the line) of an experiment."""
    overrides = [*SMALL, *NEEDED.get(f"exp={name.split('/')[0]}", ()), f"+exp={name}", *extra]
    (status,) = run(measured(overrides), folder, ranks=1)
    what, told = outcome(folder, status)
    if what != "trained":
        return what, f"{told} ({folder}/log.txt)"
    lines = [line for line in read_metrics(folder / "runs/x/metrics.jsonl") if "step_time" in line]
    seconds, peak = lines[-1]["step_time"], json.loads((folder / "peak.json").read_text())
    return what, f"{seconds:.2f} s in the last step, {peak:.0f} MB at most"


def main() -> None:
    """Train each, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=".*", help="experiments whose whole name matches this pattern")
    parser.add_argument("--also", action="append", default=[], help="a further override of each run; may be repeated")
    parser.add_argument("--hardware", default="gpu", help="the group conf/hardware")
    options = parser.parse_args()
    if options.hardware == "gpu" and not torch.cuda.is_available():
        parser.error("--hardware gpu: PyTorch finds no GPU here; to try the script itself, set --hardware cpu")
    torch.set_num_threads(1)  # here and in every fork, which would wait for threads that it does not have
    out, failed = Path(tempfile.mkdtemp(prefix="gpu-check-")), 0
    asked = [(variant, name) for variant in VARIANTS for name in exps() if re.fullmatch(options.only, name)]
    for number, (variant, name) in enumerate(track(asked, "experiments", console=Console(stderr=True))):
        extra = (*VARIANTS[variant], f"hardware={options.hardware}", *options.also)
        what, told = checked(name, extra, out / str(number))
        failed += what != "trained"
        print(f"{name}, {variant}: {what}: {told}", flush=True)
    print(f"{len(asked) - failed} of {len(asked)} trained")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
