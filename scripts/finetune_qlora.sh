#!/usr/bin/env bash
# Train stage 2 with a language model in 4 bits (NF4; --bits 8 for 8). Projector, gate and adapters train.
# Settings are environment variables: tove-llava launch --help. Arguments are flags of launch and of the trainer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
verb launch finetune_qlora "$@"
