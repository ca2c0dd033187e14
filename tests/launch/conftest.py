"""The fixtures of the command line's tests."""

from tests.cli.conftest import cache  # noqa: F401  (fixture)
