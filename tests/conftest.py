"""What every test shares: one thread, no network, and the folder of real data sets where there is one."""

import gc
import os
import signal
from pathlib import Path

import pytest

# Set before torch is imported. One thread makes sums bit-reproducible and lets two test processes share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# A shell's background job is started with Ctrl-C ignored, and hands that on to what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """Spare what imports have made the full collections that accelerate asks for at the start of every training."""
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: $RLTOKEN_DATA_DIR, or `../shared/data` seen from the repository's root.

    Skips the test where the folder is absent, which is the case in an ordinary clone.
    """
    folder = ROOT / os.environ.get("RLTOKEN_DATA_DIR", "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"no folder of real data sets at {folder}; set RLTOKEN_DATA_DIR to one")
    return folder.resolve()


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """FlexAttention with gradients on a CPU: its plain formula, which torch has and lets nobody train by."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.WrappedFlexAttention",
        lambda training: lambda: flex_attention.flex_attention,
    )
