"""Measure what cached features save in training, and what they cost.

Both stages of a recipe run through the training command on generated scenes, in turn with and without the cache; the
records per second are those that the trainer logs, without its first log. Making the cache is timed for few and for
many images, which gives the time to begin and the time per image. Each way of storing is tried on rows of the cache,
and the standard library's codecs on top of it.

    python benchmarks/cached_features.py
"""

import contextlib
import io
import json
import lzma
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Bench, argument_parser, circumstances, run_command, target, write_results
from measuring import spread
from models import vision_sources

from tove_llava.cli import main as tove_llava
from tove_llava.core.errors import ConfigError
from tove_llava.core.text import markdown_table
from tove_llava.scenes.writer import Request, write_scenes
from tove_llava.train.feature_filling import SHARD_IMAGES
from tove_llava.train.feature_stores import STORES, Shards, write_shard

STAGES = {"pretrain": "captions", "finetune_lora": "instruct"}  # and their records
FEW = 8  # images
ROWS, ROWS_FROM = 32, 64  # rows of the cache to try ways of storing on, and the rows from which they are drawn
Codec = Callable[[bytes], bytes]
CODECS: dict[str, tuple[Codec, Codec]] = {
    "zlib 1": (lambda data: zlib.compress(data, 1), zlib.decompress),
    "zlib 6": (lambda data: zlib.compress(data, 6), zlib.decompress),
    "lzma 1": (lambda data: lzma.compress(data, preset=1), lzma.decompress),
}


class Study:
    """Scenes, a cache of their features, and trainings with and without it."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench, self.folder, self.trainings = bench, folder, 0
        self.scenes = folder / "scenes"
        write_scenes(Request(counts={"train": bench.args.scenes}, seed=bench.args.seed), self.scenes)

    def make_cache(self, name: str, count: int) -> float:
        """Time the command for ``count`` images."""
        records = json.loads(self._records("captions").read_text())[:count]
        data = self.folder / f"{name}.json"
        data.write_text(json.dumps(records))
        return self._timed("features", "--data", data, "--out", self.folder / name, "--device", self.bench.device.type)

    def train(self, stage: str, cache: Path | None) -> list[float]:
        """Return the records per second of each log but the first."""
        self.trainings += 1
        output, start = (self.folder / "runs" / str(number) for number in (self.trainings, 1))  # the first is stage 1
        args = self.bench.args
        self._timed(
            "train", "--stage", stage, "--data_path", self._records(STAGES[stage]), "--output_dir", output,
            "--max_steps", args.steps, "--logging_steps", args.log_every,
            "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True", "--seed", args.seed,
            "--bf16", self.bench.dtype.itemsize == 2, "--deepspeed", "none",
            *(["--per_device_train_batch_size", args.batch] if args.batch else []),
            *(["--pretrained", start] if stage != "pretrain" else []),
            *(["--feature_cache", cache] if cache else []),
        )  # fmt: skip
        state = json.loads((output / "trainer_state.json").read_text())
        return [entry["samples_per_second"] for entry in state["log_history"] if "lm_loss" in entry][1:]

    def _records(self, kind: str) -> Path:
        return self.scenes / f"train_{kind}.json"

    def _timed(self, verb: str, *flags: Any) -> float:
        """Time a command, whose output is shown where it fails."""
        given = ["--preset", self.bench.args.preset, *(x for text in self.bench.args.set for x in ("--set", text))]
        names = ("--image_folder", "--image_aspect_ratio")
        data = [names[0], self.scenes / "images", names[1], "square"]
        if verb == "features":
            data[0::2] = [name.replace("_", "-") for name in names]
        said = io.StringIO()
        started = time.perf_counter()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = tove_llava([verb, *map(str, [*given, *data, *flags])])
        if code:
            raise ConfigError(f"tove-llava {verb} failed:\n{said.getvalue()[-2000:]}")
        return time.perf_counter() - started


def stored(cache: Path, seed: int) -> list[dict[str, Any]]:
    """Measure each way of storing: size, speed and error."""
    draw = np.random.default_rng(seed)
    parts = {}
    for folder in sorted(file.parent for file in cache.glob("*/part.json")):
        shard = Shards([folder / "000000.safetensors"], SHARD_IMAGES, "float32")
        parts[folder.name] = shard.read(sorted(draw.choice(ROWS_FROM, ROWS, replace=False)))
    whole = sum(values.nbytes for values in parts.values())
    found = []
    with tempfile.TemporaryDirectory() as place:
        for store in STORES:
            files = {name: Path(place) / name / f"{store}.safetensors" for name in parts}
            started = time.perf_counter()
            for name, file in files.items():
                write_shard(file, parts[name], store)
            half = time.perf_counter()
            read = {name: Shards([file], ROWS, store).read(range(ROWS)) for name, file in files.items()}
            ended = time.perf_counter()
            errors = [_error(parts[name], values) for name, values in read.items()]
            row = {"store": store, "codec": "none", "size": sum(file.stat().st_size for file in files.values()) / whole}
            row |= {"rms_error": max(rms for rms, _ in errors), "largest_error": max(most for _, most in errors)}
            found.append({**row, **_rates(whole, half - started, ended - half)})
            packed = [array for values in parts.values() for array in STORES[store].pack(values).values()]
            found += [{"store": store, "codec": name, **_tried(packed, codec, whole)} for name, codec in CODECS.items()]
    return found


def _error(values: np.ndarray, stored: np.ndarray) -> tuple[float, float]:
    """Return the root mean square and the largest relative error."""
    error = stored.astype(np.float64) - values
    size = np.sqrt(np.square(values, dtype=np.float64).mean()) or 1.0
    return float(np.sqrt(np.square(error).mean()) / size), float(np.abs(error).max() / size)


def _rates(whole: int, writing: float, reading: float) -> dict[str, float]:
    return {"write_mb_per_second": whole / 1e6 / writing, "read_mb_per_second": whole / 1e6 / reading}


def _tried(arrays: list[np.ndarray], codec: tuple[Codec, Codec], whole: int) -> dict[str, float]:
    pack, unpack = codec
    # Bytes by significance, so that what neighbouring values share comes together.
    rows = [row.reshape(-1).view(np.uint8).reshape(-1, row.itemsize).T.tobytes() for array in arrays for row in array]
    started = time.perf_counter()
    packed = [pack(row) for row in rows]
    half = time.perf_counter()
    for row in packed:
        np.frombuffer(unpack(row), np.uint8).copy()
    ended = time.perf_counter()
    return {"size": sum(map(len, packed)) / whole, **_rates(whole, half - started, ended - half)}


def cache_cost(few: Sequence[float], many: Sequence[float], pictures: int) -> dict[str, float]:
    """Compute the seconds to begin a cache, and the seconds per image.

    Raises:
        ConfigError: there is no difference beyond the noise of the machine.
    """
    least, most = spread(few)["median"], spread(many)["median"]
    picture = (most - least) / (pictures - FEW)
    if picture <= 0:
        raise ConfigError(
            f"{pictures} pictures took no longer than {FEW}: the machine is too busy, or --scenes too few"
        )
    return {"begin": max(least - FEW * picture, 0.0), "picture": picture}


def consequences(rates: dict[str, dict[str, float]], cost: dict[str, float], runs: int, scenes: int) -> dict[str, Any]:
    """Compute the gain from speeds and the cost of the cache.

    Args:
        rates: by stage, with ``plain`` and ``cached``.
        cost: ``begin`` and ``picture``, in seconds.
        runs, scenes: of a study, each run a pass over all scenes in both stages.
    """
    saved = {stage: 1 / rate["plain"] - 1 / rate["cached"] for stage, rate in rates.items()}  # seconds a record
    one_time = cost["begin"] + scenes * cost["picture"]
    seconds = {kind: runs * scenes * sum(1 / rate[kind] for rate in rates.values()) for kind in ("plain", "cached")}
    return {
        "break_even_epochs": {stage: one_time / (scenes * gain) if gain > 0 else None for stage, gain in saved.items()},
        "study": {
            "runs": runs,
            "scenes": scenes,
            "one_time_seconds": one_time,
            "seconds_without": seconds["plain"],
            "seconds_with": seconds["cached"] + one_time,
            "ratio": seconds["plain"] / (seconds["cached"] + one_time),
        },
    }


def benchmark(bench: Bench) -> None:
    args = bench.args
    if args.steps < 2 * args.log_every:
        raise ConfigError(
            f"--steps must be at least twice --log-every, {2 * args.log_every}; the first log is left out"
        )
    if args.scenes < ROWS_FROM:
        raise ConfigError(f"--scenes must be at least {ROWS_FROM}")
    weights = bench.weights([*vision_sources(bench.preset), bench.preset.language.source])
    if weights == "random":
        raise ConfigError("the training command needs the preset's sources; use --preset tiny, or --set local ones")
    with tempfile.TemporaryDirectory() as place:
        study = Study(bench, Path(place))
        study.make_cache("first", FEW)  # what is imported and mapped only once
        few, many = (
            [study.make_cache(f"{count}-{repeat}", count) for repeat in range(args.repeats)]
            for count in (FEW, args.scenes)
        )
        cost = cache_cost(few, many, args.scenes)
        cache = study.folder / f"{args.scenes}-0"
        size = sum(file.stat().st_size for file in cache.glob("*/*.safetensors"))
        logs: dict[str, dict[str, list[float]]] = {stage: {"cached": [], "plain": []} for stage in STAGES}
        medians: dict[str, list[float]] = {stage: [] for stage in STAGES}
        for repeat in range(args.repeats):
            for stage, kinds in logs.items():
                rate = {}
                for kind in list(kinds)[:: -1 if repeat % 2 else 1]:  # each first in turn
                    found = study.train(stage, cache if kind == "cached" else None)
                    rate[kind] = spread(found)["median"]
                    kinds[kind].extend(found)
                medians[stage].append(rate["cached"] / rate["plain"])
        stores = stored(cache, args.seed)
    rates = {stage: {kind: spread(values)["median"] for kind, values in kinds.items()} for stage, kinds in logs.items()}
    record = bench.record("cached_features", weights, scenes=args.scenes, steps=args.steps, log_every=args.log_every)
    record["stages"] = {
        stage: {
            "samples_per_second": {kind: spread(values) for kind, values in logs[stage].items()},
            "ratio": {"value": rates[stage]["cached"] / rates[stage]["plain"], "by_repeat": medians[stage]},
        }
        for stage in STAGES
    }
    record["cache"] = {"seconds": spread(many), **cost, "bytes_per_picture": size / args.scenes, "stores": stores}
    record["targets"] = [
        target(f"samples/s with cached features over without, {stage}", row["ratio"]["value"], None, at_least=False)
        for stage, row in record["stages"].items()
    ]
    record["computed"] = consequences(rates, cost, args.study_runs, args.study_scenes)
    write_results(args.output, record, render(record))


def render(record: dict[str, Any]) -> str:
    """Write the record as Markdown."""
    cache, computed = record["cache"], record["computed"]
    study = computed["study"]
    rows = []
    for stage, row in record["stages"].items():
        rate, even = row["samples_per_second"], computed["break_even_epochs"][stage]
        ratios = ", ".join(f"{value:.2f}" for value in row["ratio"]["by_repeat"])
        cells = [f"{rate[kind]['median']:.1f} ({rate[kind]['q1']:.1f} to {rate[kind]['q3']:.1f})" for kind in rate]
        rows.append([stage, *reversed(cells), f"{row['ratio']['value']:.2f} ({ratios})"])
        rows[-1].append("never" if even is None else f"{even:.2f}")
    speed = markdown_table(
        ["stage", "samples/s", "with the cache", "ratio (each repeat)", "epochs until it pays"], rows
    )
    packed = markdown_table(
        ["stored as", "size", "read, MB/s", "written, MB/s", "error, rms", "largest"],
        [
            [row["store"] + ("" if row["codec"] == "none" else f" + {row['codec']}"), f"{row['size']:.2f}"]
            + [f"{row[f'{kind}_mb_per_second']:,.0f}" for kind in ("read", "write")]
            + [f"{row[kind]:.1e}" if kind in row else "" for kind in ("rms_error", "largest_error")]
            for row in cache["stores"]
        ],
    )
    return "\n\n".join(
        [
            "# Features computed once",
            circumstances(record),
            speed,
            f"Making the cache took {cache['seconds']['median']:.1f} s: {cache['begin']:.1f} s to begin and "
            f"{1e3 * cache['picture']:.1f} ms a picture. It takes {cache['bytes_per_picture'] / 1e3:.1f} kB a picture. "
            f"*Epochs until it pays* are for {study['scenes']:,} pictures.",
            f"**Computed from this**: {study['runs']} runs of two stages over {study['scenes']:,} scenes, as many as "
            f"docs/background/claims.md has, train {study['seconds_without'] / 3600:.2f} h without a cache and "
            f"{study['seconds_with'] / 3600:.2f} h with one, its making included: {study['ratio']:.2f} times as fast, "
            "without start-up and evaluation.",
            packed,
            "Sizes are of float32's, megabytes those of float32, so that rows compare; files lie in the page cache. "
            "Errors are relative to a part's root mean square, the worst part's. Codecs see bytes by significance.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch", type=int, metavar="N", help="records of a step (default: the stage's)")
    parser.add_argument("--scenes", type=int, default=160, metavar="N", help="pictures (default: 160)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of each training (default: 20)")
    parser.add_argument("--log-every", type=int, default=4, metavar="N", help="steps a log (default: 4)")
    parser.add_argument("--study-runs", type=int, default=105, metavar="N", help="of the study computed (default: 105)")
    parser.add_argument("--study-scenes", type=int, default=2400, metavar="N", help="of each run (default: 2400)")
    parser.set_defaults(repeats=3, dtype="bfloat16")
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
