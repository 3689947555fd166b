#!/usr/bin/env bash
# Make .venv with the package and all its extras, unless that is done already.
#   PYTHON=python3.12 bash scripts/setup.sh      another interpreter (3.10 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
LOG=.venv/install.log
STAMP=.venv/installed
"$PYTHON" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
    echo "setup: $PYTHON is not Python 3.10 or newer with the venv module." >&2
    echo "       On Debian or Ubuntu: apt-get install python3-venv. Another interpreter: PYTHON=python3.12 bash $0" >&2
    exit 2
}

[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
wanted=$(cat pyproject.toml constraints.txt | sha256sum)
if [ "$wanted" = "$(cat "$STAMP" 2>/dev/null || true)" ]; then
    exit 0
fi

echo "setup: installing into .venv (2 to 10 minutes; log in $LOG)"
if ! .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[all]' >"$LOG" 2>&1; then
    grep -v '^WARNING: Location' "$LOG" | tail -n 30 >&2
    echo "setup: the installation failed; the whole log is in $LOG" >&2
    exit 1
fi
echo "$wanted" >"$STAMP"
echo "setup: done in $SECONDS s"
