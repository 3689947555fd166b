"""Measure the package's start, and its checkpoints' speed and size.

- Start-up, in fresh processes: ``import tove_llava`` and ``python -m tove_llava --help``, and for comparison a Python
  that does nothing (its time is in theirs too).
- Checkpoints to resume from, of each stage, by the trainer itself (one process, without DeepSpeed, on generated
  scenes): each of the first steps is saved, the run is interrupted, and the same command resumes it. *Loading* is the
  trained parameters, the optimiser and the schedule; *ready* is the resumed run until its first step, with the model
  and the data set, without the libraries' import.
- The folder that a stage leaves (without checkpoints to resume from), and ``tove_llava.load_model`` of it.
- Sizes by count at true size, which need no weights: ``--counted vicuna-7b``.

    python benchmarks/startup.py
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import (
    Bench,
    argument_parser,
    circumstances,
    milliseconds,
    run_command,
    target,
    trainer_flags,
    write_results,
)
from measuring import GB, MB, measure, spread

import tove_llava
from tove_llava.cli import main as cli
from tove_llava.core.errors import ConfigError
from tove_llava.core.text import markdown_table
from tove_llava.presets import load_preset
from tove_llava.train import step_checkpoints as checkpoints
from tove_llava.train.memory import checkpoint_size
from tove_llava.train.run import main as train
from tove_llava.train.shapes import stage_shape
from tove_llava.train.trainer import ToveTrainer

ROOT = Path(__file__).resolve().parents[1]
IMPORT_SECONDS, HELP_SECONDS = 0.3, 0.5  # targets
PROCESSES = {
    "python": ["-c", "pass"],
    "import": ["-c", "import tove_llava"],
    "help": ["-m", "tove_llava", "--help"],
}
TITLES = {"python": "a Python that does nothing", "import": "`import tove_llava`", "help": "`tove-llava --help`"}
FIRST = "pretrain"  # the stage that the others start from


def start_up(repeats: int, warmup: int) -> dict[str, Any]:
    """Measure fresh processes' wall-clock and processor seconds."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}

    def process(arguments: Sequence[str]) -> Callable[[], None]:
        command = [sys.executable, *arguments]

        def run() -> None:
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)

        return run

    def children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    contenders = {name: process(arguments) for name, arguments in PROCESSES.items()}
    clocks = dict.fromkeys(contenders, children)
    samples = measure(contenders, repeats=repeats, warmup=warmup, device=torch.device("cpu"), clocks=clocks)
    return {name: found.to_dict() for name, found in samples.items()}


class _Interrupted(Exception):
    """Stands for a process that ends in the middle of its run."""


@dataclass
class Watch:
    """Times the trainer's saving and loading; ends after ``repeats`` checkpoints."""

    repeats: int
    saved: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    started: float = 0.0
    ready: float = 0.0

    def __enter__(self) -> "Watch":
        save, prepare = ToveTrainer._save_checkpoint, ToveTrainer._prepare_for_training
        watch = self

        def timed_save(trainer: ToveTrainer, *args: Any, **kwargs: Any) -> None:
            begun = time.perf_counter()
            save(trainer, *args, **kwargs)
            watch.saved.append(time.perf_counter() - begun)
            if len(watch.saved) == watch.repeats:
                raise _Interrupted

        def timed_prepare(trainer: ToveTrainer, steps: int, loader: Any, resume: str | None) -> Any:
            prepared = prepare(trainer, steps, loader, resume)
            if resume is not None:
                watch.ready = time.perf_counter() - watch.started
                for _ in range(watch.repeats):  # loading the same state again changes nothing
                    begun = time.perf_counter()
                    trainer._load_from_checkpoint(resume)
                    trainer._load_optimizer_and_scheduler(resume)
                    watch.loaded.append(time.perf_counter() - begun)
            return prepared

        self._patches = [
            mock.patch.object(ToveTrainer, "_save_checkpoint", timed_save),
            mock.patch.object(ToveTrainer, "_prepare_for_training", timed_prepare),
        ]
        for patch in self._patches:
            patch.start()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()


def stage_checkpoints(bench: Bench, stage: str, scenes: Path, output: Path) -> dict[str, Any]:
    """Interrupt and resume a stage, and load what it leaves."""
    args, preset = bench.args, bench.preset
    start = [] if stage == FIRST else ["--pretrained", str(output.parent / FIRST)]
    flags = trainer_flags(
        bench, stage, scenes, output, "--deepspeed", "none", *start, "--max_steps", args.repeats + 1,
        "--save_steps", 1, "--per_device_train_batch_size", args.batch,
    )  # fmt: skip
    before = Watch(args.repeats)
    try:
        with before:
            code = train(flags)
        raise ConfigError(f"stage {stage} ended with {code} before it was interrupted; its message is above")
    except _Interrupted:
        pass
    written = checkpoints.complete(output)[-1]
    size = {"weights": (written / checkpoints.WEIGHTS).stat().st_size, "all": folder_size(written)}
    after = Watch(args.repeats)
    with after:
        if code := train(flags):
            raise ConfigError(f"stage {stage} did not resume (exit code {code}); its message is above")
    loading = []
    for _ in range(args.repeats):
        begun = time.perf_counter()
        model, _processor = tove_llava.load_model(output)
        loading.append(time.perf_counter() - begun)
        del model
    return {
        "trained_parameters": stage_shape(preset, stage).trained,
        "checkpoint_bytes": size,
        "save_seconds": spread(before.saved),
        "load_seconds": spread(after.loaded),
        "ready_seconds": after.ready,
        "folder_bytes": folder_size(output, without=checkpoints.complete(output)),
        "load_model_seconds": spread(loading),
    }


def folder_size(folder: Path, without: Sequence[Path] = ()) -> int:
    """Sum the bytes of a folder's files, without some folders."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if not any(other in file.parents for other in without))


def counted(name: str) -> dict[str, Any]:
    """Compute what each stage of a preset writes, from parameter counts."""
    preset = load_preset(name)
    rows = {}
    for stage in preset.stages:
        shape = stage_shape(preset, stage)
        size = checkpoint_size(preset, shape, preset.stage(stage).deepspeed)
        rows[stage] = {"trained_parameters": shape.trained, "checkpoint_bytes": size}
    return rows


def benchmark(bench: Bench) -> None:
    args = bench.args
    if args.device == "cuda" or args.dtype or args.weights:
        raise ConfigError("this benchmark trains as the preset says on the CPU: no --device cuda, --dtype or --weights")
    stages = args.stages.split(",")
    for stage in stages:
        bench.preset.stage(stage)
    if stages[0] != FIRST:
        raise ConfigError(f"--stages must begin with {FIRST}: the others start from what it leaves")
    record = bench.record("startup", "source", stages=args.stages, batch=args.batch, starts=args.starts)
    record["processes"] = start_up(args.starts, args.warmup)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        scenes = Path(folder) / "scenes"
        if cli(["scenes", "--out", str(scenes), "--train", "32", "--val", "1", "--seed", str(args.seed)]):
            raise ConfigError("no scenes could be made; the message is above")
        record["stages"] = {s: stage_checkpoints(bench, s, scenes, Path(folder) / "runs" / s) for s in stages}
    record["counted"] = {args.counted: counted(args.counted)}
    median = {name: row["wall_seconds"]["median"] for name, row in record["processes"].items()}
    record["targets"] = [
        target("seconds of import tove_llava in a fresh process", median["import"], IMPORT_SECONDS, at_least=False),
        target("seconds of tove-llava --help", median["help"], HELP_SECONDS, at_least=False),
    ]
    write_results(args.output, record, render(record))


def render(record: dict[str, Any]) -> str:
    """Write the record as Markdown."""
    wanted = {"import": IMPORT_SECONDS, "help": HELP_SECONDS}
    starts = [
        [
            TITLES[name],
            milliseconds(row["wall_seconds"]["values"]),
            f"{row['cpu_seconds']['median'] * 1e3:.3g}",
            f"{wanted[name] * 1e3:g}" if name in wanted else "",
        ]
        for name, row in record["processes"].items()
    ]
    rows = [
        [
            stage,
            f"{row['trained_parameters'] / 1e6:.2f} M",
            f"{row['checkpoint_bytes']['all'] / MB:.1f} ({row['checkpoint_bytes']['weights'] / MB:.1f})",
            milliseconds(row["save_seconds"]["values"]),
            milliseconds(row["load_seconds"]["values"]),
            f"{row['ready_seconds']:.2f}",
            f"{row['folder_bytes'] / MB:.1f}",
            f"{row['load_model_seconds']['median']:.2f}",
        ]
        for stage, row in record["stages"].items()
    ]
    header = [
        "stage",
        "trained",
        "checkpoint MB (weights)",
        "save ms",
        "load ms",
        "ready s",
        "folder MB",
        "load_model s",
    ]
    parts = ["# Start-up and checkpoints", circumstances(record)]
    parts += [
        markdown_table(["fresh process", "ms (quartiles)", "CPU ms", "target ms"], starts),
        markdown_table(header, rows),
    ]
    parts.append(
        "Saving includes that the files reach the disk. *Ready*: the resumed run until its first step, without the "
        "import of libraries. *Folder*: what the stage leaves for `load_model`, which also loads CLIP, the experts and "
        "the language model from their sources."
    )
    for name, stages in record["counted"].items():
        found = [
            [stage, f"{row['trained_parameters'] / 1e6:,.1f} M", f"{row['checkpoint_bytes'] / GB:.1f}"]
            for stage, row in stages.items()
        ]
        parts += [
            f"## `{name}`, by count",
            markdown_table(["stage", "trained", "checkpoint to resume from, GB"], found),
        ]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--starts", type=int, default=20, metavar="N", help="processes of each kind (default: 20)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="samples of a training step (default: 2)")
    parser.add_argument(
        "--stages",
        default="pretrain,finetune_lora,finetune,merge",
        metavar="A,B",
        help="of the preset (default: %(default)s)",
    )
    parser.add_argument(
        "--counted", default="vicuna-7b", metavar="PRESET", help="whose checkpoints are counted (default: vicuna-7b)"
    )
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
