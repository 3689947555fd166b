"""Figures as PNG files, drawn without pyplot, display or global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tove_llava.analysis.colours import column_colour
from tove_llava.core.errors import ConfigError
from tove_llava.core.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

    from tove_llava.analysis.results import Contributions, Step

DPI = 100
ROUTING_SIZE = (6.4, 5.2)  # inches


def figure(width: float, height: float) -> Any:
    """Create a figure of ``width * DPI`` by ``height * DPI`` pixels.

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
    """Write a figure as PNG."""
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=DPI)
    write_atomically(file, content.getvalue())


def plot_contributions(found: Contributions, file: str | Path) -> None:
    """Draw gate weights, norm shares, and changes, by expert."""
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
    """Draw each expert's changes of loss and accuracy by question type."""
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
    """Draw accuracy, loss and speed by the number of experts left."""
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


def plot_redundancy(benchmarks: Mapping[str, Mapping[str, Any]], file: str | Path) -> None:
    """Draw the CUR of each encoder: a panel a benchmark, a group a row."""
    longest = max(len(rows) for rows in benchmarks.values())
    drawn = figure(max(6.0, 2.0 + 0.8 * longest), 3.0 * len(benchmarks))
    for axes, (name, rows) in zip(
        drawn.subplots(len(benchmarks), squeeze=False)[:, 0], benchmarks.items(), strict=True
    ):
        encoders = next(iter(rows.values()))["cur"]
        bars = {encoder: [_points(row["cur"][encoder]) or 0.0 for row in rows.values()] for encoder in encoders}
        _grouped(axes, list(rows), bars, f"{name}: CUR (%)")
        axes.legend(fontsize=8)
    save(drawn, file)


def _grouped(axes: Any, groups: Sequence[str], bars: Mapping[str, Sequence[float]], title: str) -> None:
    width = 0.8 / len(bars)
    for index, (name, values) in enumerate(bars.items()):
        positions = [group + (index - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(positions, values, width, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel(title, fontsize=9)


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


def plot_routing_argmax(image: Image, columns: Any, shares: Mapping[str, float], file: str | Path) -> None:
    """Draw each token's column with the largest gate weight over the image.

    Args:
        image: the image as the model sees it.
        columns: int ``[g,g]``.
        shares: by column's name, the share of the tokens that chose it.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = [tuple(value / 255 for value in column_colour(index)) for index in range(len(shares))]
    drawn = figure(*ROUTING_SIZE)
    axes = drawn.subplots()
    _over(axes, image, columns, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, alpha=0.55)
    axes.set_title("largest gate weight", fontsize=9)
    legend = [
        Patch(color=colour, label=f"{name} ({100 * share:.0f}%)")
        for colour, (name, share) in zip(colours, shares.items(), strict=True)
    ]
    drawn.legend(handles=legend, loc="outside right upper", fontsize=9, title="tokens")
    save(drawn, file)


def plot_routing_weight(image: Image, weights: Any, title: str, largest: float, file: str | Path) -> None:
    """Draw a column's gate weights ``[g,g]`` over the image.

    Args:
        largest: the end of the colour scale, shared by the maps of one image.
    """
    drawn = figure(*ROUTING_SIZE)
    axes = drawn.subplots()
    heat = _over(axes, image, weights, cmap="viridis", vmin=0.0, vmax=largest, alpha=0.6)
    axes.set_title(f"gate weight of {title}", fontsize=9)
    drawn.colorbar(heat, ax=axes)
    save(drawn, file)


def _over(axes: Any, image: Image, values: Any, **style: Any) -> Any:
    extent = (0, image.width, image.height, 0)
    axes.imshow(image, extent=extent)
    axes.set_axis_off()
    return axes.imshow(values, extent=extent, interpolation="nearest", **style)
