#!/usr/bin/env bash
# Set up .venv and run the tests. Arguments go to pytest: bash scripts/test.sh -m slow tests/test_eval.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
case " $* " in *slow*) bash scripts/browser.sh ;; esac

exec .venv/bin/python -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile -q "$@"
