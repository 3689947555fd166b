"""Trains every arm (one preset file each in ``playground/compare/``) with the same data, budget and seeds.

Each run is the ordinary commands: ``scripts/pretrain.sh``, ``scripts/finetune_lora.sh``, ``tove-llava eval``. Runs are
independent processes, one per core; re-running the command reuses what is done and resumes what is not.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tove_llava.scenes.language import CATEGORIES, DEPTH, SPATIAL

ROOT = Path(__file__).resolve().parent.parent
ARMS = sorted((Path(__file__).parent / "compare").glob("*.yaml"))
BASELINE, TREATMENT = "clip", "tove"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=4000, help="training scenes, for both stages")
    parser.add_argument("--val", type=int, default=500, help="held-out scenes")
    parser.add_argument("--scene-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument(
        "--report", type=Path, default=Path("playground/compare/results"), help="table and JSON, no suffix"
    )
    parser.add_argument("flags", nargs="*", help="further flags of the trainer, after --")
    args = parser.parse_args()

    scenes = args.out / "scenes"
    command(
        "tove-llava", "scenes", "--out", scenes, "--train", args.train, "--val", args.val, "--seed", args.scene_seed
    )
    jobs = [(arm, seed) for seed in args.seeds for arm in ARMS]
    with ThreadPoolExecutor(args.workers) as pool:
        futures = {pool.submit(run, arm, seed, scenes, args.out, args.flags): (arm.stem, seed) for arm, seed in jobs}
        for number, future in enumerate(as_completed(futures), start=1):
            future.result()
            print(f"[{number}/{len(jobs)}] {futures[future][0]}, seed {futures[future][1]}: done", flush=True)
    results = {arm.stem: [scores(folder(args.out, arm, seed)) for seed in args.seeds] for arm in ARMS}
    settings = {
        "seeds": args.seeds,
        "train": args.train,
        "val": args.val,
        "scene_seed": args.scene_seed,
        "flags": args.flags,
    }
    text = table(results)
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.with_suffix(".json").write_text(
        json.dumps({"settings": settings, "accuracy": results}, indent=1) + "\n"
    )
    args.report.with_suffix(".md").write_text(text + "\n")
    print(text)
    return 0


def folder(out: Path, arm: Path, seed: int) -> Path:
    return out / f"{arm.stem}-{seed}"


def run(arm: Path, seed: int, scenes: Path, out: Path, flags: list[str]) -> None:
    """Both stages and the evaluation of one arm with one seed, on one core."""
    place = folder(out, arm, seed)
    place.mkdir(parents=True, exist_ok=True)
    shared = {"PRESET": str(arm), "IMAGE_FOLDER": f"{scenes}/images", "NUM_GPUS": "1", "OMP_NUM_THREADS": "1"}
    stages = (("pretrain", "captions", {}), ("finetune_lora", "instruct", {"STAGE1_DIR": f"{place}/pretrain"}))
    for stage, records, more in stages:
        settings = {"OUTPUT_DIR": f"{place}/{stage}", "DATA_PATH": f"{scenes}/train_{records}.json", **more}
        command(
            "bash", f"scripts/{stage}.sh", "--seed", seed, "--disable_tqdm", "True", *flags,
            environment={**shared, **settings}, log=place / f"{stage}.log",
        )  # fmt: skip
    command(
        "tove-llava", "eval", "--model", place / "finetune_lora", "--benchmark", "scenes", "--data-root", scenes,
        "--output", place / "eval", "--batch-size", 64, environment=shared, log=place / "eval.log",
    )  # fmt: skip


def command(*words: object, environment: dict[str, str] | None = None, log: Path | None = None) -> None:
    """Runs a command from the repository's root. Its output goes to a log, whose end is shown when it fails."""
    words = tuple(str(word) for word in words)
    environment = {**os.environ, **(environment or {})}
    if log is None:
        subprocess.run(words, cwd=ROOT, env=environment, check=True)
        return
    with log.open("w") as handle:
        done = subprocess.run(words, cwd=ROOT, env=environment, stdout=handle, stderr=subprocess.STDOUT)
    if done.returncode:
        end = "\n".join(log.read_text().splitlines()[-25:])
        sys.exit(f"{' '.join(words)} failed with code {done.returncode}; the end of {log}:\n{end}")


def scores(place: Path) -> dict[str, float]:
    """Accuracy in percent per question type, and the means that the comparison is about."""
    found = json.loads((place / "eval" / "results.json").read_text())["benchmarks"]["scenes"]["full"]["scores"]
    percent = {name: 100 * entry["accuracy"] for name, entry in found.items()}
    return {**percent, "spatial and depth": statistics.mean(percent[name] for name in (*SPATIAL, *DEPTH))}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean and standard deviation over seeds of each arm, and the gain of ToVE with its standard error."""
    rows = [*CATEGORIES, "spatial and depth", "overall"]
    lines = [
        f"| question type | {' | '.join(results)} | gain |",
        "| --- |" + " ---: |" * (len(results) + 1),
    ]
    for row in rows:
        cells = []
        for runs in results.values():
            values = [r[row] for r in runs]
            cells.append(f"{statistics.mean(values):.1f} ± {spread(values):.1f}")
        gains = [t[row] - c[row] for t, c in zip(results[TREATMENT], results[BASELINE], strict=True)]
        lines.append(f"| {row} | {' | '.join(cells)} | {statistics.mean(gains):+.1f} ± {spread(gains):.1f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


if __name__ == "__main__":
    raise SystemExit(main())
