"""Measure how the training step scales from one pinned rank to two.

The real trainer under the real deepspeed launcher on the CPU, with generated scenes and the stage's own batch on each
rank (weak scaling). Contenders, in turn within one run, while the others sleep:

- 1 rank: on one core, one thread.
- 2 ranks: on two cores, one thread each.
- apart: two independent runs of one rank each at the same time, on the same two cores. It is what the machine itself
  allows: what it loses, the two cores take from each other (memory, caches, clock, other programs).

All processes stay alive; a turn is --warmup untimed steps and then about --seconds of timed ones, as many for each
contender. A turn's speed is that of its median step, which a program that disturbs some steps does not move. Two more
ratios are given: of the mean steps, and of steps among the quickest tenth, which were disturbed least. *Busy* is a
rank's processor time over the time on the clock: the rest, it waited (for the other rank, the network, or a core).

    python benchmarks/scaling.py
    python benchmarks/scaling.py --runs finetune:zero2 --seconds 10
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Bench, argument_parser, circumstances, run_command, target, trainer_flags, write_results
from measuring import spread
from scaling_worker import write_json

from tove_llava.core.errors import ConfigError, ToveError
from tove_llava.core.text import markdown_table

ROOT = Path(__file__).resolve().parents[1]
TARGET = 1.8
START_LIMIT = 300.0  # seconds until a rank has to be ready; turns get this on top of what they take
CALIBRATION = {"warmup": 2, "steps": 2}
COLUMNS = (
    "", "2 ranks over 1", "apart over 1", "2 ranks over apart", "2 over 1, quickest", "2 over 1, mean step",
    "work of a core-second", f"target {TARGET}",
)  # fmt: skip
TITLES = {"one": "1 rank", "two": "2 ranks", "apart": "apart"}
GROUPS = {"one": ("first",), "two": ("both",), "apart": ("first", "second")}  # contender -> groups of ranks


class LaunchError(ToveError):
    """A group of ranks ended, or did not go on."""


@dataclass
class Group:
    """Ranks that one launcher starts."""

    name: str
    cores: Sequence[int]
    folder: Path

    def start(self, runs: Sequence[dict[str, Any]]) -> None:
        self.folder.mkdir()
        plan = self.folder / "plan.json"
        content = {"cores": list(self.cores), "driver": os.getpid(), "runs": runs, "folder": str(self.folder)}
        plan.write_text(json.dumps(content))
        command = [
            sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(len(self.cores)),
            "--master_port", str(free_port()), "--no_local_rank", "--module", "scaling_worker", str(plan),
        ]  # fmt: skip
        self.log = self.folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )

    def go(self, run: str, turn: int, warmup: int, steps: int) -> None:
        write_json(self.folder / f"{run}.go.{turn}", {"warmup": warmup, "steps": steps})

    def wait(self, run: str, turn: int) -> dict[str, float]:
        """Wait for a turn's seconds and the ranks' processor seconds.

        The clock is the first rank's; ranks of a group end a step together.
        """
        files = [self.folder / f"{run}.done.{turn}.{rank}" for rank in range(len(self.cores))]
        end = time.monotonic() + START_LIMIT
        while not all(file.is_file() for file in files):
            if self.process.poll() is not None or time.monotonic() > end:
                said = self.log.read_text(errors="replace")[-3000:]
                code = self.process.poll()
                state = "hangs" if code is None else f"ended with exit code {code}"
                raise LaunchError(f"run {run}, ranks on cores {list(self.cores)}: it {state}, and last said:\n{said}")
            time.sleep(0.02)
        told = [json.loads(file.read_text()) for file in files]
        steps = told[0]["steps"]
        return {
            "step": statistics.median(steps),
            "quick": sorted(steps)[len(steps) // 10],
            "wall": sum(steps),
            "cpu": sum(rank["cpu"] for rank in told),
        }

    def end(self) -> None:
        """End the launcher and the ranks that still run."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def environment() -> dict[str, str]:
    """Return an environment of one thread a rank, without an accelerator."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launcher}
    path = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(path),
    }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def parse_runs(bench: Bench) -> list[tuple[str, str]]:
    """Parse ``(stage, DeepSpeed configuration)`` of each ``STAGE:CONFIG``."""
    runs = []
    for text in bench.args.runs.split(","):
        stage, _, deepspeed = text.partition(":")
        if not deepspeed or deepspeed == "none":
            raise ConfigError(f"--runs: {text!r} is not STAGE:CONFIG, such as pretrain:zero2")
        bench.preset.stage(stage)
        runs.append((stage, deepspeed))
    return runs


class Race:
    """The turns of one run."""

    def __init__(self, run: str, groups: dict[str, Group]) -> None:
        self.run, self.groups = run, groups
        self.turns = dict.fromkeys(groups, 0)

    def turn(self, names: Sequence[str], warmup: int, steps: int) -> dict[str, dict[str, float]]:
        """Let these groups train at the same time."""
        for name in names:
            self.groups[name].go(self.run, self.turns[name], warmup, steps)
        took = {name: self.groups[name].wait(self.run, self.turns[name]) for name in names}
        for name in names:
            self.turns[name] += 1
        return took

    def finish(self) -> None:
        for name, group in self.groups.items():
            group.go(self.run, self.turns[name], 0, 0)


def race(bench: Bench, run: str, groups: dict[str, Group], batch: int) -> dict[str, Any]:
    """Measure every contender's samples per second, round by round."""
    args = bench.args
    turns = Race(run, groups)
    turns.turn(list(groups), **CALIBRATION)  # all at once, as soon as each is ready
    took = turns.turn(GROUPS["one"], **CALIBRATION)["first"]["step"]
    steps = max(2, round(args.seconds / took))
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in TITLES}
    names = list(TITLES)
    for repeat in range(args.repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            done = turns.turn(GROUPS[name], args.warmup, steps)
            ranks = {group: len(groups[group].cores) for group in done}
            samples = {group: batch * ranks[group] for group in done}  # of a step
            cpu = sum(took["cpu"] for took in done.values())
            seen[name].append(
                {
                    "samples_per_second": sum(samples[group] / took["step"] for group, took in done.items()),
                    "quick_samples_per_second": sum(samples[group] / took["quick"] for group, took in done.items()),
                    "mean_samples_per_second": sum(
                        samples[group] * steps / took["wall"] for group, took in done.items()
                    ),
                    "samples_per_core_second": steps * sum(samples.values()) / cpu,
                    "busy": statistics.mean(took["cpu"] / took["wall"] / ranks[group] for group, took in done.items()),
                }
            )
    turns.finish()
    contenders = {
        name: {key: spread([turn[key] for turn in rounds]) for key in rounds[0]} for name, rounds in seen.items()
    }
    return {
        "batch_per_rank": batch,
        "timed_steps": steps,
        "contenders": contenders,
        "ratios": {
            "two_over_one": compare(contenders["two"], contenders["one"]),
            "apart_over_one": compare(contenders["apart"], contenders["one"]),
            "two_over_apart": compare(contenders["two"], contenders["apart"]),
        },
    }


def compare(numerator: dict[str, Any], denominator: dict[str, Any]) -> dict[str, float]:
    """Compute the ratio of median speeds, its quartiles, and further ratios."""
    rates = [entry["samples_per_second"] for entry in (numerator, denominator)]
    quick, means, work = (
        [entry[key]["median"] for entry in (numerator, denominator)]
        for key in ("quick_samples_per_second", "mean_samples_per_second", "samples_per_core_second")
    )
    pairs = spread([a / b for a, b in zip(rates[0]["values"], rates[1]["values"], strict=True)])
    return {
        "value": rates[0]["median"] / rates[1]["median"],
        "paired_q1": pairs["q1"],
        "paired_q3": pairs["q3"],
        "quick": quick[0] / quick[1],
        "mean": means[0] / means[1],
        "core_second": work[0] / work[1],
    }


def benchmark(bench: Bench) -> None:
    args = bench.args
    if args.device == "cuda" or args.dtype or args.weights:
        refused = "no --device cuda, --dtype or --weights"
        raise ConfigError(f"this benchmark pins ranks to cores and trains as the preset says: {refused}")
    if args.warmup < 1 or args.seconds <= 0:
        raise ConfigError("--warmup must be at least 1 and --seconds above 0")
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise ConfigError("two ranks need two cores, and this process may use only one")
    runs = parse_runs(bench)
    record = bench.record("scaling", "source", seconds=args.seconds, runs=args.runs, cores=cores)
    record["machine"]["threads"] = 1
    record["runs"] = {}
    with tempfile.TemporaryDirectory() as folder, started(bench, runs, cores, Path(folder)) as groups:
        for stage, deepspeed in runs:
            batch = args.batch or bench.preset.stage(stage).arguments.get("per_device_train_batch_size", 8)
            record["runs"][f"{stage} {deepspeed}"] = race(bench, f"{stage}-{deepspeed}", groups, batch)
    record["targets"] = [
        target(f"2 ranks over 1, {name}", row["ratios"]["two_over_one"]["value"], TARGET)
        for name, row in record["runs"].items()
    ]
    write_results(args.output, record, render(record))


@contextmanager
def started(
    bench: Bench, runs: Sequence[tuple[str, str]], cores: Sequence[int], root: Path
) -> Iterator[dict[str, Group]]:
    """Start the groups of ranks; a failure leaves no process."""
    scenes = root / "scenes"
    make_scenes(scenes, bench.args.scenes, bench.args.seed)
    shares = {"first": cores[:1], "second": cores[1:], "both": cores}
    groups = {name: Group(name, share, root / name) for name, share in shares.items()}
    batch = [] if bench.args.batch is None else ["--per_device_train_batch_size", bench.args.batch]
    running: list[Group] = []
    try:
        for name, group in groups.items():
            plan = []
            for stage, deepspeed in runs:
                run = f"{stage}-{deepspeed}"
                flags = trainer_flags(
                    bench, stage, scenes, root / f"{name}-{run}", "--deepspeed", deepspeed, *batch,
                    "--max_steps", 1_000_000, "--lr_scheduler_type", "constant", "--learning_rate", "1e-6",
                    "--save_strategy", "no",
                )  # fmt: skip
                plan.append({"name": run, "arguments": flags})
            group.start(plan)
            running.append(group)
        yield groups
        for group in running:
            group.process.wait(START_LIMIT)
    finally:
        for group in running:
            group.end()


def make_scenes(folder: Path, count: int, seed: int) -> None:
    """Render records and images to train on."""
    flags = ["--out", str(folder), "--train", str(count), "--val", "1", "--seed", str(seed)]
    done = subprocess.run(
        [sys.executable, "-m", "tove_llava", "scenes", *flags], env=environment(), capture_output=True, text=True
    )
    if done.returncode:
        raise LaunchError(f"tove-llava scenes: exit code {done.returncode}\n{done.stderr[-2000:]}")


def render(record: dict[str, Any]) -> str:
    """Write the record as Markdown."""
    rates, ratios = [], []
    for run, row in record["runs"].items():
        rates.append([run, str(row["batch_per_rank"])])
        for entry in row["contenders"].values():
            seen = entry["samples_per_second"]
            rates[-1] += [
                f"{seen['median']:.3g} ({seen['q1']:.3g} to {seen['q3']:.3g})",
                f"{entry['busy']['median']:.0%}",
            ]
        ratios.append([run])
        for entry in row["ratios"].values():
            ratios[-1].append(f"{entry['value']:.2f} ({entry['paired_q1']:.2f} to {entry['paired_q3']:.2f})")
        ratios[-1] += [f"{row['ratios']['two_over_one'][key]:.2f}" for key in ("quick", "mean", "core_second")]
        ratios[-1].append("met" if row["ratios"]["two_over_one"]["value"] >= TARGET else "missed")
    header = ["stage and ZeRO", "batch of a rank"]
    for title in TITLES.values():
        header += [f"{title}, samples/s", "busy"]
    return "\n\n".join(
        [
            "# One rank and two",
            circumstances(record),
            markdown_table(header, rates),
            markdown_table(COLUMNS, ratios),
            "One thread a rank, each rank on a core of its own; speeds are those of the median step. *Apart* are two "
            "runs of one rank at the same time, which know nothing of each other: what the two cores can do at most. "
            "*Busy* is a rank's processor time over the time on the clock. *Work of a core-second*: samples for a "
            "second of processor time in 2 ranks over those in 1; it sees neither waiting nor other programs. In "
            "brackets quartiles, of the ratios round by round.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.set_defaults(repeats=3, warmup=1)
    parser.add_argument(
        "--runs",
        default="pretrain:zero2,finetune_lora:zero2,finetune_lora:zero3",
        metavar="STAGE:CONFIG,...",
        help="stages of the preset, each with a DeepSpeed configuration (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="samples of a rank (default: the stage's)")
    parser.add_argument("--seconds", type=float, default=2.5, metavar="S", help="timed, of a turn (default: 2.5)")
    parser.add_argument("--scenes", type=int, default=400, metavar="N", help="records to train on (default: 400)")
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
