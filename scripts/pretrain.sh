#!/usr/bin/env bash
# Train stage 1: the projector and the tower's gate and projections learn from captions.
# Settings are environment variables: tove-llava launch --help. Arguments are flags of launch and of the trainer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
verb launch pretrain "$@"
