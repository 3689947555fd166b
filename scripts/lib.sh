# Start one training stage; the training scripts read this file. Settings are environment variables:
#
#   PRESET            name of a preset or a .yaml file                                     (tiny)
#   OUTPUT_DIR        folder of the run; the same command resumes or reuses what is in it  (outputs/<preset>/<stage>)
#   DATA_PATH         LLaVA records, .json or .jsonl                                       (playground scenes)
#   IMAGE_FOLDER      folder that the records' image paths are relative to                 (playground scenes)
#   NUM_GPUS          processes on each node         (all GPUs; without any, 2 or the number of cores)
#   HOSTFILE          DeepSpeed hostfile, for several nodes that share a file system
#   DEEPSPEED_CONFIG  zero2, zero3, zero3_offload, none, or a .json file                   (the preset's)
#   LAUNCHER          deepspeed, or torchrun where DeepSpeed is not installed              (deepspeed)
#
# All further arguments are flags of the trainer: bash scripts/pretrain.sh --max_steps 10 --set vision.top_k=2

[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
PRESET=${PRESET:-tiny}
PRESET_NAME=$(basename "$PRESET" .yaml)

count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '[0-9A-Za-z]' || true
    else
        (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true
    fi
}

# train STAGE DEFAULT_RECORDS [flags]
train() {
    local stage=$1 records=$2 gpus cores launcher=${LAUNCHER:-deepspeed}
    shift 2
    gpus=$(count_gpus)
    cores=$(nproc)
    if [ "$gpus" -eq 0 ]; then
        export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} CUDA_VISIBLE_DEVICES=
        NUM_GPUS=${NUM_GPUS:-$((cores < 2 ? cores : 2))}
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / NUM_GPUS > 0 ? cores / NUM_GPUS : 1))}
    fi
    NUM_GPUS=${NUM_GPUS:-$gpus}
    set -- --preset "$PRESET" --stage "$stage" \
        --output_dir "${OUTPUT_DIR:-outputs/$PRESET_NAME/$stage}" \
        --data_path "${DATA_PATH:-playground/data/scenes/$records}" \
        --image_folder "${IMAGE_FOLDER:-playground/data/scenes/images}" \
        ${DEEPSPEED_CONFIG:+--deepspeed "$DEEPSPEED_CONFIG"} "$@"
    if ! command -v "$launcher" >/dev/null; then
        echo "$launcher is not installed. Install it with: pip install deepspeed (or: bash scripts/setup.sh)." >&2
        echo "To train without DeepSpeed: LAUNCHER=torchrun DEEPSPEED_CONFIG=none bash $0" >&2
        exit 2
    fi
    case $launcher in
    deepspeed)
        if [ -n "${HOSTFILE:-}" ]; then
            exec deepspeed --quiet --hostfile "$HOSTFILE" --num_gpus "$NUM_GPUS" --no_local_rank \
                --module tove_llava.train.run "$@"
        fi
        exec deepspeed --quiet --num_gpus "$NUM_GPUS" --master_port "${MASTER_PORT:-$((20000 + RANDOM % 20000))}" \
            --no_local_rank --module tove_llava.train.run "$@"
        ;;
    torchrun)
        exec torchrun --standalone --nproc_per_node "$NUM_GPUS" -m tove_llava.train.run "$@"
        ;;
    *)
        echo "LAUNCHER=$launcher is unknown; use deepspeed or torchrun" >&2
        exit 2
        ;;
    esac
}
