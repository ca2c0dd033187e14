"""`scripts/gpu_check.py` on a CPU: it trains what it is told, and says so when something does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("also", "status", "lines"),
    [
        ([], 0, [r"grpo, all weights: trained: [\d.]+ s in the last step, 0 MB at most",
                 r"grpo, LoRA: trained: [\d.]+ s in the last step, 0 MB at most", "2 of 2 trained"]),
        (["--also", "trainer.bet=1"], 1, [r"grpo, all weights: refused: error: trainer\.bet: .*",
                                          r"grpo, LoRA: refused: error: trainer\.bet: .*", "0 of 2 trained"]),
    ],
    ids=["trained", "refused"],
)  # fmt: skip
def test_each_is_told(tmp_path, cache, also, status, lines):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/gpu_check.py", "--hardware", "cpu", "--only", "grpo", *also],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RLTOKEN_CACHE": str(cache), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    told = done.stdout.splitlines()
    assert done.returncode == status and len(told) == len(lines), done.stderr[-2000:]
    assert all(re.fullmatch(wanted, line) for wanted, line in zip(lines, told, strict=True)), told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu_check.py", "bench_packing.py --device cuda"])
def test_without_a_gpu_one_line_says_so(script):
    name, *arguments = script.split()
    done = subprocess.run([sys.executable, ROOT / "scripts" / name, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "PyTorch finds no GPU here" in done.stderr.splitlines()[-1], done.stderr
