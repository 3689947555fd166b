#!/usr/bin/env bash
# Train stage 2 with a language model in 4 bits (NF4; --bits 8 for 8). Projector, gate and adapters train.
# Settings: scripts/lib.sh (DEEPSPEED_CONFIG: zero2 or none), and
#   STAGE1_DIR        the folder that stage 1 wrote                     (outputs/<preset>/pretrain)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
train finetune_qlora train_instruct.json --pretrained "${STAGE1_DIR:-outputs/$PRESET_NAME/pretrain}" "$@"
