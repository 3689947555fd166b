#!/usr/bin/env bash
# Train a ToVE-LLaVA from a fresh clone and score it, without a GPU: set-up, playground scenes, both training stages
# under deepspeed, evaluation on held-out scenes. Run again, it reuses what is done.
#
#   QUICKSTART_DIR        where the models go             (outputs/quickstart)
#   QUICKSTART_SCENES     where the scenes go             (playground/data/scenes)
#   QUICKSTART_TRAIN      scenes to train on              (8000)
#   QUICKSTART_VAL        scenes to evaluate on           (300)
#   QUICKSTART_STEPS      most steps of a stage           (one pass over the data)
#   QUICKSTART_QUESTIONS  questions to evaluate on        (1500)
#   PRESET                another preset                  (tiny)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false

OUT=${QUICKSTART_DIR:-outputs/quickstart}
SCENES=${QUICKSTART_SCENES:-playground/data/scenes}
STEPS=${QUICKSTART_STEPS:+--max_steps $QUICKSTART_STEPS}
export PRESET=${PRESET:-tiny} IMAGE_FOLDER=$SCENES/images

echo "1/4 scenes"
tove-llava scenes --out "$SCENES" --train "${QUICKSTART_TRAIN:-8000}" --val "${QUICKSTART_VAL:-300}" --seed 0
echo "2/4 alignment: the projector and the tower's gate learn to describe scenes"
OUTPUT_DIR=$OUT/pretrain DATA_PATH=$SCENES/train_captions.json bash scripts/pretrain.sh $STEPS
echo "3/4 instruction tuning: LoRA on the language model"
STAGE1_DIR=$OUT/pretrain OUTPUT_DIR=$OUT/model DATA_PATH=$SCENES/train_instruct.json \
    bash scripts/finetune_lora.sh $STEPS
echo "4/4 evaluation on held-out scenes"
tove-llava eval --model "$OUT/model" --benchmark scenes --data-root "$SCENES" \
    --conditions blank,detached,full --batch-size 64 --limit "${QUICKSTART_QUESTIONS:-1500}"

images=("$SCENES"/images/val_*)
cat <<END

model:    $OUT/model
terminal: .venv/bin/tove-llava chat --model $OUT/model --image ${images[0]}
browser:  .venv/bin/python -m tove_llava.serve.gradio_app --model $OUT/model
END
