"""The tiny random model and the trainer of tests/trl, and the entry point of tests/cli."""

from tests.cli.conftest import cache, cli
from tests.trl.conftest import run, tiny

__all__ = ["cache", "cli", "run", "tiny"]
