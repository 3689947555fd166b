#!/usr/bin/env bash
# bash eval/chartqa.sh MODEL_DIR [flags of 'tove-llava eval']
set -euo pipefail
PYTHON="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python"
[ -x "$PYTHON" ] || PYTHON=python3
exec "$PYTHON" -m tove_llava eval --benchmark chartqa --model "${1:?usage: bash eval/chartqa.sh MODEL_DIR}" "${@:2}"
