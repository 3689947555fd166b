#!/usr/bin/env bash
# bash eval/mmmu_pro.sh MODEL_DIR [flags of 'tove-llava eval']
set -euo pipefail
PYTHON="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python"
[ -x "$PYTHON" ] || PYTHON=python3
exec "$PYTHON" -m tove_llava eval --benchmark mmmu_pro --model "${1:?usage: bash eval/mmmu_pro.sh MODEL_DIR}" "${@:2}"
