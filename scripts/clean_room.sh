#!/usr/bin/env bash
# Exported folders where there is nothing but torch, transformers and pillow: makes such an environment and compares
# there what both export formats and merged models compute with the models that they were made of.
#   bash scripts/clean_room.sh [flags of pytest]
#     ENVIRONMENT=DIR      keeps the environment there and uses it again
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
# -rP shows what a test that passed has printed: versions, and by how much logits differ.
.venv/bin/python -m pytest -q -rP -m slow -k environment_of_its_own \
    tests/test_export.py tests/test_export_remote_code.py tests/test_merge.py "$@"
