#!/usr/bin/env bash
# The paper's claims in miniature: trains, evaluates, and writes docs/background/claims.md. Resumable.
#   bash playground/claims.sh [--claims a,c,f | all] [--seeds 5] [--workers N] [--out outputs/claims]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
exec python playground/claims/run.py "$@"
