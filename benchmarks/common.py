"""Shared parts of the benchmarks: flags, facts, and files of results."""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported

import psutil
import torch
from measuring import GB, reason_of, spread
from models import is_local
from transformers.utils import logging as transformers_logging

import tove_llava
from tove_llava.core.errors import ConfigError, ToveError
from tove_llava.core.text import markdown_table
from tove_llava.experts.from_spec import complete_specs
from tove_llava.experts.spec import ExpertSpec
from tove_llava.llava.build import torch_dtype
from tove_llava.presets import Preset, load_preset

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "transformers", "timm", "open_clip_torch", "kornia", "accelerate", "peft", "deepspeed", "triton",
    "liger-kernel", "bitsandbytes",
)  # fmt: skip

# -- command line -----------------------------------------------------------------------------------------------------


def argument_parser(description: str, *, limit: bool = False) -> argparse.ArgumentParser:
    """Create a parser with all benchmarks' flags, on request with --limit."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--preset", default="tiny", help="name of a preset or path of a .yaml file (default: tiny)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the preset"
    )
    parser.add_argument(
        "--repeats", type=int, default=20, metavar="N", help="timed runs of each contender (default: 20)"
    )
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="untimed runs before them (default: 3)")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument(
        "--weights",
        choices=("source", "random"),
        help="load the preset's sources, or build every part at its true size with random values "
        "(default: source where all of them are local, else random)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    if limit:
        parser.add_argument(
            "--limit", type=float, metavar="SECONDS",
            help="since the program began: later no part is begun, and no repeat beyond the second (default: none)",
        )  # fmt: skip
    return parser


def run_command(main: Callable[[], dict[str, Any] | None]) -> int:
    """Run ``main``; return 0, 1 (something not measured) or 2 (user's error)."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        record = main()
    except ToveError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    lost = (record or {}).get("not_measured", {})
    for part, reason in lost.items():
        print(f"benchmark: {part} was not measured: {reason}", file=sys.stderr)
    return 1 if lost else 0


@dataclass
class Bench:
    """The device, preset and settings from the command line.

    Raises:
        ConfigError: a wrong preset, number or dtype, or no such device.
    """

    args: argparse.Namespace
    preset: Preset = field(init=False)
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)
    left_out: dict[str, str] = field(init=False)  # experts, and why
    load: float = field(init=False)  # cores that others kept busy while this process waited

    def __post_init__(self) -> None:
        self.load = others_load()
        for flag in ("repeats", "batch"):
            if getattr(self.args, flag) is not None and getattr(self.args, flag) < 1:
                raise ConfigError(f"--{flag} must be at least 1, not {getattr(self.args, flag)}")
        if self.args.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu")
        self.device = torch.device(self.args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch_dtype(self.args.dtype or ("bfloat16" if self.device.type == "cuda" else "float32"))
        self.preset, self.left_out = without_missing_libraries(load_preset(self.args.preset, self.args.set))
        for name, reason in self.left_out.items():
            print(f"benchmark: without the expert {name}: {reason}", file=sys.stderr)

    def weights(self, sources: Sequence[str]) -> str:
        """Choose and print ``"source"`` or ``"random"``."""
        away = [text for text in sources if not is_local(text)]
        chosen = self.args.weights or ("random" if away else "source")
        reason = f" (not on this machine: {', '.join(away)})" if away else ""
        print(
            f"{self.preset.name} on {describe_device(self.device)}, {dtype_name(self.dtype)}, {chosen} weights{reason}"
        )
        return chosen

    def record(self, benchmark: str, weights: str, **settings: Any) -> dict[str, Any]:
        """Begin a result with its circumstances."""
        shared = self.load > 0.1 * (os.cpu_count() or 1)
        return {
            "benchmark": benchmark,
            "commit": commit(),
            "preset": self.preset.name,
            "overrides": list(self.args.set),
            "experts_left_out": self.left_out,
            "weights": weights,
            "device": {"type": self.device.type, "description": describe_device(self.device)},
            "dtype": dtype_name(self.dtype),
            "versions": versions(self.device),
            "machine": {
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "load_before": round(self.load, 2),
                "shared": shared,
            },
            "settings": {"repeats": self.args.repeats, "warmup": self.args.warmup, "seed": self.args.seed, **settings},
            "not_measured": {},
        }

    def attempt(self, record: dict[str, Any], part: str, run: Callable[[], T]) -> T | None:
        """Return the result of ``run``, or record why there is none.

        The reason goes to ``record["not_measured"]``: a part that fails must not cost the results of the others.
        """
        lost = record["not_measured"]
        if self.is_over():
            lost[part] = f"the {self._limit:g} s of --limit were over"
            return None
        try:
            return run()
        except Exception as error:
            lost[part] = reason_of(error)
        self.free()  # only here, because the error held what its frames hold
        return None

    def is_over(self) -> bool:
        """Return True after the time of --limit."""
        return self._limit is not None and seconds_since_start() > self._limit

    @property
    def _limit(self) -> float | None:
        return getattr(self.args, "limit", None)

    def free(self) -> None:
        """Free unused memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def without_missing_libraries(preset: Preset) -> tuple[Preset, dict[str, str]]:
    """Leave out the experts whose library is not installed; return them with the reasons."""
    missing, kept = {}, []
    for entry in preset.vision.experts:
        try:
            complete_specs([entry])
            kept.append(entry)
        except ConfigError as error:
            if not isinstance(error.__cause__, ImportError):
                raise
            missing[ExpertSpec.from_dict(entry).name] = str(error)
    if not missing:
        return preset, {}
    return replace(preset, vision=replace(preset.vision, experts=kept)), missing


def seconds_since_start() -> float:
    """Count the seconds since this process began, imports included."""
    return time.time() - psutil.Process().create_time()


def others_load(seconds: float = 0.5) -> float:
    """Measure the cores that other programs keep busy while this one waits.

    The system's load average would include the benchmark before this one.
    """
    busy, own, started = _busy_seconds(), time.process_time(), time.perf_counter()
    time.sleep(seconds)
    passed = time.perf_counter() - started
    return max(0.0, _busy_seconds() - busy - (time.process_time() - own)) / passed


def _busy_seconds() -> float:
    """Sum the busy seconds of all cores since the machine started."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is its host's user time too
    return float(sum(value for name, value in times.items() if name not in idle))


def describe_device(device: torch.device) -> str:
    """Describe the device."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / GB
        return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GB"
    return f"{_processor()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def versions(device: torch.device) -> dict[str, str]:
    """List the versions of Python, this project and its libraries."""
    found = {"python": platform.python_version(), "tove_llava": tove_llava.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found | ({"cuda": str(torch.version.cuda)} if device.type == "cuda" else {})


def commit() -> str:
    """Return the measured commit, with ``+`` where files differ from it.

    Outside a repository it is what TOVE_COMMIT says, else ``"unknown"``.
    """
    try:
        found = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TOVE_COMMIT") or "unknown"
    return found + ("+" if changed else "")


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def trainer_flags(bench: Bench, stage: str, scenes: Path, output: Path, *more: object) -> list[str]:
    """List the trainer's flags for a stage on generated scenes."""
    aligns = bench.preset.stage(stage).train == "alignment"
    records = scenes / ("train_captions.json" if aligns else "train_instruct.json")
    overrides = [word for setting in bench.args.set for word in ("--set", setting)]
    flags = [
        "--preset", bench.args.preset, "--stage", stage, *overrides, "--data_path", records,
        "--image_folder", scenes / "images", "--output_dir", output, "--report_to", "none", "--disable_tqdm", "True",
        "--seed", bench.args.seed, *more,
    ]  # fmt: skip
    return list(map(str, flags))


# -- results ----------------------------------------------------------------------------------------------------------


def circumstances(record: dict[str, Any]) -> str:
    """Describe what was measured, where, and with what."""
    settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
    libraries = ", ".join(f"{key} {value}" for key, value in record["versions"].items() if value != "none")
    left_out = record.get("experts_left_out") or {}
    lines = [
        *(f"- **without the expert {name}**: {reason}" for name, reason in left_out.items()),
        f"- preset `{record['preset']}`, {record['weights']} weights, {record['dtype']}"
        + (f", with {', '.join(record['overrides'])}" if record["overrides"] else ""),
        f"- {record['device']['description']}; {settings}",
        f"- commit {record['commit']}; {libraries}",
    ]
    machine = record["machine"]
    if machine["shared"]:
        lines.append(
            f"- **other programs were using the machine** ({machine['load_before']} of {machine['cores']} cores before "
            "the run): compare rows with each other, not with another run"
        )
    return "\n".join(lines)


def target(
    name: str, value: float | None, wanted: float | None, *, at_least: bool = True, reason: str | None = None
) -> dict[str, Any]:
    """Create an entry of ``record["targets"]``.

    Args:
        value: None where this run could not measure it.
        wanted: None where there is no limit, and the value is reported.
        reason: why, where it tried to.
    """
    entry = {"name": name, "value": value, "target": wanted, "at_least": at_least}
    return entry if reason is None or value is not None else {**entry, "reason": reason}


def targets_table(targets: Sequence[dict[str, Any]]) -> str:
    """Format the targets of a record, and say which are met."""
    rows = []
    for row in targets:
        value, goal = row["value"], row["target"]
        met = value is not None and (value >= goal if row["at_least"] else value <= goal)
        shown = f"not measured ({row.get('reason', 'needs a GPU')})" if value is None else f"{value:.3g}"
        word = "at least" if row["at_least"] else "at most"
        rows.append([row["name"], shown, f"{word} {goal:g}", "" if value is None else "met" if met else "missed"])
    return markdown_table(["target", "measured", "wanted", ""], rows)


def lost_table(record: dict[str, Any]) -> list[str]:
    """List what was not measured and why, as a table, or nothing."""
    lost = record["not_measured"]
    return [markdown_table(["not measured", "why"], [[part, reason] for part, reason in lost.items()])] if lost else []


def milliseconds(samples: Sequence[float], per: int = 1) -> str:
    """Format ``median (q1 to q3)`` in ms, each divided by ``per``."""
    got = spread(samples)
    return " ".join(
        [f"{got['median'] * 1e3 / per:.3g}", f"({got['q1'] * 1e3 / per:.3g} to {got['q3'] * 1e3 / per:.3g})"]
    )


def write_results(folder: Path, record: dict[str, Any], markdown: str, *, show: bool = True) -> Path:
    """Write the record as JSON and Markdown; return the JSON's path.

    The page is printed too where ``show``. The record gets the seconds that the program has taken so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record["seconds"] = round(seconds_since_start(), 1)
    file = folder / f"{record['benchmark']}-{record['preset']}-{record['device']['type']}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(markdown.rstrip() + "\n")
    if show:
        print(markdown)
    return file
