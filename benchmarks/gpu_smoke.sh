#!/usr/bin/env bash
# Everything once on one GPU, through the scripts that users run: scenes, stage 1, stage 2 with LoRA, evaluation, answers
# in the terminal and from the demo's server. Ends with 0 when each step did its work; under 9 minutes. Works without
# DeepSpeed and bitsandbytes, without an installed package (Python of the environment, or .venv), and without a GPU.
#
#   SMOKE_STEPS      training steps of each stage           (150)
#   SMOKE_SCENES     scenes to train on                     (1200)
#   SMOKE_QUESTIONS  questions to evaluate on               (200)
#   SMOKE_DIR        keep the models and the scenes there   (a temporary folder, removed in the end)
#   PRESET, LAUNCHER, DEEPSPEED_CONFIG, NUM_GPUS            as in 'tove-llava launch --help'; one process by default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PRESET=${PRESET:-tiny} NUM_GPUS=${NUM_GPUS:-1}
steps=${SMOKE_STEPS:-150}

folder=${SMOKE_DIR:-$(mktemp -d)}
server=
finish() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    [ -n "${SMOKE_DIR:-}" ] || rm -rf "$folder"
}
trap finish EXIT

say() { echo "== $SECONDS s: $*"; }
has() { python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

if [ -z "${DEEPSPEED_CONFIG:-}" ] && ! has deepspeed; then
    say "deepspeed is not installed here: DEEPSPEED_CONFIG=none"
    export DEEPSPEED_CONFIG=none
fi
python3 -c "import torch; print('device:', torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU, CPU')"

say "scenes"
scenes=$folder/scenes
python3 -m tove_llava scenes --out "$scenes" --train "${SMOKE_SCENES:-1200}" --val 40 --seed 0
export IMAGE_FOLDER=$scenes/images

say "stage 1: alignment, $steps steps"
OUTPUT_DIR=$folder/pretrain DATA_PATH=$scenes/train_captions.json bash scripts/pretrain.sh \
    --max_steps "$steps" --report_to none
say "stage 2: LoRA, $steps steps"
STAGE1_DIR=$folder/pretrain OUTPUT_DIR=$folder/model DATA_PATH=$scenes/train_instruct.json bash scripts/finetune_lora.sh \
    --max_steps "$steps" --report_to none

say "evaluation"
bash eval/scenes.sh "$folder/model" --data-root "$scenes" --limit "${SMOKE_QUESTIONS:-200}" --batch-size 32
bash eval/pope.sh "$folder/model" --data-root "$scenes" --limit "${SMOKE_QUESTIONS:-200}" --batch-size 32

say "an answer in the terminal"
pictures=("$scenes"/images/val_*)
python3 -m tove_llava chat --model "$folder/model" --image "${pictures[0]}" --question "What is in the picture?" --json \
    --max-new-tokens 32

if has gradio && has gradio_client; then
    say "an answer from the demo"
    port=$(python3 -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
    python3 -m tove_llava.serve.gradio_app --model "$folder/model" --port "$port" --max-new-tokens 32 &
    server=$!
    python3 benchmarks/ask_demo.py "http://127.0.0.1:$port" "${pictures[0]}" "What is in the picture?"
else
    say "gradio is not installed here: the demo's page is left out (its answers come from the engine of the terminal)"
fi
say "done: trained, evaluated and answered"
