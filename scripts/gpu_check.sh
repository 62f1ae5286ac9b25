#!/usr/bin/env bash
# Proves the project on one GPU: tests, speed, memory, data and every method. At most 9 minutes, 4 for each part.
#   bash scripts/gpu_check.sh                       everything, into results/gpu_check
#   bash scripts/gpu_check.sh --part 2              tests and step (1), data (2) or methods (3) alone
#   bash scripts/gpu_check.sh --rehearse            toy sizes, on a CPU too, two minutes
#   ALICE_VENV=current bash scripts/gpu_check.sh    with the python that is there, nothing is installed
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

exec python -m benchmarks.gpu_check "$@"
