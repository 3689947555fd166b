#!/usr/bin/env bash
# Plain CLIP against ToVE: the same parts, data, steps and seeds; mean and spread per question type. Resumable, and shares its
# runs with playground/claims.sh.
#   bash playground/compare.sh [--seeds 5] [--train 2400] [--workers N] [--out outputs/claims]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
exec python playground/claims/run.py --arms clip tove --report playground/compare.md "$@"
