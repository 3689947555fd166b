#!/usr/bin/env bash
# Stage 1, alignment: the projector and the tower's gate and projections learn from captions. Settings: scripts/lib.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
train pretrain train_captions.json "$@"
