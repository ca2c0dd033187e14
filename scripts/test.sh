#!/usr/bin/env bash
# The second command: makes the environment, checks the style and runs the tests that are not slow.
# Arguments go to pytest: `scripts/test.sh tests/rewards -x`, `scripts/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/env.sh
echo "test: ruff check" >&2
.venv/bin/ruff check .
echo "test: pytest in two processes" >&2
exec .venv/bin/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile "$@"
