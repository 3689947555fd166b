#!/usr/bin/env bash
# Train stage 2: the whole language model, projector and gate learn to follow instructions.
# Settings are environment variables: tove-llava launch --help. Arguments are flags of launch and of the trainer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
verb launch finetune "$@"
