"""Checkpoints as training under DeepSpeed writes them: their size, and the time to write, to resume and to load.

Of each stage of the preset, trained for a few steps on generated scenes by one process under the stage's DeepSpeed
configuration: the size of a checkpoint to resume from and the time to write it; the time to the first step of a new run
and of one that resumes; the size of the finished model's folder and the time to load it. The sizes are counted from
parameters too, and so are those of another preset (--count), of which nothing is built but empty tensors.

    python benchmarks/checkpoints.py
    python benchmarks/checkpoints.py --stages pretrain --count vicuna-13b
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import MB, Bench, argument_parser, circumstances, run_command, spread, table, write_results
from scaling import LaunchError, environment, free_port, make_scenes, records_of, spelled_out

from tove_llava.errors import ConfigError
from tove_llava.llava.build import torch_dtype
from tove_llava.presets import Preset, load_preset
from tove_llava.train.shapes import stage_shape

ROOT = Path(__file__).resolve().parents[1]
MASTER_AND_MOMENTS = 12  # bytes a trained parameter: DeepSpeed's float32 copy and AdamW's two moments


def measure_stages(bench: Bench, stages: Sequence[str], root: Path) -> dict[str, dict[str, Any]]:
    """Each stage's checkpoints, measured in one further process; all but the first stage start from its result."""
    scenes = root / "scenes"
    make_scenes(scenes, 32, bench.args.seed)
    arguments = {}
    for stage in stages:
        arguments[stage] = [
            *spelled_out(bench, stage), "--data_path", str(records_of(bench, stage, scenes)),
            "--image_folder", str(scenes / "images"),
        ]  # fmt: skip
        if stage != stages[0]:
            arguments[stage] += ["--pretrained", str(root / stages[0] / "run")]
    plan = root / "plan.json"
    plan.write_text(json.dumps({"stages": arguments, "folder": str(root), "repeats": bench.args.repeats}))
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}  # as a launcher says it
    done = subprocess.run(
        [sys.executable, "-m", "checkpoints_worker", str(plan)],
        env=environment() | threads | alone | {"MASTER_PORT": str(free_port())},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise LaunchError(f"{', '.join(stages)}: exit code {done.returncode}, and last:\n{done.stdout[-3000:]}")
    rows = {}
    for stage, result in json.loads((root / "result.json").read_text()).items():
        files = {name: result[f"{name}_bytes"] for name in ("checkpoint", "folder")}
        rows[stage] = {
            **{f"{name}_bytes": sum(sizes.values()) for name, sizes in files.items()},
            "files": files,
            **{f"{name}_seconds": spread(result[name]) for name in ("start", "write", "resume", "load")},
            "counted": counted(bench.preset, stage),
        }
    return rows


def counted(preset: Preset, stage: str) -> dict[str, Any]:
    """Bytes of a stage's tensors on the disk, from parameter counts.

    The folder holds what trained, and a checkpoint that, too, with the optimiser's state; ZeRO-2 writes the trained
    weights once more. Frozen weights are in neither.
    """
    size, settings = torch_dtype(preset.language.dtype).itemsize, preset.stage(stage)
    trained = stage_shape(preset, stage).trained
    copies = 2 if settings.deepspeed == "zero2" else 1
    return {
        "trained_parameters": trained,
        "deepspeed": settings.deepspeed,
        "folder_bytes": size * trained,
        "checkpoint_bytes": (copies * size + MASTER_AND_MOMENTS) * trained,
    }


def benchmark(bench: Bench) -> None:
    args = bench.args
    if args.device == "cuda" or args.dtype or args.weights or args.warmup != 1:
        refused = "no --device cuda, --dtype, --weights or --warmup"
        raise ConfigError(f"this benchmark trains on the CPU as the preset says: {refused}")
    stages = args.stages.split(",")
    for stage in stages:
        bench.preset.stage(stage)
    other = load_preset(args.count)
    record = bench.record("checkpoints", "source", stages=args.stages, count=args.count)
    with tempfile.TemporaryDirectory() as folder:
        record["stages"] = measure_stages(bench, stages, Path(folder))
    record["counted"] = {
        "preset": other.name,
        "dtype": other.language.dtype,
        "stages": {name: counted(other, name) for name in other.stages},
    }
    record["targets"] = []
    write_results(args.output, record, render(record))


def render(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    stages = [
        [
            name,
            f"{row['checkpoint_bytes'] / MB:.1f}",
            f"{row['counted']['checkpoint_bytes'] / MB:.1f}",
            *(f"{row[f'{what}_seconds']['median']:.3f}" for what in ("write", "start", "resume")),
            f"{row['folder_bytes'] / MB:.1f}",
            f"{row['load_seconds']['median']:.3f}",
        ]
        for name, row in record["stages"].items()
    ]
    header = ["stage", "checkpoint MB", "by count", "write s", "start s", "resume s", "model folder MB", "load s"]
    other = record["counted"]
    paper = [
        [
            name,
            str(row["deepspeed"]),
            f"{row['trained_parameters'] / 1e6:,.1f}",
            f"{row['checkpoint_bytes'] / MB:,.0f}",
            f"{row['folder_bytes'] / MB:,.0f}",
        ]
        for name, row in other["stages"].items()
    ]
    return "\n\n".join(
        [
            "# Checkpoints, resuming, loading",
            circumstances(record),
            f"## Stages of `{record['preset']}`",
            table(header, stages),
            "A *checkpoint* is what a run resumes from: trained weights, optimiser, schedule, random state; it is "
            "flushed to the disk. *Start* and *resume* are the time to the first step, in a process that has imported "
            "its libraries: of a new run, and of one that continues from a checkpoint. The *model folder* refers to "
            "frozen weights by their source, and *load* reads these too. *By count* are tensors alone, no tokenizer, "
            "configuration or script.",
            f"## Stages of `{other['preset']}`, by count",
            table(["stage", "DeepSpeed", "trained millions", "checkpoint MB", "model folder MB"], paper),
            f"Parameters counted on empty tensors; weights in {other['dtype']}, DeepSpeed's copy and AdamW's moments "
            "in float32. On several ranks each writes its share of these.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.set_defaults(repeats=2, warmup=1, batch=None)
    parser.add_argument(
        "--stages",
        default="pretrain,finetune_lora,finetune",
        metavar="A,B",
        help="of the preset; each but the first starts from the first's result (default: %(default)s)",
    )
    parser.add_argument("--count", default="vicuna-7b", metavar="PRESET", help="counted only (default: vicuna-7b)")
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
