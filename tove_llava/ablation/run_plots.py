"""Draw the runs' loss curves and scores, without pyplot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tove_llava.ablation.run_table import RunTable
from tove_llava.analysis.plots import figure, save
from tove_llava.core.errors import DataError


def plot_runs(found: Sequence[RunTable], file: str | Path) -> None:
    """Draw loss curves for each stage, and scores with a marker a seed.

    Raises:
        DataError: no run has a logged loss or a score.
    """
    curves = [table for table in found if any(run.curve("lm_loss")[0] for run in table.runs)]
    scores = [(table, name) for table in found for name in table.scores]
    if not curves and not scores:
        raise DataError("there is nothing to plot: no run has a logged loss or a score yet")
    height = max(3.4, 0.3 * max(len(table.groups) for table in found) + 1.2)
    drawn = figure(5.2 * (len(curves) + len(scores)), height)
    panels = list(drawn.subplots(1, len(curves) + len(scores), squeeze=False)[0])
    for table, axes in zip(curves, panels, strict=False):
        _draw_losses(table, axes)
    for (table, name), axes in zip(scores, panels[len(curves) :], strict=True):
        _draw_scores(table, name, axes)
    save(drawn, file)


def _draw_losses(table: RunTable, axes: Any) -> None:
    for index, group in enumerate(table.groups):
        for number, run in enumerate(group.runs):
            label = group.label if number == 0 else None
            axes.plot(*run.curve("lm_loss"), color=f"C{index % 10}", linewidth=1, alpha=0.8, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("lm_loss")
    axes.set_title(table.runs[0].stage, fontsize=9)
    axes.legend(fontsize=7, frameon=False)


def _draw_scores(table: RunTable, name: str, axes: Any) -> None:
    read, _ = table.scores[name]
    groups = [group for group in table.groups if group.values(read)]
    for index, group in enumerate(groups):
        values = group.values(read)
        axes.plot(values, [index] * len(values), "o", color=f"C{index % 10}", alpha=0.6)
        axes.plot([sum(values) / len(values)], [index], "|", color="black", markersize=14)
    axes.set_yticks(range(len(groups)), [group.label for group in groups], fontsize=7)
    axes.invert_yaxis()
    axes.set_title(name, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
