#!/usr/bin/env bash
# bash eval/infovqa.sh MODEL_DIR [flags of 'tove-llava eval']
set -euo pipefail
PYTHON="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python"
[ -x "$PYTHON" ] || PYTHON=python3
exec "$PYTHON" -m tove_llava eval --benchmark infovqa --model "${1:?usage: bash eval/infovqa.sh MODEL_DIR}" "${@:2}"
