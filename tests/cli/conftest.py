"""A warm start of a few steps in a cache of its own, and the entry point called in this process."""

import sys
from types import SimpleNamespace

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra

from rltoken import cli as entry
from rltoken import evaluate, star, train

TINY = {
    "model=": ["model.source.steps=2"],
    "data=": ["data.train.n=32", "data.eval.n=4"],
    "": [
        "trainer.max_steps=2",
        "trainer.save_steps=1",
        "trainer.per_device_train_batch_size=8",
        "trainer.num_generations=4",
        "trainer.max_completion_length=24",
        "rollout.max_thinking_tokens=16",
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
    """cli(*overrides), cli.evaluate(...), cli.star(...) -> status, out, err, the runs' folder, working directory."""
    monkeypatch.setenv("RLTOKEN_CACHE", str(cache))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    # Hydra composes everything once more to learn from a key of its own whether this is a sweep; half of the time of
    # many tests. None is its word for: as the command line says.
    monkeypatch.setattr(Hydra, "get_mode", lambda *args, **settings: None)

    def run(program, name, arguments):
        capfd.readouterr()
        GlobalHydra.instance().clear()
        entry.STATUSES.clear()
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as left:
            program.main()
        out, err = capfd.readouterr()
        return SimpleNamespace(status=left.value.code, out=out, err=err, runs=tmp_path / "runs", cwd=tmp_path)

    def call(*overrides, exp="+exp=grpo"):
        chosen = [group for group in TINY if not group or not any(item.startswith(group) for item in overrides)]
        method = [] if exp is None or any("exp=" in item for item in overrides) else [exp]
        return run(train, "rltoken.train", [*method, *(item for group in chosen for item in TINY[group]), *overrides])

    call.evaluate = lambda *overrides: run(evaluate, "rltoken.evaluate", overrides)
    call.star = lambda *overrides: run(star, "rltoken.star", overrides)
    return call
