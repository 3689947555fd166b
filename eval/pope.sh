#!/usr/bin/env bash
# bash eval/pope.sh MODEL_DIR [flags of 'tove-llava eval']
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)" -m tove_llava eval --benchmark pope --model "${1:?usage: bash eval/pope.sh MODEL_DIR}" "${@:2}"
