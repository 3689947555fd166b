"""A comparison as the blocks of a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from tove_llava.eval.report.comparison import OVERALL, Comparison, Differing, Line, Pair, Section
from tove_llava.eval.report.document import Block, Bullets, Cell, Fold, Heading, Picture, Table, Text
from tove_llava.eval.report.published import Published
from tove_llava.eval.report.runs import Item, Run
from tove_llava.eval.report.statistics import Difference, Interval
from tove_llava.eval.report.thumbnails import Thumbnails
from tove_llava.eval.result_files import MARK

TITLE = "Comparison of runs"
SIGNIFICANT = 0.05
_LONG = 400  # characters of a question or an answer
_NONE = "–"


def build(comparison: Comparison, published: Sequence[Published], thumbnails: Thumbnails | None) -> list[Block]:
    """The whole page.

    Args:
        published: models from papers; each benchmark shows those that have figures of it.
        thumbnails: None for a page without pictures.
    """
    blocks: list[Block] = [Heading(1, TITLE), *_runs(comparison), *_method(comparison)]
    for section in comparison.sections:
        blocks += _section(section, comparison, published, thumbnails)
    return blocks


def _runs(comparison: Comparison) -> list[Block]:
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
                    _number(found.get("seconds")),
                    _number(found.get("questions_per_second")),
                    _number(found.get("images_per_second")),
                ]
            )
    text = (
        "Weights and data (questions / right answers) are digests. Seconds and rates are of the questions that a run "
        "answered itself, without those that an earlier, interrupted one had answered."
    )
    return [Heading(2, "Runs"), Table(header, rows, left=7), Text(text)]


def _method(comparison: Comparison) -> list[Block]:
    how = comparison.bootstrap
    return [
        Fold(
            "How intervals and tests are made",
            [
                Bullets(
                    [
                        f"In brackets: {100 * how.level:g} % percentile bootstrap intervals over questions, "
                        f"{how.resamples:,} resamples, seed {how.seed}. Several questions about one picture count as "
                        "independent. Where a run is right, or wrong, everywhere, the interval has no width and says "
                        "too much.",
                        f"Differences are from {comparison.baseline!r}, over the questions that both runs were asked. "
                        "(+a −b): on a questions the run earned more, on b less.",
                        "p is two-sided: McNemar's exact test where a question is right or wrong, else a bootstrap of "
                        "the differences.",
                        "p (Holm) is corrected for the number of tests: those over all questions together, and those "
                        f"of each kind of group of a benchmark. A star marks values below {SIGNIFICANT:g}.",
                    ]
                )
            ],
        )
    ]


def _section(
    section: Section, comparison: Comparison, published: Sequence[Published], thumbnails: Thumbnails | None
) -> list[Block]:
    blocks: list[Block] = [Heading(2, section.benchmark)]
    if section.notes:
        blocks.append(Bullets(section.notes))
    blocks += [Heading(3, "Scores"), _scores(section.runs)]
    papers = [model for model in published if section.benchmark in model.scores]
    if papers:
        blocks += _published(section.benchmark, papers)
    levels = dict.fromkeys(line.level for line in section.lines)
    for level in levels:
        lines = [line for line in section.lines if line.level == level]
        table = _lines(lines, section, comparison.baseline)
        title = "Means over questions, times 100" if level == OVERALL else f"By {level}"
        blocks += [Heading(3, title), table] if level == OVERALL else [Fold(title, [table])]
    for number, pair in enumerate(section.pairs):
        blocks += _pair(pair, section, number, thumbnails)
    return blocks


def _scores(runs: Sequence[Run]) -> Table:
    labels = dict.fromkeys(label for run in runs for label in run.rows)
    rows = []
    for label in labels:
        cells = [run.rows.get(label) for run in runs]
        counts = sorted({cell[1] for cell in cells if cell is not None})
        shown = [_NONE if cell is None else f"{cell[0]:.1f}" for cell in cells]
        rows.append([label, *shown, "/".join(map(str, counts))])
    return Table(["score", *(run.label for run in runs), "questions"], rows)


def _published(benchmark: str, models: Sequence[Published]) -> list[Block]:
    labels = list(dict.fromkeys(label for model in models for label in model.scores[benchmark]))
    rows = [
        [
            f"{model.name} (published)",
            f"{model.paper} (arXiv {model.arxiv}): {model.source}. {model.note}".strip(),
            *(_figure(model.scores[benchmark].get(label)) for label in labels),
        ]
        for model in models
    ]
    return [Heading(3, "Published figures, not measured here"), Table(["model", "source", *labels], rows, left=2)]


def _lines(lines: Sequence[Line], section: Section, baseline: str) -> Table:
    runs = [run.label for run in section.runs if any(run.label in line.intervals for line in lines)]
    others = [label for label in runs if any(label in line.differences for line in lines)]
    header = ["questions", "n", *runs]
    for label in others:
        header += [f"{label} less {baseline}", "p", "p (Holm)"]
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


def _pair(pair: Pair, section: Section, number: int, thumbnails: Thumbnails | None) -> list[Block]:
    runs = {run.label: run for run in section.runs}
    text = f"They were asked {pair.shared} same questions and earned different values on {pair.differing}."
    if pair.left_out:
        text += f" {pair.left_out} questions that only one was asked, or in other words, are left out."
    blocks: list[Block] = [Heading(3, f"Where {pair.second} and {pair.first} differ"), Text(text)]
    if not pair.shown:
        return blocks
    header = ["question", "right answer", pair.first, pair.second]
    rows: list[list[Cell]] = []
    for index, differing in enumerate(pair.shown):
        cells: list[Cell] = [
            _short(differing.item.prompt or differing.item.name),
            _short(differing.item.expected),
            _answer(differing.first),
            _answer(differing.second),
        ]
        if thumbnails is not None:
            name = f"{section.benchmark}-{number}-{index}.jpg"
            cells.insert(0, _picture(differing, runs[pair.first], thumbnails, name))
        rows.append(cells)
    if thumbnails is not None:
        header.insert(0, "picture")
    title = f"{len(rows)} of these {pair.differing} questions"
    return [*blocks, Fold(title, [Table(header, rows, left=len(header))])]


def _picture(differing: Differing, run: Run, thumbnails: Thumbnails, name: str) -> Cell:
    found = thumbnails.of(run, differing.item.name)
    if isinstance(found, bytes):
        return Picture(found, name, differing.item.image or differing.item.name)
    return found or "no picture"


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
        return [_NONE] * 3
    i = difference.interval
    shown = f"{100 * i.mean:+.1f} [{100 * i.low:+.1f}, {100 * i.high:+.1f}] (+{difference.better} −{difference.worse})"
    return [shown, _p(difference.p), _p(corrected) + (" *" if corrected < SIGNIFICANT else "")]


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else _NONE


def _figure(value: float | None) -> str:
    return _NONE if value is None else f"{value:g}"


def to_json(comparison: Comparison, published: Sequence[Published]) -> dict[str, Any]:
    """What the page says, for programs."""
    how = comparison.bootstrap
    return {
        "baseline": comparison.baseline,
        "bootstrap": {"resamples": how.resamples, "seed": how.seed, "level": how.level},
        "benchmarks": {section.benchmark: _section_json(section) for section in comparison.sections},
        "published": {model.key: vars(model) for model in published},
    }


def _section_json(section: Section) -> Mapping[str, Any]:
    return {
        "notes": list(section.notes),
        "runs": {run.label: {"folder": str(run.folder), "rows": run.rows} for run in section.runs},
        "lines": [
            {
                "level": line.level,
                "group": line.group,
                "metric": line.metric,
                "means": {label: vars(interval) for label, interval in line.intervals.items()},
                "differences": {
                    label: {
                        **vars(difference.interval),
                        "p": difference.p,
                        "p_holm": line.corrected[label],
                        "test": difference.test,
                        "better": difference.better,
                        "worse": difference.worse,
                    }
                    for label, difference in line.differences.items()
                },
            }
            for line in section.lines
        ],
        "pairs": [
            {
                "first": pair.first,
                "second": pair.second,
                "shared": pair.shared,
                "left_out": pair.left_out,
                "differing": pair.differing,
                "shown": [differing.item.name for differing in pair.shown],
            }
            for pair in section.pairs
        ],
    }
