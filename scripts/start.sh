#!/usr/bin/env bash
# The first command: makes the environment and trains the embedded tiny model by BRPO, with an evaluation before and after.
# Settings are passed on: `scripts/start.sh trainer.max_steps=20 name=shorter`. Stopped half-way, it goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/env.sh
# The tiny model is fastest on one thread, and two jobs that share two cores would crawl on more.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m rltoken.train +exp=brpo name=first-run resume=auto "$@"
