#!/usr/bin/env bash
# Train stage 2: the whole language model, projector and gate learn to follow instructions.
# Settings: scripts/lib.sh, and
#   STAGE1_DIR        the folder that stage 1 wrote                     (outputs/<preset>/pretrain)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
train finetune train_instruct.json --pretrained "${STAGE1_DIR:-outputs/$PRESET_NAME/pretrain}" "$@"
