#!/usr/bin/env bash
# Collect the wheels that a plain GPU image lacks, for a machine that no registry reaches. The image is thought to have
# Python 3.12, torch, triton, timm, peft and accelerate.
#   bash scripts/wheels.sh [DIR]        # default: .whl; downloads what is missing there
# There, in the clone:
#   python3 -m pip install --no-index --no-deps --no-compile --target SITE DIR/*.whl && SITE=SITE bash benchmarks/gpu.sh a
#
#   PACKAGES     what is fetched
#   PYTHON, CUDA the image's versions (3.12 and 130); of bitsandbytes only the library of that CUDA is kept
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
folder=${1:-.whl} python=${PYTHON:-3.12} cuda=${CUDA:-130}
packages=${PACKAGES:-transformers kornia kornia-rs open_clip_torch ftfy wcwidth liger-kernel gguf bitsandbytes}
platforms=()
for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
mkdir -p "$folder"
for name in $packages; do
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
        "${platforms[@]}" --platform manylinux2014_x86_64 --platform any -c constraints.txt -d "$folder" "$name"
done
python3 - "$folder" "$cuda" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path

folder, cuda = Path(sys.argv[1]), sys.argv[2]
for wheel in folder.glob("bitsandbytes-*.whl"):
    spare = re.compile(rf"libbitsandbytes_(?!cuda{cuda}\.so|cpu\.so)\w+\.so")
    with zipfile.ZipFile(wheel) as whole:
        names = [name for name in whole.namelist() if not spare.search(name)]
        if not any(f"cuda{cuda}." in name for name in names):
            raise SystemExit(f"{wheel} has no library for CUDA {cuda}; give another CUDA or leave bitsandbytes out")
        smaller = wheel.with_suffix(".part")
        with zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as kept:
            for name in names:
                data = whole.read(name)
                if name.endswith("/RECORD"):
                    data = b"".join(line for line in data.splitlines(True) if not spare.search(line.decode()))
                kept.writestr(name, data)
    smaller.replace(wheel)
PYTHON
du -ch "$folder"/*.whl
