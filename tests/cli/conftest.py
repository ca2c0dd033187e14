"""A warm start of a few steps in a cache of its own, and the entry point called in this process."""

import sys
from types import SimpleNamespace

import pytest
from hydra.core.global_hydra import GlobalHydra

from rltoken import train

TINY = {
    "model=": ["model.source.steps=2"],
    "data=": ["data.train.n=32", "data.eval.n=4"],
    "": [
        "trainer.max_steps=2",
        "trainer.save_steps=1",
        "trainer.per_device_train_batch_size=8",
        "trainer.num_generations=4",
        "trainer.max_completion_length=24",
        "eval.samples=1",
    ],
}
"""What makes a run short; the keys of a group that a test chooses itself are left out."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache of models for this test session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cli(cache, tmp_path, monkeypatch, capfd):
    """cli(*overrides) -> status, out, err, and the folder of runs."""
    monkeypatch.setenv("RLTOKEN_CACHE", str(cache))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        capfd.readouterr()
        GlobalHydra.instance().clear()
        train.STATUSES.clear()
        chosen = [group for group in TINY if not group or not any(item.startswith(group) for item in overrides)]
        arguments = ["rltoken.train", *(item for group in chosen for item in TINY[group]), *overrides]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as left:
            train.main()
        out, err = capfd.readouterr()
        return SimpleNamespace(status=left.value.code, out=out, err=err, runs=tmp_path / "runs")

    return call
