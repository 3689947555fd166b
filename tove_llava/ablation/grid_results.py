"""Write an ablation's results: results.json, results.csv, table.md and plot.png."""

import json
from collections.abc import Sequence
from typing import Any

from tove_llava.ablation.differences import Group
from tove_llava.ablation.grid import Chain, Grid
from tove_llava.ablation.job_records import JobRecord
from tove_llava.ablation.run_table import RunTable, csv_text, tables
from tove_llava.ablation.training_runs import TrainingRun, read_training_run
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.files import write_atomically
from tove_llava.train.run_files import RUN_RECORD

RESULTS, CSV, TABLE, PLOT = "results.json", "results.csv", "table.md", "plot.png"
NOTE = "mean ± half-width of the 95 % interval over seeds (Student's t)"
_COSTS = ("seconds", "cpu_seconds", "tries", "date", "commit", "machine")


def write_results(grid: Grid) -> str:
    """Write the results of all arms so far; return tables for the terminal.

    A table has the last stage of each arm. Without a run the text is empty.
    """
    arms = dict.fromkeys(chain.arm for chain in grid.chains)
    groups = [Group(arm, runs) for arm in arms if (runs := _runs(grid, arm))]
    found = tables(groups, std=False)
    chains = {(chain.arm, chain.seed): _chain_json(grid, chain) for chain in grid.chains}
    whole = [table.to_json() for table in found]
    for run in (run for table in whole for group in table["groups"] for run in group["runs"]):
        run |= chains[run["group"], run["seed"]]
    write_atomically(grid.out / RESULTS, json.dumps(whole, indent=1) + "\n")
    if not found:
        return ""
    write_atomically(grid.out / CSV, csv_text(found))
    text = "\n\n".join(_titled(table, table.markdown(), len(found)) for table in found)
    write_atomically(grid.out / TABLE, f"{text}\n\n{NOTE}\n")
    shown = "\n\n".join(_titled(table, table.text(), len(found)) for table in found)
    return f"{shown}\n{NOTE}\n{_plot(grid, found)}"


def _runs(grid: Grid, arm: str) -> list[TrainingRun]:
    found = []
    for chain in grid.chains:
        stages = [folder for folder in chain.stages.values() if (folder / RUN_RECORD).is_file()]
        if chain.arm == arm and len(stages) == len(chain.stages):
            found.append(read_training_run(stages[-1], arm, chain.evaluation))
    return found


def _titled(table: RunTable, text: str, count: int) -> str:
    return text if count == 1 else f"{table.runs[0].stage}\n\n{text}"


def _chain_json(grid: Grid, chain: Chain) -> dict[str, Any]:
    """Return an arm's folders, and what its jobs took."""
    jobs = {}
    for job in chain.jobs:
        record = JobRecord(grid.out, job).read()
        jobs[job.name] = {"title": job.title, "state": record.get("state")}
        jobs[job.name] |= {key: record[key] for key in _COSTS if key in record}
    return {
        "stages": {stage: str(folder) for stage, folder in chain.stages.items()},
        "evaluation": chain.evaluation and str(chain.evaluation),
        "jobs": jobs,
    }


def _plot(grid: Grid, found: Sequence[RunTable]) -> str:
    files = ", ".join(str(grid.out / name) for name in (RESULTS, CSV, TABLE))
    try:
        from tove_llava.ablation.run_plots import plot_runs

        plot_runs(found, grid.out / PLOT)
    except (ConfigError, DataError) as error:  # the numbers are there without a plot
        return f"{files}; no plot: {error}"
    return f"{files}, {grid.out / PLOT}"
