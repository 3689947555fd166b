#!/usr/bin/env bash
# bash eval/all.sh MODEL_DIR [flags of 'tove-llava eval']
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)" -m tove_llava eval --benchmark all --model "${1:?usage: bash eval/all.sh MODEL_DIR}" "${@:2}"
