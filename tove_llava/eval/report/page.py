"""The pages of a comparison, and the same for programs."""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tove_llava.eval.report.comparison import OVERALL, Comparison, Line, Pair, Section
from tove_llava.eval.report.published import Published
from tove_llava.eval.report.runs import Item, Run
from tove_llava.eval.report.statistics import Difference, Interval
from tove_llava.eval.report.thumbnails import Thumbnails
from tove_llava.eval.result_files import MARK
from tove_llava.eval.score_table import UNPARSED

TITLE = "Comparison of runs"
SIGNIFICANT = 0.05
IMAGES = "pictures"  # folder of images, next to the Markdown page
_LONG = 400  # characters of a question or an answer
_NONE = "–"
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$!&])")


@dataclass(frozen=True)
class Image:
    """A JPEG in a table; ``alt`` describes it in words."""

    jpeg: bytes = field(repr=False)
    name: str
    alt: str
    folder: str = IMAGES

    @property
    def base64(self) -> str:
        return base64.b64encode(self.jpeg).decode()


Cell = str | Image


@dataclass(frozen=True)
class Table:
    """A heading and rows; the first ``left`` columns are text."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: int = 1


def escape_markdown(text: str) -> str:
    """Escape a text so that Markdown shows it unchanged, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _markdown_value(value: Any) -> Any:
    return value if hasattr(value, "__html__") else Markup(escape_markdown(str(value)))


def render(content: Mapping[str, Any]) -> tuple[str, str]:
    """Render the HTML and the Markdown page; all values are escaped.

    Args:
        content: from :func:`build`.
    """
    pages = []
    # Markdown's escape runs before Jinja's own, which leaves values that are marked as safe unchanged.
    for layout, finalize in (("html", None), ("markdown", _markdown_value)):
        environment = Environment(
            loader=PackageLoader(__package__ or ""),
            autoescape=True,
            trim_blocks=True,
            undefined=StrictUndefined,
            finalize=finalize,
        )
        pages.append(environment.get_template("page.jinja").render(content, layout=f"{layout}.jinja"))
    html, markdown = pages
    return html.strip() + "\n", re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n"


def build(comparison: Comparison, published: Sequence[Published], thumbnails: Thumbnails | None) -> dict[str, Any]:
    """Gather what the pages show.

    Args:
        published: models from papers; each benchmark shows those that have figures of it.
        thumbnails: None for a page without images.
    """
    how = comparison.bootstrap
    return {
        "title": TITLE,
        "runs": _runs(comparison),
        "level": f"{100 * how.level:g}",
        "resamples": f"{how.resamples:,}",
        "seed": how.seed,
        "baseline": repr(comparison.baseline),
        "significant": f"{SIGNIFICANT:g}",
        "sections": [_section(section, comparison, published, thumbnails) for section in comparison.sections],
    }


def images(content: Mapping[str, Any]) -> Iterator[Image]:
    """Yield all images of a page."""
    for section in content["sections"]:
        for _, table in section["pairs"]:
            yield from (cell for row in table.rows for cell in row if isinstance(cell, Image))


def _runs(comparison: Comparison) -> Table:
    header = ["run", "benchmark", "model", "weights", "data", "device", "versions"]
    header += ["questions", "seconds", "questions/s", "images/s"]
    rows = []
    for section in comparison.sections:
        for run in section.runs:
            found = run.result
            data = found["data"]
            rows.append(
                [
                    run.label,
                    run.benchmark,
                    str(found["model"]),
                    str(found.get("fingerprint", _NONE))[:12],
                    f"{data.get('questions', _NONE)} / {data.get('ground_truth', _NONE)}",
                    f"{found.get('device', _NONE)} x {found.get('processes', 1)}, {found.get('dtype', _NONE)}",
                    ", ".join(f"{name} {version}" for name, version in (found.get("versions") or {}).items()),
                    str(found["count"]),
                    *(_number(found.get(key)) for key in ("seconds", "questions_per_second", "images_per_second")),
                ]
            )
    return Table(header, rows, left=7)


def _section(
    section: Section, comparison: Comparison, published: Sequence[Published], thumbnails: Thumbnails | None
) -> dict[str, Any]:
    papers = [model for model in published if section.benchmark in model.scores]
    levels = {
        level: _lines([line for line in section.lines if line.level == level], section, comparison.baseline)
        for level in dict.fromkeys(line.level for line in section.lines)
    }
    return {
        "benchmark": section.benchmark,
        "notes": section.notes,
        "scores": _scores(section.runs),
        "published": _published(section.benchmark, papers) if papers else None,
        "means": levels.pop(OVERALL, None),
        "levels": levels,
        "pairs": [(pair, _pair(pair, section, number, thumbnails)) for number, pair in enumerate(section.pairs)],
    }


def _scores(runs: Sequence[Run]) -> Table:
    labels = dict.fromkeys(label for run in runs for label in run.rows)
    rows = []
    for label in labels:
        cells = [run.rows.get(label) for run in runs]
        counts = sorted({cell[1] for cell in cells if cell is not None})
        shown = [_NONE if cell is None else f"{cell[0]:.1f}" for cell in cells]
        rows.append([label, *shown, "/".join(map(str, counts))])
    unread = [run.result.get("unparsed") for run in runs]
    counts = sorted({int(run.result["count"]) for run in runs})
    rows.append([UNPARSED, *(_number(number, ".0f") for number in unread), "/".join(map(str, counts))])
    return Table(["score", *(run.label for run in runs), "questions"], rows)


def _published(benchmark: str, models: Sequence[Published]) -> Table:
    labels = list(dict.fromkeys(label for model in models for label in model.scores[benchmark]))
    rows = [
        [
            f"{model.name} (published)",
            f"{model.paper} (arXiv {model.arxiv}): {model.source}. {model.note}".strip(),
            *(_number(model.scores[benchmark].get(label), "g") for label in labels),
        ]
        for model in models
    ]
    return Table(["model", "source", *labels], rows, left=2)


def _lines(lines: Sequence[Line], section: Section, baseline: str) -> Table:
    runs = [run.label for run in section.runs if any(run.label in line.intervals for line in lines)]
    others = [label for label in runs if any(label in line.differences for line in lines)]
    header = ["questions", "n", *runs]
    for label in others:
        header += [f"{label} less {baseline}", "could show", "p", "p (Holm)"]
    several = len({line.metric for line in lines}) > 1
    rows: list[list[Cell]] = []
    for line in lines:
        counts = sorted({interval.count for interval in line.intervals.values()})
        name = f"{line.group}: {line.metric}" if several or line.metric != MARK else line.group
        row: list[Cell] = [name, "/".join(map(str, counts))]
        row += [_interval(line.intervals.get(label)) for label in runs]
        for label in others:
            row += _difference(line.differences.get(label), line.corrected.get(label))
        rows.append(row)
    return Table(header, rows)


def _pair(pair: Pair, section: Section, number: int, thumbnails: Thumbnails | None) -> Table:
    runs = {run.label: run for run in section.runs}
    header = ["question", "right answer", pair.first, pair.second]
    rows: list[list[Cell]] = []
    for index, (item, other) in enumerate(pair.shown):
        asked = [_short(item.prompt or item.name), _short(item.expected)]
        cells: list[Cell] = [*asked, _answer(item), _answer(other)]
        if thumbnails is not None:
            # A benchmark's name comes from a file, and must not lead out of the folder.
            prefix = re.sub(r"[^\w-]", "_", section.benchmark)
            cells.insert(0, _image(item, runs[pair.first], thumbnails, f"{prefix}-{number}-{index}.jpg"))
        rows.append(cells)
    if thumbnails is not None:
        header.insert(0, "image")
    return Table(header, rows, left=len(header))


def _image(item: Item, run: Run, thumbnails: Thumbnails, name: str) -> Cell:
    found = thumbnails.of(run, item.name)
    if isinstance(found, bytes):
        return Image(found, name, item.image or item.name)
    return found or "no image"


def _answer(item: Item) -> str:
    marks = ", ".join(_value(name, value) for name, value in item.values.items())
    return f"{_short(item.answer) if item.answer is not None else '(no answer)'}\n[{marks}]"


def _value(name: str, value: float) -> str:
    if name == MARK:
        return {0.0: "wrong", 1.0: "right"}.get(value, f"{100 * value:.0f} %")
    return f"{name} {100 * value:.1f}"


def _short(text: str | None) -> str:
    if text is None:
        return _NONE
    return text if len(text) <= _LONG else f"{text[:_LONG]} ..."


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return _NONE
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _difference(difference: Difference | None, corrected: float | None) -> list[str]:
    if difference is None or corrected is None:
        return [_NONE] * 4
    i = difference.interval
    shown = f"{100 * i.mean:+.1f} [{100 * i.low:+.1f}, {100 * i.high:+.1f}] (+{difference.better} −{difference.worse})"
    least = _NONE if difference.detectable is None else f"{100 * difference.detectable:.1f}"
    return [shown, least, _p(difference.p), _p(corrected) + (" *" if corrected < SIGNIFICANT else "")]


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _number(value: Any, form: str = ".1f") -> str:
    return format(value, form) if isinstance(value, int | float) else _NONE


def to_json(comparison: Comparison, published: Sequence[Published]) -> dict[str, Any]:
    """Return the comparison as plain types, for programs."""
    return {
        "baseline": comparison.baseline,
        "bootstrap": vars(comparison.bootstrap),
        "benchmarks": {section.benchmark: _section_json(section) for section in comparison.sections},
        "published": {model.key: vars(model) for model in published},
    }


def _section_json(section: Section) -> Mapping[str, Any]:
    lines = []
    for line in section.lines:
        differences = {}
        for label, difference in line.differences.items():
            rest = {**vars(difference), "p_holm": line.corrected[label]}
            differences[label] = {**vars(rest.pop("interval")), **rest}
        means = {label: vars(interval) for label, interval in line.intervals.items()}
        head = {"level": line.level, "group": line.group, "metric": line.metric}
        lines.append({**head, "means": means, "differences": differences})
    return {
        "notes": list(section.notes),
        "runs": {run.label: {"folder": str(run.folder), "rows": run.rows} for run in section.runs},
        "lines": lines,
        "pairs": [{**vars(pair), "shown": [item.name for item, _ in pair.shown]} for pair in section.pairs],
    }
