#!/usr/bin/env bash
# Makes .venv-vllm and runs the tests that need a real vLLM (minutes); a test that skips itself is an error here.
# Arguments go to pytest: `scripts/test_vllm.sh -x -k stale`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup_vllm_cpu.sh
RLTOKEN_REQUIRE_VLLM=1 exec .venv-vllm/bin/python -m pytest tests/vllm "$@"
