"""What the benchmarks share: models to measure, timing, memory, FLOPs, and the files that results go to.

Models come from a preset. Where its sources are on this machine their weights are loaded; else, or on request, every
part is built at its true size with the initial values of its library. Speed does not depend on the values, and the
results say which it was.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported

import psutil
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel
from transformers.utils import logging as transformers_logging

import tove_llava
from tove_llava.core.errors import ConfigError, ToveError
from tove_llava.core.sources import Source
from tove_llava.core.text import markdown_table
from tove_llava.experts import Expert, ExpertHub
from tove_llava.llava import ToveLlavaForConditionalGeneration
from tove_llava.llava.build import assemble, build_model, grow_vocabulary, torch_dtype, vision_config
from tove_llava.presets import Preset, load_preset
from tove_llava.tower import ToveVisionModel

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "transformers", "timm", "open_clip_torch", "kornia", "accelerate", "peft", "deepspeed", "triton",
    "liger-kernel", "bitsandbytes",
)  # fmt: skip
GB, MB = 1e9, 1e6
FEWEST = 2  # repeats that are made after --limit too

# -- command line -----------------------------------------------------------------------------------------------------


def argument_parser(description: str, *, limit: bool = False) -> argparse.ArgumentParser:
    """The flags that all benchmarks have, and where wanted --limit."""
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
    """0; 1 where ``main`` returns a record of which a part was not measured; 2 and an error that the user can mend."""
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
    """Where and what to measure, from the command line.

    Raises:
        ConfigError: a wrong preset, number or dtype, or no such device.
    """

    args: argparse.Namespace
    preset: Preset = field(init=False)
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)
    load: float = field(init=False)  # cores that others kept busy while this one waited

    def __post_init__(self) -> None:
        self.load = others_load()
        for flag in ("repeats", "batch"):
            if getattr(self.args, flag) is not None and getattr(self.args, flag) < 1:
                raise ConfigError(f"--{flag} must be at least 1, not {getattr(self.args, flag)}")
        if self.args.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu")
        self.device = torch.device(self.args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch_dtype(self.args.dtype or ("bfloat16" if self.device.type == "cuda" else "float32"))
        self.preset = load_preset(self.args.preset, self.args.set)

    def weights(self, sources: Sequence[str]) -> str:
        """``"source"`` or ``"random"``, said aloud."""
        away = [text for text in sources if not is_local(text)]
        chosen = self.args.weights or ("random" if away else "source")
        reason = f" (not on this machine: {', '.join(away)})" if away else ""
        print(
            f"{self.preset.name} on {describe_device(self.device)}, {dtype_name(self.dtype)}, {chosen} weights{reason}"
        )
        return chosen

    def record(self, benchmark: str, weights: str, **settings: Any) -> dict[str, Any]:
        """What every result says of its circumstances."""
        shared = self.load > 0.1 * (os.cpu_count() or 1)
        return {
            "benchmark": benchmark,
            "commit": commit(),
            "preset": self.preset.name,
            "overrides": list(self.args.set),
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
        """What ``run`` returns; None where it fails, and then ``record["not_measured"]`` has the reason.

        What one part runs into (no memory left, a package that is not there) must not take the others' results.
        """
        lost = record["not_measured"]
        if self.is_over():
            lost[part] = f"the {self._limit:g} s of --limit were over"
            return None
        try:
            return run()
        except Exception as error:
            lost[part] = reason_of(error)
        self.free()  # only here: the error held what its frames hold
        return None

    def is_over(self) -> bool:
        """Whether the time of --limit is."""
        return self._limit is not None and seconds_since_start() > self._limit

    @property
    def _limit(self) -> float | None:
        return getattr(self.args, "limit", None)

    def free(self) -> None:
        """Gives memory back that nothing uses any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def reason_of(error: Exception) -> str:
    """An error in one line, for a table, without this machine's folders. A program's fault is printed whole too."""
    text = next(iter(str(error).strip().splitlines()), "")
    if not isinstance(error, ToveError):
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text).replace("|", "/")


def seconds_since_start() -> float:
    """Since this process began, imports included."""
    return time.time() - psutil.Process().create_time()


def others_load(seconds: float = 0.5) -> float:
    """Cores that other programs keep busy while this one waits.

    The system's load average would still hold the benchmark before this one.
    """
    busy, own, started = _busy_seconds(), time.process_time(), time.perf_counter()
    time.sleep(seconds)
    passed = time.perf_counter() - started
    return max(0.0, _busy_seconds() - busy - (time.process_time() - own)) / passed


def _busy_seconds() -> float:
    """Of all cores together since the machine started."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is its host's user time too
    return float(sum(value for name, value in times.items() if name not in idle))


def describe_device(device: torch.device) -> str:
    """The device in words."""
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
    """Versions of Python, this project and the libraries that do the work; ``"none"`` for those not installed."""
    found = {"python": platform.python_version(), "tove_llava": tove_llava.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found | ({"cuda": str(torch.version.cuda)} if device.type == "cuda" else {})


def commit() -> str:
    """The commit that is measured, with ``+`` where files differ from it.

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


# -- models -----------------------------------------------------------------------------------------------------------


def is_local(source: str) -> bool:
    """Whether a source's weights lie in a local folder or file."""
    path = Source.parse(source).path
    return path is not None and path.exists()


def vision_sources(preset: Preset) -> list[str]:
    """Sources of CLIP and the experts."""
    config = vision_config(preset.vision, offline=True)
    return [config.clip_source, *(spec.source for spec in config.expert_specs)]


def build_tower(bench: Bench, weights: str) -> ToveVisionModel:
    """The preset's tower with its backbones, in eval mode."""
    torch.manual_seed(bench.args.seed)
    tower = ToveVisionModel(vision_config(bench.preset.vision, offline=weights == "random"))
    tower.to(device=bench.device, dtype=bench.dtype)
    if weights == "random":
        random_backbones(tower)
    else:
        tower.load_backbones()
    return tower.eval()


def build_llava(bench: Bench, weights: str) -> ToveLlavaForConditionalGeneration:
    """The preset's whole model with its backbones; its image token is set."""
    preset, device, dtype = bench.preset, bench.device, bench.dtype
    if weights == "source":
        return build_model(preset, dtype=dtype, device=device, seed=bench.args.seed)[0]
    torch.manual_seed(bench.args.seed)
    if preset.language.config is not None:
        config = AutoConfig.for_model(**preset.language.config)
    else:
        config = AutoConfig.from_pretrained(**Source.parse(preset.language.source).pretrained())
    with torch.device("meta"):
        need = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, dtype=dtype).parameters())
    require_memory(need * dtype.itemsize, device, "the language model")
    with device:
        language = AutoModelForCausalLM.from_config(config, dtype=dtype)
    vision = vision_config(preset.vision, offline=True)
    model = assemble(language, vision, preset.projector, seed=bench.args.seed).to(device)
    model.config.image_token_index = config.vocab_size  # one more token, as the processor of a real model adds
    grow_vocabulary(model, config.vocab_size + 1)
    random_backbones(model.tower)
    return model


def random_backbones(tower: ToveVisionModel) -> None:
    """Gives a tower CLIP and experts of their true architectures with their libraries' initial values.

    The library itself never does so: there a backbone without weights is an error. Networks are built on the tower's
    device, not on the meta device, since some compute buffers (such as rotary tables) when they are built.

    Raises:
        ConfigError: the weights do not fit into the device's free memory.
    """
    hub = ExpertHub(tower.config.experts)
    need = sum(count_parameters(hub[name].meta_twin()) for name in hub.names)
    require_memory(need * 4, tower.device, "the experts")  # libraries build in float32
    tower.frozen.clip = whole_clip(tower, layers=tower.config.num_clip_layers)
    tower.frozen.clip.post_layernorm = nn.Identity()
    for name in hub.names:
        fill_randomly(hub[name], tower.device)
    tower.frozen.hub = hub
    tower.frozen.apply(lambda t: t.to(tower.device, tower.dtype if t.is_floating_point() else None))


def fill_randomly(expert: Expert, device: torch.device) -> None:
    """Builds an expert's network on the device, with its library's initial values."""
    expert.describe()  # reads the configuration that build() needs
    with device:
        network = expert.build(pretrained=False)
    expert.backbone = network.eval().requires_grad_(False)


def whole_clip(tower: ToveVisionModel, layers: int | None = None) -> CLIPVisionModel:
    """A CLIP of the tower's configuration with random values; all layers by default."""
    config = tower.config.clip_config
    layers = config.num_hidden_layers if layers is None else layers
    config = CLIPVisionConfig(**{**config.to_dict(), "num_hidden_layers": layers})
    config._attn_implementation = tower.config._attn_implementation
    with tower.device:
        return CLIPVisionModel(config).to(tower.dtype).eval().requires_grad_(False)


def count_parameters(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def weight_bytes(*modules: nn.Module | None) -> int:
    """Bytes of parameters and buffers, each tensor once."""
    tensors = {id(t): t for m in modules if m is not None for t in (*m.parameters(), *m.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def require_memory(needed: int, device: torch.device, what: str) -> None:
    """Raises ConfigError where the device has less free memory than ``needed`` bytes."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory()
    if needed > free:
        raise ConfigError(
            f"{what} of this preset needs {needed / GB:.1f} GB and {device.type} has {free / GB:.1f} GB free; "
            "run it with --device cuda on a larger GPU, or with a smaller preset"
        )


def _available_memory() -> int:
    """Bytes that programs can still get, counting what the system would give up for them."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Samples:
    """Wall-clock and processor seconds of one contender, by repeat."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)

    def to_dict(self) -> dict[str, Any]:
        return {"wall_seconds": spread(self.wall), "cpu_seconds": spread(self.cpu)}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and all values."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "q1": low, "q3": high, "values": list(values)}


def measure(
    contenders: dict[str, Callable[[], Any]],
    *,
    repeats: int,
    warmup: int,
    device: torch.device,
    clocks: Mapping[str, Callable[[], float]] | None = None,
    prepare: Callable[[str], Any] = lambda name: None,
    lost: dict[str, str] | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> dict[str, Samples]:
    """Times every contender once per repeat, each repeat beginning with another one.

    Thereby what slows the machine for a while slows all of them, and ratios of contenders hold.

    Args:
        clocks: processor seconds so far, of contenders that work in a process of their own.
        prepare: called with a contender's name before its clock starts.
        lost: where given, a contender that fails is left out, with its reason here, and the others go on.
        is_over: no repeat beyond :data:`FEWEST` is begun when this says so.
    """

    def run(name: str, times: int, samples: Samples | None = None) -> None:
        try:
            prepare(name)
            for _ in range(times):
                synchronize(device)
                clock = (clocks or {}).get(name, time.process_time)
                wall, cpu = time.perf_counter(), clock()
                contenders[name]()
                synchronize(device)
                if samples is not None:
                    samples.wall.append(time.perf_counter() - wall)
                    samples.cpu.append(clock() - cpu)
        except Exception as error:
            if lost is None:
                raise
            lost[name] = reason_of(error)
        if name in given:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    given = {} if lost is None else lost
    for name in contenders:
        run(name, warmup)
    names = list(contenders)
    samples = {name: Samples() for name in names}
    for repeat in range(repeats):
        if repeat >= FEWEST and is_over():
            break
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            if name not in given:
                run(name, 1, samples[name])
    return {name: found for name, found in samples.items() if name not in given}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(numerator: Samples, denominator: Samples) -> dict[str, float]:
    """Ratio of the medians; quartiles of the ratio repeat by repeat; and the ratio of processor time.

    Processor time does not count waiting for a core, so on a shared CPU it is the steadier one; on a GPU it is the
    time that the host took to launch the work.
    """
    pairs = spread([a / b for a, b in zip(numerator.wall, denominator.wall, strict=True)])
    return {
        "value": numerator.median / denominator.median,
        "paired_q1": pairs["q1"],
        "paired_q3": pairs["q3"],
        "cpu_time": numerator.cpu_median / denominator.cpu_median,
    }


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """A square matrix product large enough to fill the device, and its FLOPs."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.matmul(a, b, out=out), 2.0 * side**3


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that exist at a time during ``run``, beyond those that existed before.

    On a GPU by the caching allocator's count; on the CPU by torch's own record of allocations, which does not see the
    scratch memory of the kernels' libraries.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
        run()
    events = [e for e in recorder.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def count_flops(run: Callable[[], Any]) -> int:
    """Floating point operations of matrix products, convolutions and attention, two per multiply-add.

    Attention is decomposed into its matrix products, for the fused backward kernels recompute the scores.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


# -- results ----------------------------------------------------------------------------------------------------------


def circumstances(record: dict[str, Any]) -> str:
    """The lines above a table: what was measured, where, with what."""
    settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
    libraries = ", ".join(f"{key} {value}" for key, value in record["versions"].items() if value != "none")
    lines = [
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
    """One entry of ``record["targets"]``.

    Args:
        value: None where this run could not measure it.
        wanted: None where there is no limit, and the value is reported.
        reason: why, where it tried to.
    """
    entry = {"name": name, "value": value, "target": wanted, "at_least": at_least}
    return entry if reason is None or value is not None else {**entry, "reason": reason}


def targets_table(targets: Sequence[dict[str, Any]]) -> str:
    """Targets of a record with what was measured, and whether they are met."""
    rows = []
    for row in targets:
        value, goal = row["value"], row["target"]
        met = value is not None and (value >= goal if row["at_least"] else value <= goal)
        shown = f"not measured ({row.get('reason', 'needs a GPU')})" if value is None else f"{value:.3g}"
        word = "at least" if row["at_least"] else "at most"
        rows.append([row["name"], shown, f"{word} {goal:g}", "" if value is None else "met" if met else "missed"])
    return markdown_table(["target", "measured", "wanted", ""], rows)


def lost_table(record: dict[str, Any]) -> list[str]:
    """What was not measured and why; nothing where all was."""
    lost = record["not_measured"]
    return [markdown_table(["not measured", "why"], [[part, reason] for part, reason in lost.items()])] if lost else []


def milliseconds(samples: Sequence[float], per: int = 1) -> str:
    """``median (q1 to q3)`` in ms, each divided by ``per``."""
    got = spread(samples)
    return " ".join(
        [f"{got['median'] * 1e3 / per:.3g}", f"({got['q1'] * 1e3 / per:.3g} to {got['q3'] * 1e3 / per:.3g})"]
    )


def write_results(folder: Path, record: dict[str, Any], markdown: str, *, show: bool = True) -> Path:
    """Writes ``<benchmark>-<preset>-<device>.json`` and ``.md``, and returns the JSON's path.

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
