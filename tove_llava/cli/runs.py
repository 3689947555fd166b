"""List training runs as a table: settings that differ, state, losses, gate and scores.

Runs are found in the folders and below them, with the results of 'tove-llava eval' in or next to a run. A run's
settings include those of the stages that it starts from. The seeds of one setting share a line: mean ± standard
deviation. Each stage has a table.
"""

import argparse

HELP = "list training runs: settings that differ, state, losses, gate, scores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of a run, or of several")
    parser.add_argument("--stage", metavar="NAME", help="only runs of this stage")
    parser.add_argument("--by-seed", action="store_true", help="a line for each run, instead of seeds together")
    parser.add_argument("--csv", metavar="FILE", help="write a line for each run, with every score")
    parser.add_argument("--json", metavar="FILE", help="write groups, their means, and their runs")
    parser.add_argument("--plot", metavar="FILE.png", help="draw loss curves, and scores with a marker for each seed")


def run(args: argparse.Namespace) -> int:
    import json

    from tove_llava.ablation.differences import group_seeds
    from tove_llava.ablation.run_table import csv_text, tables
    from tove_llava.ablation.training_runs import find_runs
    from tove_llava.core.errors import ConfigError
    from tove_llava.core.files import write_atomically

    runs = find_runs(args.folders)
    stages = dict.fromkeys(run.stage for run in runs)
    if args.stage is not None:
        runs = [run for run in runs if run.stage == args.stage]
        if not runs:
            raise ConfigError(f"--stage {args.stage}: the runs are of the stages {', '.join(stages)}")
    found = tables(group_seeds(runs, args.by_seed))
    print("\n\n".join(f"{table.runs[0].stage}\n{table.text()}" if len(found) > 1 else table.text() for table in found))
    if args.csv:
        write_atomically(args.csv, csv_text(found))
    if args.json:
        write_atomically(args.json, json.dumps([table.to_json() for table in found], indent=1) + "\n")
    if args.plot:
        from tove_llava.ablation.run_plots import plot_runs

        plot_runs(found, args.plot)
    return 0
