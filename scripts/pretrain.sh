#!/usr/bin/env bash
# Train stage 1: the projector and the tower's gate and projections learn from captions. Settings: scripts/lib.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
train pretrain train_captions.json "$@"
