#!/usr/bin/env bash
# The project's tests, from nothing: makes the environment when it is missing, lints, checks the format, runs pytest.
#   bash scripts/test.sh                 everything (CPU, offline, a quarter of an hour on 2 cores)
#   bash scripts/test.sh -k volume_store further words go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

ruff check .
ruff format --check .
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # deterministic matrix products where a GPU runs the tests
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # a process a core, not a thread of every process on every core
python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
