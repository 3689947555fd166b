#!/usr/bin/env bash
# Bring Chromium for the demo's tests where a package manager can: apt as root, else playwright's own download.
# Without it these tests skip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
LOG=.venv/browser.log

is_here() {
    .venv/bin/python - 2>/dev/null <<'END'
import sys
sys.path[:0] = ["tests"]
from browser import chromium
sys.exit(chromium() is None)
END
}

bring() {
    if [ "$(id -u)" -eq 0 ] && command -v apt-get; then
        export DEBIAN_FRONTEND=noninteractive
        timeout 300 apt-get install -y --no-install-recommends chromium && return
        timeout 120 apt-get update && timeout 300 apt-get install -y --no-install-recommends chromium && return
    fi
    timeout 300 .venv/bin/python -m playwright install chromium
}

if is_here; then exit 0; fi
echo "browser: bringing Chromium for the demo's tests (log in $LOG)"
bring >"$LOG" 2>&1 || true
is_here || echo "browser: no Chromium could be installed; the demo's browser tests skip (apt-get install chromium)"
