#!/usr/bin/env bash
# CLIP alone against ToVE: the same parts, data, steps and seeds; mean and spread per question type. Resumable.
#   bash playground/compare.sh [--seeds 0 1 2] [--train 4000] [--out outputs/compare]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
exec python playground/compare.py "$@"
