"""Figures as PNG files. They are drawn without pyplot, so no display and no global state is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tove_llava.errors import ConfigError

if TYPE_CHECKING:
    from tove_llava.analysis.contributions import Contributions
    from tove_llava.analysis.curve import Step

DPI = 100


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of ``width * DPI`` by ``height * DPI`` pixels, on the Agg backend.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"plots need matplotlib: pip install 'tove-llava[analysis]' ({error})") from error
    drawn = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def save(drawn: Any, file: str | Path) -> None:
    """Writes a PNG; the file is there whole or not at all."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    drawn.savefig(staged, format="png", dpi=DPI)
    os.replace(staged, path)


def plot_contributions(found: Contributions, file: str | Path) -> None:
    """Four bar charts over the experts: gate weight, norm share, changes of loss and accuracy without them."""
    experts = found.overall.experts
    panels: list[tuple[str, list[float | None]]] = [
        ("mean gate weight", [e.gate_weight for e in experts.values()]),
        ("norm share  |G P| / |T'|", [e.norm_share for e in experts.values()]),
        ("loss change without it", [e.loss_change for e in experts.values()]),
        ("accuracy change without it (points)", [_points(e.accuracy_change) for e in experts.values()]),
    ]
    shown = [(title, values) for title, values in panels if any(value is not None for value in values)]
    drawn = figure(3.4 * len(shown), 1.6 + 0.35 * len(experts))
    for axes, (title, values) in zip(drawn.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.barh(list(experts), [value or 0.0 for value in values], color="tab:blue")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
    save(drawn, file)


def plot_types(found: Contributions, file: str | Path) -> None:
    """Grouped bars over the question types: changes of loss and accuracy without each expert."""
    names, kinds = list(found.overall.experts), list(found.types)
    drawn = figure(max(6.0, 1.5 + 0.25 * len(kinds) * (len(names) + 1)), 6.5)
    upper, lower = drawn.subplots(2, 1, sharex=True)
    loss = {name: [found.types[kind].experts[name].loss_change for kind in kinds] for name in names}
    accuracy = {
        name: [_points(found.types[kind].experts[name].accuracy_change) or 0.0 for kind in kinds] for name in names
    }
    _grouped(upper, kinds, loss, "loss change without it")
    _grouped(lower, kinds, accuracy, "accuracy change without it (points)")
    upper.legend(fontsize=8, ncols=len(names))
    save(drawn, file)


def plot_curve(steps: Sequence[Step], file: str | Path) -> None:
    """Accuracy, loss and images per second against the number of experts that are left."""
    labels = [f"{len(step.experts)}" + (f"\n-{step.removed}" if step.removed else "\nall") for step in steps]
    lines: list[tuple[str, list[float | None]]] = [
        ("accuracy (%)", [_points(step.accuracy) for step in steps]),
        ("LM loss", [step.loss for step in steps]),
        ("tower, images/s", [step.images_per_second for step in steps]),
    ]
    shown = [(title, values) for title, values in lines if all(value is not None for value in values)]
    drawn = figure(max(5.0, 1.0 * len(steps) + 1.5), 2.2 * len(shown))
    for axes, (title, values) in zip(drawn.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        axes.plot(range(len(steps)), values, marker="o")
        axes.set_ylabel(title, fontsize=9)
        axes.set_xticks(range(len(steps)), labels, fontsize=8)
        axes.grid(alpha=0.3)
    axes.set_xlabel("experts left, and the one removed last", fontsize=9)
    save(drawn, file)


def _grouped(axes: Any, groups: Sequence[str], bars: Mapping[str, Sequence[float]], title: str) -> None:
    width = 0.8 / len(bars)
    for index, (name, values) in enumerate(bars.items()):
        places = [group + (index - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(places, values, width, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel(title, fontsize=9)


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share
