#!/usr/bin/env bash
# Train stage 2 with LoRA on the language model, projector and gate. Settings: scripts/lib.sh, and
#   STAGE1_DIR        the folder that stage 1 wrote                     (outputs/<preset>/pretrain)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
train finetune_lora train_instruct.json --pretrained "${STAGE1_DIR:-outputs/$PRESET_NAME/pretrain}" "$@"
