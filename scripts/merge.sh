#!/usr/bin/env bash
# Merge a model's experts into one CLIP (ToVE-lite). PRESET has to be the one that MODEL_DIR was trained with.
# Settings are environment variables: tove-llava launch --help. Arguments are flags of launch and of the trainer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
verb launch merge "$@"
