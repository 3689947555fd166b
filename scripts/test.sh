#!/usr/bin/env bash
# Sets up .venv and runs the tests. Arguments go to pytest: bash scripts/test.sh -m slow tests/test_eval.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

# One thread for each of pytest's processes: the models are tiny, and threads would fight over the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile -q "$@"
