"""Train what the paper's claims need, and write docs/background/claims.md.

Every training is the product's own trainer and evaluation, called in worker processes, one per core (or GPU); the
frozen encoders run once for all of them. The same command goes on where it was interrupted; a folder that holds a run
of other settings is refused. Several machines over one file system: --shard 0/4 to --shard 3/4 on each, then once more
without it for the report. Only the sections of --claims are rewritten. OUT/summary.json has every run's numbers.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import records  # noqa: E402
from jobs import Job, Settings, command, start_worker  # noqa: E402

STUDIES = yaml.safe_load((HERE / "studies.yaml").read_text())


class RunFailed(RuntimeError):
    """At least one run failed, and was reported."""


def main() -> int:
    try:
        return run(parse())
    except RunFailed:
        return 1
    except records.StaleRecord as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", default="a,c,f", help=f"which of {','.join(STUDIES)}, or all (default: a,c,f)")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="compare these arms instead; a table, no page of claims"
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1 (default: 5)")
    parser.add_argument("--train", type=int, default=2400, help="training scenes, for every stage (default: 2400)")
    parser.add_argument("--val", type=int, default=300, help="held-out scenes (default: 300)")
    parser.add_argument("--pictures", type=int, default=8000, help="further pictures to merge on (default: 8000)")
    parser.add_argument("--scene-seed", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("outputs/claims"))
    parser.add_argument("--workers", type=int, help="trainings at a time (default: one a GPU, or one a core)")
    parser.add_argument("--shard", default="0/1", help="this machine's part of the seeds, such as 0/4")
    parser.add_argument(
        "--report", type=Path, help="the page, or the table of --arms (default: docs/background/claims.md)"
    )
    parser.add_argument("--no-report", action="store_true")
    args = parser.parse_args()
    args.chosen = list(STUDIES) if args.claims == "all" else args.claims.split(",")
    unknown = [name for name in args.chosen if name not in STUDIES]
    if unknown:
        parser.error(f"unknown claim {unknown[0]!r}; there are {', '.join(STUDIES)}")
    # As typed, but for output paths, and with explicit sizes.
    args.typed = f"--arms {' '.join(args.arms)}" if args.arms else f"--claims {args.claims}"
    for name in ("seeds", "train", "val", "pictures", "scene_seed", "workers"):
        value = getattr(args, name)
        if name in ("seeds", "train", "val") or value != parser.get_default(name):
            args.typed += f" --{name.replace('_', '-')} {value}"
    return args


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    settings = Settings(
        args.out.resolve(), args.seeds, args.train, args.val, args.scene_seed, args.pictures, records.commit()
    )
    part, parts = (int(number) for number in args.shard.split("/"))
    waves: dict[int, list[Job]] = {}
    entries = [{"arm": arm} for arm in args.arms or ()]
    entries = entries or [job for name in args.chosen for job in STUDIES[name]["jobs"]]
    for entry in entries:
        for seed in range(part, args.seeds, parts):
            job = Job(seed=seed, **entry)
            if job not in waves.setdefault(job.wave, []):
                waves[job.wave].append(job)
    for job in (job for wave in waves.values() for job in wave):
        settings.is_done(job)  # before anything is trained, whether a folder holds something else

    prepare(settings)
    if any(entry.get("pictures") for entry in entries):
        further_pictures(settings)
    workers = args.workers or gpus() or os.cpu_count() or 1
    for wave in sorted(waves):
        # Seed by seed, so that an unfinished run has whole seeds.
        run_wave(settings, sorted(waves[wave], key=lambda job: job.seed), workers)
    if parts == 1 and not args.no_report:
        report(args, settings)
    seconds = time.monotonic() - began
    if parts == 1:
        summarize(settings, args.typed, seconds)
    print(f"total: {seconds / 60:.1f} min", flush=True)
    return 0


def report(args: argparse.Namespace, settings: Settings) -> None:
    if args.arms:
        text = comparison(settings, args.arms)
        print(text)
        if args.report:
            args.report.write_text(text + "\n")
        return
    from measures import MEASURES
    from report import write_report

    for name in args.chosen:
        if name in MEASURES:
            MEASURES[name](settings)
    write_report(settings, args.report or ROOT / "docs" / "background" / "claims.md", args.chosen, args.typed)


def summarize(settings: Settings, typed: str, seconds: float) -> None:
    """Write every finished run in OUT, older ones too, to ``summary.json``."""
    from numbers_of_runs import summary

    last = {"command": typed, "seconds": round(seconds, 1), "commit": settings.commit, "date": records.today()}
    found = {"last_command": {**last, "machine": records.machine()}, "runs": summary(settings)}
    (settings.out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{settings.out / 'summary.json'}: {len(found['runs'])} runs")


def comparison(settings: Settings, arms: list[str]) -> str:
    """Tabulate question types by arm, with the paired gain over the first."""
    from numbers_of_runs import ROWS, Runs

    from tove_llava.core.text import markdown_table

    runs = [Runs(settings, arm) for arm in arms]
    rows = [[row, *(str(arm.interval(row)) for arm in runs), runs[-1].gain(runs[0], row).signed] for row in ROWS]
    return markdown_table(["accuracy, %", *arms, "gain"], rows)


def prepare(settings: Settings) -> None:
    """Make scenes and cached features once."""
    scenes = settings.scenes
    command(
        "scenes", "--out", scenes, "--train", settings.train, "--val", settings.val, "--seed", settings.scene_seed,
    )  # fmt: skip
    command(
        "features", "--preset", "tiny", "--data", scenes / "train_captions.json", "--data",
        scenes / "train_instruct.json", "--image-folder", scenes / "images", "--image-aspect-ratio", "square",
        "--out", settings.features,
    )  # fmt: skip


def further_pictures(settings: Settings) -> None:
    """Make images of other scenes and their features, for merging."""
    folder = settings.pictures
    command("scenes", "--out", folder, "--train", settings.further, "--val", 1, "--seed", settings.scene_seed + 1)
    command(
        "features", "--preset", "tiny", "--data", folder / "train_captions.json", "--image-folder", folder / "images",
        "--image-aspect-ratio", "square", "--out", folder / "features",
    )  # fmt: skip


def run_wave(settings: Settings, jobs: list[Job], workers: int) -> None:
    """Run the jobs that are not done, several at a time.

    Raises:
        RunFailed: a run failed. That is reported at once; no other begins, and those that run are waited for.
        StaleRecord: a job's folder holds another run.
    """
    left = [job for job in jobs if not settings.is_done(job)]
    print(f"{len(jobs)} runs, {len(jobs) - len(left)} of them done before; {workers} at a time", flush=True)
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    with ProcessPoolExecutor(workers, context, start_worker, (numbers, workers, gpus())) as pool:
        run_all(pool, settings, left, workers)


def run_all(pool: Executor, settings: Settings, jobs: list[Job], workers: int) -> None:
    """Keep as many jobs queued as workers, because queued jobs cannot stop."""
    started, done, failed = time.monotonic(), 0, 0
    waiting, running = list(jobs), {}
    while running or (waiting and not failed):
        while waiting and len(running) < workers and not failed:
            job = waiting.pop(0)
            running[pool.submit(job.run, settings)] = job
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            if future.exception() is not None:
                failed += 1
                print(_failure(job, future, len(running), len(waiting)), file=sys.stderr, flush=True)
                continue
            done += 1
            each = (time.monotonic() - started) / done
            print(
                f"[{done}/{len(jobs)}] {job.name}, seed {job.seed}: done; "
                f"{each:.0f} s a run, ETA {(len(jobs) - done) * each / 60:.0f} min",
                flush=True,
            )
    if failed:
        raise RunFailed(f"{failed} runs failed")


def _failure(job: Job, future: Future, running: int, waiting: int) -> str:
    error = str(future.exception()) or repr(future.exception())
    return (
        f"claims: {job.name}, seed {job.seed} failed: {error}\n"
        f"claims: {running} runs that have begun go on to their end; {waiting} are not begun. Finished runs stay"
    )


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    raise SystemExit(main())
