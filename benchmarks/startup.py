"""What stands around the work: importing, the command line's first words, checkpoints, resuming, loading.

- ``import tove_llava`` and ``tove-llava --help``, each in a fresh process.
- Of each stage of the preset, trained for a few steps on generated scenes by one process under the stage's DeepSpeed
  configuration: the size of a checkpoint to resume from and the time to write it; the time to the first step of a new
  run and of one that resumes; the size of the finished model's folder and the time to load it.
- The sizes of another preset's checkpoints (--count, vicuna-7b) from parameter counts: nothing of it is built but empty
  tensors. The same count is made for the measured stages, and stands beside what was measured.

    python benchmarks/startup.py
    python benchmarks/startup.py --stages pretrain --count vicuna-13b
"""

import json
import os
import subprocess
import sys
import tempfile
import time
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
TARGETS = {"import": 0.3, "help": 0.5}
PROGRAMS = {
    "interpreter": "pass",
    "import": "import tove_llava",
    "help": "import sys; from tove_llava.cli import main; sys.argv[1:] = ['--help']; sys.exit(main())",
}
TITLES = {
    "interpreter": "Python alone",
    "import": "`import tove_llava`, Python's own start not counted",
    "help": "`tove-llava --help`, the whole process",
}
MASTER_AND_MOMENTS = 12  # bytes a trained parameter: DeepSpeed's float32 copy and AdamW's two moments


def start_times(repeats: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each program in fresh processes, in turn, after rounds that fill the caches.

    The import is timed inside its process, the others from outside.
    """
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for repeat in range(-warmup, repeats):
        for name, code in PROGRAMS.items():
            program = code
            if name == "import":
                program = f"import time; began = time.perf_counter(); {code}; print(time.perf_counter() - began)"
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True
            )
            took = time.perf_counter() - began
            if done.returncode:
                raise LaunchError(f"{code}: exit code {done.returncode}\n{done.stderr[-2000:]}")
            if repeat >= 0:
                times[name].append(float(done.stdout.split()[-1]) if name == "import" else took)
    return times


def measure_stage(bench: Bench, stage: str, scenes: Path, folder: Path, pretrained: Path | None) -> dict[str, Any]:
    """A stage's checkpoints, measured by a process of their own."""
    folder.mkdir()
    arguments = [
        *spelled_out(bench, stage), "--data_path", str(records_of(bench, stage, scenes)),
        "--image_folder", str(scenes / "images"),
    ]  # fmt: skip
    if pretrained is not None:
        arguments += ["--pretrained", str(pretrained)]
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"arguments": arguments, "folder": str(folder), "repeats": bench.args.resumes}))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", "startup_worker", str(plan)],
        env=environment() | alone | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": str(os.cpu_count() or 1)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise LaunchError(f"stage {stage}: exit code {done.returncode}, and last:\n{done.stdout[-3000:]}")
    result = json.loads((folder / "result.json").read_text())
    row = {f"{name}_bytes": sum(result[f"{name}_bytes"].values()) for name in ("checkpoint", "folder")}
    row["files"] = {name: result[f"{name}_bytes"] for name in ("checkpoint", "folder")}
    return row | {f"{name}_seconds": spread(result[name]) for name in ("start", "write", "resume", "load")}


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
    if args.device == "cuda" or args.dtype or args.weights:
        refused = "no --device cuda, --dtype or --weights"
        raise ConfigError(f"this benchmark trains on the CPU as the preset says: {refused}")
    if args.resumes < 1:
        raise ConfigError(f"--resumes must be at least 1, not {args.resumes}")
    stages = args.stages.split(",")
    for stage in stages:
        bench.preset.stage(stage)
    other = load_preset(args.count)
    record = bench.record("startup", "source", stages=args.stages, resumes=args.resumes, count=args.count)
    record["processes"] = {name: spread(times) for name, times in start_times(args.repeats, args.warmup).items()}
    record["stages"] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        scenes = root / "scenes"
        make_scenes(scenes, 32, args.seed)
        for stage in stages:
            first = root / stages[0] / "run" if record["stages"] else None
            row = measure_stage(bench, stage, scenes, root / stage, first)
            record["stages"][stage] = row | {"counted": counted(bench.preset, stage)}
    record["counted"] = {
        "preset": other.name,
        "dtype": other.language.dtype,
        "stages": {name: counted(other, name) for name in other.stages},
    }
    record["targets"] = [
        {
            "name": f"{what}, seconds",
            "value": record["processes"][name]["median"],
            "target": TARGETS[name],
            "at_least": False,
        }
        for name, what in (("import", "import tove_llava"), ("help", "tove-llava --help"))
    ]
    write_results(args.output, record, render(record))


def render(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    processes = [
        [
            TITLES[name],
            f"{row['median']:.3f} ({row['q1']:.3f} to {row['q3']:.3f})",
            "" if name not in TARGETS else f"{TARGETS[name]}, {'met' if row['median'] <= TARGETS[name] else 'missed'}",
        ]
        for name, row in record["processes"].items()
    ]
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
            "# Starting, checkpoints, loading",
            circumstances(record),
            table(["", "seconds (quartiles)", "target"], processes),
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
    parser.set_defaults(repeats=9, warmup=1)
    parser.add_argument(
        "--stages",
        default="pretrain,finetune_lora,finetune",
        metavar="A,B",
        help="of the preset; each but the first starts from the first's result (default: %(default)s)",
    )
    parser.add_argument("--resumes", type=int, default=2, metavar="N", help="timed starts of a stage (default: 2)")
    parser.add_argument("--count", default="vicuna-7b", metavar="PRESET", help="counted only (default: vicuna-7b)")
    parser.set_defaults(batch=None)
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
