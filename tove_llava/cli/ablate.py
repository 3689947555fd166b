"""Run an ablation: a grid of arms and seeds from one YAML file, resumable.

An arm is a preset with overrides. Its stages, their caches and an evaluation are jobs in processes of their own; what
arms share is computed once. Each job gets its share of the cores, or one GPU. The same command goes on where an earlier
one ended; several commands may work on one --out. The exit code is 1 if a job failed. docs/guides/ablations.md has the
keys of the file.
"""

import argparse

from tove_llava.cli._flags import check_least, split_names

HELP = "run a grid of arms and seeds from one YAML file, and compare them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.yaml", help="the grid")
    parser.add_argument("--out", metavar="DIR", help="all results (default: outputs/ and the file's name)")
    parser.add_argument("--set", action="append", default=[], metavar="key.path=value", help="override a key of FILE")
    parser.add_argument("--arms", default="", metavar="A,B", help="run only these arms; the results have all")
    parser.add_argument("--jobs", type=int, metavar="N", help="jobs at a time (default: one a GPU, or one a core)")
    parser.add_argument("--dry-run", action="store_true", help="list the jobs and their state, run nothing")


def run(args: argparse.Namespace) -> int:
    import os
    from pathlib import Path

    # This process only waits. Its jobs are forks, which hang after a computation on several threads.
    os.environ["OMP_NUM_THREADS"] = "1"

    from tove_llava.ablation.ablation_plan import read_plan
    from tove_llava.ablation.seed_means import check_scipy

    check_least(args, "--jobs")
    out = Path(args.out) if args.out else Path("outputs") / Path(args.file).stem
    plan = read_plan(args.file, out, args.set, split_names(args.arms))
    check_scipy()

    from tove_llava.core.errors import ConfigError
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.core.plugins import plugin_flags

    quiet_transformers()

    from tove_llava.ablation.grid import make_grid
    from tove_llava.ablation.job_records import JobRecord

    grid = make_grid(plan, out)
    if args.dry_run:
        for job in grid.wanted_jobs:
            command = " ".join(["tove-llava", *job.words, *plugin_flags()])
            print(f"{JobRecord(out, job).read().get('state', 'to do')}: {job.title}\n  {command}")
        return 0

    from tove_llava.ablation.grid_results import write_results
    from tove_llava.ablation.job_pool import JobPool, gpu_ids
    from tove_llava.cli import main
    from tove_llava.doctor.machine import core_count

    gpus = gpu_ids()
    if 0 < len(gpus) < plan.gpus:
        raise ConfigError(f"{plan.where}: gpus: {plan.gpus} are needed, and there are {len(gpus)}")
    size = args.jobs or (len(gpus) or core_count()) // plan.gpus or 1
    pool = JobPool(grid, min(size, len(grid.wanted)), main, gpus, say=lambda text: print(text, flush=True))
    pool.run()
    print(write_results(grid))
    if pool.failures:
        print("\n".join(f"{grid.jobs[key].title}: {why}" for key, why in pool.failures.items()))
        print(f"{len(pool.failures)} of {len(grid.wanted)} jobs are not done; the same command tries them again")
    return 1 if pool.failures else 0
