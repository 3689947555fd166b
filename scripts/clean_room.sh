#!/usr/bin/env bash
# Test exported folders in an environment of only torch, transformers and pillow: make it, then compare there the results
# of both export formats and of merged models with those of the original models.
#   bash scripts/clean_room.sh [flags of pytest]
#     ENVIRONMENT=DIR      keeps the environment in this folder and reuses it
#     TRANSFORMERS=4.57.6  instead of the version of constraints.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

environment=${ENVIRONMENT:-$(mktemp -d)}
[ -n "${ENVIRONMENT:-}" ] || trap 'rm -rf "$environment"' EXIT
[ -x "$environment/bin/python" ] || .venv/bin/python -m venv "$environment"
"$environment/bin/python" -m pip install --disable-pip-version-check -q -c constraints.txt torch transformers pillow
[ -z "${TRANSFORMERS:-}" ] || "$environment/bin/python" -m pip install -q "transformers==$TRANSFORMERS"
export TOVE_CLEAN_PYTHON=$environment/bin/python
# -rP shows the output of tests that passed: versions, and differences of logits.
.venv/bin/python -m pytest -q -rP -m slow -k environment_of_its_own \
    tests/test_export.py tests/test_export_remote_code.py tests/test_merge.py "$@"
