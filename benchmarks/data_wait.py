"""Measure the share of a training run that waits for its data.

The trainer itself, one process without DeepSpeed, on generated scenes, with the preset's own batch and data workers
(or --workers). Training logs the share of the time in which it waits for a batch (``data_wait``); here it is the mean
over a run after its first --warmup steps, in which the workers start. All of a run's records are one epoch.

    python benchmarks/data_wait.py
    python benchmarks/data_wait.py --preset small --stages finetune_lora --workers 4
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Bench, argument_parser, circumstances, run_command, target, trainer_flags, write_results
from measuring import spread

from tove_llava.cli import main as cli
from tove_llava.core.errors import ConfigError
from tove_llava.core.text import markdown_table
from tove_llava.train.run import main as train

TARGET = 0.02
EVERY = 5  # steps between two logs
FIRST = "pretrain"  # the stage that others start from


def waits(bench: Bench, stage: str, scenes: Path, output: Path) -> dict[str, float]:
    """Measure a run's share of waiting, and its samples per second."""
    args, batch, workers = bench.args, _setting(bench, stage, "batch"), _setting(bench, stage, "workers")
    start = [] if stage == FIRST else ["--pretrained", str(output.parent / FIRST)]
    processor = ["--use_cpu", "True"] if bench.device.type == "cpu" else []
    flags = trainer_flags(
        bench, stage, scenes, output, "--deepspeed", "none", *start, *processor,
        "--max_steps", args.warmup + args.steps, "--logging_steps", EVERY, "--save_strategy", "no",
        "--per_device_train_batch_size", batch, "--dataloader_num_workers", workers,
    )  # fmt: skip
    if code := train(flags):
        raise ConfigError(f"stage {stage} ended with {code}; its message is above")
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "data_wait" in entry and entry["step"] > args.warmup]
    return {key: statistics.mean(entry[key] for entry in logged) for key in ("data_wait", "samples_per_second")}


def _setting(bench: Bench, stage: str, name: str) -> int:
    """Return a setting of the command line, else of the preset."""
    key = {"batch": "per_device_train_batch_size", "workers": "dataloader_num_workers"}[name]
    given = getattr(bench.args, name)
    return int(bench.preset.stage(stage).arguments.get(key, 0) if given is None else given)


def benchmark(bench: Bench) -> None:
    args = bench.args
    if args.dtype or args.weights:
        raise ConfigError("this benchmark trains as the preset says: no --dtype or --weights")
    if args.steps < EVERY or args.steps % EVERY or args.warmup < EVERY or args.warmup % EVERY:
        raise ConfigError(f"--steps and --warmup must be multiples of {EVERY}, the steps between two logs")
    stages = args.stages.split(",")
    largest = max(_setting(bench, stage, "batch") for stage in (FIRST, *stages))
    record = bench.record("data_wait", "source", steps=args.steps, stages=args.stages)
    record["stages"] = {}
    with tempfile.TemporaryDirectory() as folder:
        root, count = Path(folder), largest * (args.warmup + args.steps)
        if cli(["scenes", "--out", str(root / "scenes"), "--train", str(count), "--val", "1"]):
            raise ConfigError("no scenes could be made; the message is above")
        if FIRST not in stages:
            waits(bench, FIRST, root / "scenes", root / "runs" / FIRST)
        for stage in stages:
            runs = []
            for repeat in range(args.repeats):
                output = root / "runs" / (stage if repeat == 0 else f"{stage}-{repeat}")
                runs.append(waits(bench, stage, root / "scenes", output))
            record["stages"][stage] = {
                "batch": _setting(bench, stage, "batch"),
                "workers": _setting(bench, stage, "workers"),
                **{key: spread([run[key] for run in runs]) for key in runs[0]},
            }
    record["targets"] = [
        target(f"share of a run's time that waits for data, {name}", row["data_wait"]["median"], TARGET, at_least=False)
        for name, row in record["stages"].items()
    ]
    write_results(args.output, record, render(record))


def render(record: dict[str, Any]) -> str:
    """Write the record as Markdown."""
    rows = []
    for stage, row in record["stages"].items():
        wait, rate = row["data_wait"], row["samples_per_second"]
        rows.append(
            [
                stage,
                str(row["batch"]),
                str(row["workers"]),
                f"{rate['median']:.3g}",
                f"{wait['median']:.2%} ({wait['q1']:.2%} to {wait['q3']:.2%})",
                "met" if wait["median"] <= TARGET else "missed",
            ]
        )
    header = ["stage", "batch", "workers", "samples/s", "waits for data", f"target {TARGET:.0%}"]
    return "\n\n".join(["# Waiting for data", circumstances(record), markdown_table(header, rows)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.set_defaults(repeats=3, warmup=EVERY)
    parser.add_argument("--stages", default="pretrain,finetune_lora", metavar="A,B", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="measured, of a run (default: 25)")
    parser.add_argument("--batch", type=int, metavar="N", help="samples of a step (default: the stage's)")
    parser.add_argument("--workers", type=int, metavar="N", help="that read data (default: the stage's)")
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
