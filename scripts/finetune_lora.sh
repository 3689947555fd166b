#!/usr/bin/env bash
# Train stage 2 with LoRA on the language model, projector and gate.
# Settings are environment variables: tove-llava launch --help. Arguments are flags of launch and of the trainer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
verb launch finetune_lora "$@"
