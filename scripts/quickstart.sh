#!/usr/bin/env bash
# Train a ToVE-LLaVA from a fresh clone and score it, without a GPU. Settings: tove-llava quickstart --help.
set -euo pipefail
bash "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
verb quickstart "$@"
