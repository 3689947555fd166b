#!/usr/bin/env bash
# All benchmarks of the CPU, at the sizes that their tables are committed with, in under nine minutes; or both groups of
# gpu.sh, in under 16. Results go to benchmarks/results/ (or $OUTPUT). After a failure the others still run; the exit code
# is the first failure's, and SUMMARY.md says what was not measured and why.
#   bash benchmarks/run.sh cpu | gpu
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
output=${OUTPUT:-benchmarks/results}
codes=() first=0

bench() {
    local code=0
    echo "== $SECONDS s: $*"
    python3 "benchmarks/$1.py" --output "$output" "${@:2}" || code=$?
    codes+=("$1=$code")
    [ "$first" -ne 0 ] || first=$code
}

case ${1:-} in
cpu)
    bench tower
    bench detached
    bench train_step
    bench data_path --tokenizer "${LLAVA_TOKENIZER:-bundled:llm}" # LLAVA_SRC, LLAVA_PYTHON: see data_path.py
    bench data_wait --repeats 2
    bench eval_throughput --repeats 3
    bench serve_load
    bench cached_features --repeats 2
    bench scaling --repeats 2
    bench startup
    ;;
gpu)
    for group in a b; do
        code=0
        OUTPUT="$output/gpu" bash benchmarks/gpu.sh "$group" || code=$?
        codes+=("gpu-$group=$code")
        [ "$first" -ne 0 ] || first=$code
    done
    ;;
*)
    echo "usage: bash benchmarks/run.sh cpu | gpu" >&2
    exit 2
    ;;
esac
python3 benchmarks/summary.py --output "$output" --run "$1" --seconds "$SECONDS" --codes "${codes[@]}" || {
    code=$?
    [ "$first" -ne 0 ] || first=$code
}
echo "== $SECONDS s: done; tables in $output"
exit "$first"
