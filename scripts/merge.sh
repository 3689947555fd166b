#!/usr/bin/env bash
# Merge a model's experts into one CLIP (ToVE-lite). Settings: scripts/lib.sh, and
#   MODEL_DIR         the model: what stage 2 wrote, or stage 1 (then the merge takes stage 2's place)
#                     (outputs/<preset>/finetune_lora); PRESET has to be the one that it was trained with
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
train merge train_instruct.json --pretrained "${MODEL_DIR:-outputs/$PRESET_NAME/finetune_lora}" "$@"
