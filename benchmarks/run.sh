#!/usr/bin/env bash
# All benchmarks of one kind of machine, at the sizes that their tables are committed with; results go to
# benchmarks/results/ (or $OUTPUT). Each kind takes under nine minutes.
#   bash benchmarks/run.sh cpu | gpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
output=${OUTPUT:-benchmarks/results}

bench() {
    echo "== $SECONDS s: $*"
    python3 "benchmarks/$1.py" --output "$output" "${@:2}"
}

case ${1:-} in
cpu)
    bench tower
    bench detached
    bench train_step
    bench data_path --tokenizer "${LLAVA_TOKENIZER:-bundled:llm}" # LLAVA_SRC, LLAVA_PYTHON: see data_path.py
    bench data_wait --repeats 2
    bench eval_throughput
    bench serve_load
    bench cached_features --repeats 2
    bench scaling --repeats 2
    bench startup
    ;;
gpu)
    bench tower --device cuda --preset vicuna-7b --batch 32
    bench detached --device cuda --preset vicuna-7b --batch 32
    bench train_step --device cuda --preset vicuna-7b --repeats 8
    bench eval_throughput --device cuda --preset vicuna-7b --questions 128 --batch 64
    ;;
*)
    echo "usage: bash benchmarks/run.sh cpu | gpu" >&2
    exit 2
    ;;
esac
bench summary
echo "== $SECONDS s: done; tables in $output"
