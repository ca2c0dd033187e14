#!/usr/bin/env python
"""Whether two finished runs are equal bit for bit, and if not, in what; exit status 1 if they are not.

    python scripts/compare_runs.py runs/one runs/other

Compared are the final weights, the optimizer's, scheduler's and random states, the window and the stages' state in the
last checkpoint, the trainer's state, the metrics, and the tables of prompts and completions of every logged step.
Wall-clock fields are left out.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy
import pandas
import torch
from safetensors.torch import load_file

from rltoken.report import read_metrics

WALL_CLOCK = re.compile(r"(^|_)(time|runtime|per_second)$")


def saved(run_folder: Path) -> dict[str, dict]:
    """Everything that a finished run left and that must not depend on kills, by kind."""
    last = run_folder / f"checkpoint-{json.loads((run_folder / 'report.json').read_text())['steps']}"

    def loaded(pattern: str) -> dict:
        return {path.name: torch.load(path, weights_only=False) for path in last.glob(pattern)}

    lines = enumerate(read_metrics(run_folder / "metrics.jsonl"), 1)
    tables = run_folder.glob("completions/*.parquet")
    return {
        "prompts and completions": {path.stem: pandas.read_parquet(path).to_dict("list") for path in tables},
        "metrics": {f"line {number}, step {line['step']}": line for number, line in lines},
        "weights": {path.name: load_file(path) for path in (run_folder / "final").glob("*.safetensors")},
        "optimizer": loaded("optimizer.pt"),
        "scheduler": loaded("scheduler.pt"),
        "random states": loaded("rng_state*.pth"),
        "window and stages": loaded("rltoken_*.pt"),
        "trainer state": json.loads((last / "trainer_state.json").read_text()),
    }


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every value of nested containers under its path, but wall-clock fields."""
    if isinstance(value, numpy.ndarray) and value.dtype == object:  # lists, as a table gives them
        value = value.tolist()
    if not isinstance(value, dict | list | tuple):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = {f"{path} / length".lstrip(" /"): len(value)}
    for key, item in items:
        if not WALL_CLOCK.search(str(key)):
            found |= leaves(item, f"{path} / {key}" if path else str(key))
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal bit for bit; not a number equals itself."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        one, other = one.numpy(), other.numpy()
    if isinstance(one, numpy.ndarray) and isinstance(other, numpy.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    return type(one) is type(other) and (one == other or (one != one and other != other))


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs: per kind how many values, the first of them, and how."""
    found = []
    saved_one, saved_other = saved(one), saved(other)
    for kind in saved_one:
        a, b = leaves(saved_one[kind]), leaves(saved_other[kind])
        keys = [key for key in a | b if not (key in a and key in b and same(a[key], b[key]))]
        if keys:
            how = contrast(*(side.get(keys[0], "missing") for side in (a, b)))
            found.append(f"{kind}: {len(keys)} of {len(a | b)} values, first {keys[0]}: {how}")
    return found


def contrast(one: Any, other: Any) -> str:
    """Two unequal values in few characters."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape:
        return f"the largest difference is {(one.double() - other.double()).abs().max().item():.3g}"
    texts = (" ".join(repr(value).split()) for value in (one, other))
    return " and ".join(text if len(text) <= 60 else f"{text[:60]}..." for text in texts)


def main() -> None:
    """Print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path, help="a run directory")
    parser.add_argument("other", type=Path, help="another one")
    options = parser.parse_args()
    found = differences(options.one, options.other)
    print("\n".join(found) or "identical")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
