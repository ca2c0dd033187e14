"""The tiny random model and the trainer of tests/trl."""

from tests.trl.conftest import run, tiny

__all__ = ["run", "tiny"]
