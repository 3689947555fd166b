#!/usr/bin/env bash
# Everything that one GPU should show, for a GPU that is there for minutes. Each group takes under eight minutes:
#   bash benchmarks/gpu.sh a    # tests marked gpu, the tower with encoders side by side, the tower compiled
#   bash benchmarks/gpu.sh b    # training steps and memory, evaluation at 5 and 64 tokens, both stages and a chat answer
# Each part is a process with a time limit of its own. Results are written as they come, into OUTPUT/<part>/, and packed
# into OUTPUT/gpu-<group>.tar.gz after each part. The exit code is the number of parts that failed.
#
#   OUTPUT    folder of the results                                              (benchmarks/results/gpu)
#   DEVICE    cpu rehearses all parts at the size of the preset tiny              (cuda)
#   SITE      folder of packages to put in front, such as scripts/wheels.sh fills (none)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONPATH="${SITE:+$SITE:}$PWD${PYTHONPATH:+:$PYTHONPATH}"
output=${OUTPUT:-benchmarks/results/gpu} device=${DEVICE:-cuda} group=${1:-}
case $group in a | b) ;; *) echo "usage: bash benchmarks/gpu.sh a | b" >&2 && exit 2 ;; esac
git rev-parse HEAD >/dev/null 2>&1 || [ -n "${TOVE_COMMIT:-}" ] ||
    echo "gpu.sh: no git repository here: set TOVE_COMMIT to the commit, or the results say 'unknown'" >&2
mkdir -p "$output"
failed=0

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 code=0 start=$SECONDS folder=$output/$1
    shift 2
    mkdir -p "$folder"
    echo "== $SECONDS s: $name (at most $limit s): $*"
    timeout -k 5 "$limit" "$@" >"$folder/log.txt" 2>&1 || code=$?
    [ "$code" = 0 ] || failed=$((failed + 1))
    tail -n 4 "$folder/log.txt"
    printf '%s\t%s\t%s s\n' "$name" "$code" $((SECONDS - start)) | tee -a "$output/parts-$group.tsv"
    tar -czf "$output/gpu-$group.tar.gz" -C "$output" --exclude='*.tar.gz' .
}
bench() { # NAME SECONDS BENCHMARK ARGUMENTS...
    part "$1" "$2" python3 "benchmarks/$3.py" --device "$device" --output "$output/$1" --limit $(($2 - 25)) "${@:4}"
}

if [ "$device" = cuda ]; then
    tower=(--preset vicuna-7b --batch 32 --repeats 8)
    step=(--preset vicuna-7b --repeats 3 --mix-repeats 3)
    answers=(--preset vicuna-7b --questions 128 --batch 64 --repeats 2 --single 4)
    export SMOKE_STEPS=${SMOKE_STEPS:-60} SMOKE_SCENES=${SMOKE_SCENES:-400} SMOKE_QUESTIONS=${SMOKE_QUESTIONS:-60}
else
    tower=(--batch 4 --repeats 2) step=(--repeats 2 --mix-repeats 2 --mix-batches 1)
    answers=(--questions 12 --batch 4 --repeats 1 --single 2)
    export SMOKE_STEPS=2 SMOKE_SCENES=40 SMOKE_QUESTIONS=6
fi
: >"$output/parts-$group.tsv"
case $group in
a)
    part tests 140 python3 -m pytest -q -m "gpu and not slow" -p no:cacheprovider -rfE --tb=short \
        tests/test_tower_gpu.py tests/test_kernels.py tests/test_packing.py
    bench tower 130 tower "${tower[@]}" --executions concurrent
    bench tower-compiled 200 tower "${tower[@]}" --executions compiled
    ;;
b)
    bench step 190 train_step "${step[@]}" --parts stages,mix,clip
    bench qlora 60 train_step "${step[@]}" --parts qlora # a process of its own: it consumes the model
    bench answers-5 60 eval_throughput "${answers[@]}" --answer-tokens 5
    bench answers-64 70 eval_throughput "${answers[@]}" --answer-tokens 64
    part smoke 100 bash benchmarks/gpu_smoke.sh
    ;;
esac
echo "== $SECONDS s: $failed parts failed; results in $output, packed in $output/gpu-$group.tar.gz"
exit "$failed"
