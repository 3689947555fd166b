"""The comparison of runs, as data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt

from tove_llava.core.errors import ConfigError
from tove_llava.eval.report.runs import Item, Run
from tove_llava.eval.report.statistics import Bootstrap, Difference, Interval, holm
from tove_llava.eval.result_files import MARK
from tove_llava.eval.rows import spread
from tove_llava.eval.score_table import MEANINGS, first_ids

# Keys of ``result.json`` whose values should be equal in all columns, except for what is compared.
_SETTINGS = {
    "rule": "the rule of scoring, so they cannot be compared",
    "answering": "the way of answering",
    "decoding": "the decoding",
    "template": "the conversation template",
    "dtype": "the number format",
}

ALL = "all questions"
OVERALL = ""  # the level of the group of all questions


@dataclass(frozen=True)
class Line:
    """One group of questions under one metric.

    Attributes:
        level: kind of group ("category"); empty for all questions.
        intervals: run -> mean with its interval, over the run's own questions, if it has any in this group.
        differences: run -> difference from the baseline, over the questions that both answered.
        corrected: run -> the difference's p after Holm's correction.
    """

    level: str
    group: str
    metric: str
    intervals: Mapping[str, Interval]
    differences: Mapping[str, Difference]
    corrected: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """The baseline and another run on one benchmark.

    Attributes:
        shared: the number of questions that both have, with the same words, image and right answer.
        left_out: the number of other questions.
        differing: the number of shared questions with different values.
        shown: some of those, as each run has them.
    """

    first: str
    second: str
    shared: int
    left_out: int
    differing: int
    shown: Sequence[tuple[Item, Item]]


@dataclass(frozen=True)
class Section:
    """One benchmark."""

    benchmark: str
    runs: Sequence[Run]
    lines: Sequence[Line]
    pairs: Sequence[Pair]
    notes: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """The content of a page; ``baseline`` is a run's heading."""

    baseline: str
    bootstrap: Bootstrap
    sections: Sequence[Section]


def compare(
    runs: Sequence[Run], baseline: str | None = None, bootstrap: Bootstrap | None = None, shown: int = 20
) -> Comparison:
    """Compare runs benchmark by benchmark.

    Args:
        baseline: heading of the run that others are compared with; the first by default.
        shown: the number of differing questions to show per pair of runs.

    Raises:
        ConfigError: no run has that heading.
    """
    labels = list(dict.fromkeys(run.label for run in runs))
    baseline = labels[0] if baseline is None else baseline
    if baseline not in labels:
        raise ConfigError(f"no run is called {baseline!r}; runs: {', '.join(labels)}")
    bootstrap = bootstrap or Bootstrap()
    sections = []
    for benchmark in dict.fromkeys(run.benchmark for run in runs):
        mine = [run for run in runs if run.benchmark == benchmark]
        # The baseline's column comes first.
        mine.sort(key=lambda run: run.label != baseline)
        sections.append(_section(benchmark, mine, baseline, bootstrap, shown))
    return Comparison(baseline, bootstrap, _corrected(sections))


def _section(benchmark: str, runs: Sequence[Run], baseline: str, bootstrap: Bootstrap, shown: int) -> Section:
    base = next((run for run in runs if run.label == baseline and run.items), None)
    others = [run for run in runs if base is not None and run is not base and run.items]
    common = {run.label: shared_names(base, run) for run in others} if base is not None else {}
    lines = []
    for level, group, metric in _groups(runs):
        intervals = {}
        for run in runs:
            valued = [item for item in _members(run, level, group) if metric in item.values]
            if valued:
                values = [item.values[metric] for item in valued]
                intervals[run.label] = bootstrap.interval(values, [item.group for item in valued])
        differences = {}
        for run in others:
            assert base is not None
            members = [i for i in _members(base, level, group) if i.name in common[run.label]]
            if metric in base.metrics and metric in run.metrics and members:
                second = [run.items[item.name].values[metric] for item in members]
                first = [item.values[metric] for item in members]
                differences[run.label] = bootstrap.difference(first, second, [item.group for item in members])
        lines.append(Line(level, group, metric, intervals, differences))
    pairs = [_pair(base, run, common[run.label], shown) for run in others if base is not None]
    return Section(benchmark, runs, lines, pairs, [*_notes(runs, base), *_limits(runs, bootstrap)])


def shared_names(first: Run, second: Run) -> set[str]:
    """Return the names of items that both runs have."""
    return {
        name for name, item in first.items.items() if name in second.items and second.items[name].asked == item.asked
    }


def _groups(runs: Sequence[Run]) -> Iterable[tuple[str, str, str]]:
    """Yield (level, group, metric) of every line, all questions first."""
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.metrics))
    found: dict[str, set[str]] = {}
    for run in runs:
        for item in run.items.values():
            for level, names in item.groups.items():
                found.setdefault(level, set()).update(names)
    yield from ((OVERALL, ALL, metric) for metric in metrics)
    for level in found:
        for name in sorted(found[level]):
            yield from ((level, name, metric) for metric in metrics)


def _members(run: Run, level: str, group: str) -> list[Item]:
    return [item for item in run.items.values() if level == OVERALL or group in item.groups.get(level, ())]


def _pair(first: Run, second: Run, shared: set[str], shown: int) -> Pair:
    left_out = len(set(first.items) | set(second.items)) - len(shared)
    metric = MARK if MARK in first.metrics else first.metrics[-1]  # CIDEr is the last of the caption metrics
    changes = {
        name: second.items[name].values.get(metric, 0.0) - item.values[metric]
        for name, item in first.items.items()
        if name in shared
    }
    better = [name for name, change in changes.items() if change > 0]
    worse = [name for name, change in changes.items() if change < 0]
    # Half of each kind, the largest changes first; if one kind is rare, the other fills up.
    half = shown // 2
    some = max(shown - half, shown - len(worse))
    chosen = _largest(worse, changes, shown - min(some, len(better))) + _largest(better, changes, some)
    items = [(first.items[name], second.items[name]) for name in chosen]
    return Pair(first.label, second.label, len(shared), left_out, len(better) + len(worse), items)


def _largest(names: Sequence[str], changes: Mapping[str, float], number: int) -> list[str]:
    """Choose the largest changes, equal ones evenly spread over the file."""
    ranked = sorted(names, key=lambda name: -abs(changes[name]))
    if number >= len(ranked):
        return ranked
    if number <= 0:
        return []
    edge = abs(changes[ranked[number - 1]])
    above = [name for name in ranked if abs(changes[name]) > edge]
    equal = [name for name in ranked if abs(changes[name]) == edge]
    return above + spread(equal, number - len(above))


def _notes(runs: Sequence[Run], base: Run | None) -> list[str]:
    """List remarks that a reader needs before comparing the columns."""
    notes = []
    for run in runs:
        if not run.items:
            notes.append(f"{run.label}: this score is no mean over questions, so it has no interval and no test.")
        for name, reason in (run.result.get("unavailable") or {}).items():
            notes.append(f"{run.label}: {name} is unavailable ({reason}).")
        for key, meaning in MEANINGS.items():
            ids = run.result.get(key)
            if isinstance(ids, list) and ids:
                notes.append(f"{run.label}: {len(ids)} {meaning}: {first_ids(ids, 5)}.")
        if run.result.get("limit") is not None:
            notes.append(f"{run.label}: {run.result['count']} questions by --limit, not the whole benchmark.")
    for key, what in _SETTINGS.items():
        if len({str(run.result.get(key)) for run in runs}) > 1:
            values = "; ".join(f"{run.label}: {run.result.get(key)}" for run in runs)
            notes.append(f"The columns differ in {what}: {values}.")
    for run in runs:
        if base is not None and run.result["data"] != base.result["data"]:
            notes.append(f"{run.label} and {base.label} were asked different questions; see the shared ones below.")
    return notes


def _limits(runs: Sequence[Run], bootstrap: Bootstrap) -> Iterable[str]:
    """Say what the benchmark could show at all."""
    for run in runs:
        items = list(run.items.values())
        images = len({item.group for item in items})
        if images < len(items):
            yield (
                f"{run.label}: {len(items)} questions are about {images} images; intervals and tests resample images."
            )
        metric = MARK if MARK in run.metrics else None
        if len(runs) > 1 or metric is None:
            continue
        found = bootstrap.detectable([item.values[metric] for item in items], [item.group for item in items])
        if found:
            yield (
                f"Another model is told apart from {run.label} four times in five if it differs by about "
                f"{100 * sqrt(2) * found:.1f} points. Models that err on the same questions need less."
            )


def _corrected(sections: Sequence[Section]) -> list[Section]:
    """Apply Holm's correction over all questions' lines, and in each level."""
    families: dict[tuple[str, str], dict[tuple[str, int, str], float]] = {}
    for section in sections:
        for index, line in enumerate(section.lines):
            family = (OVERALL, OVERALL) if line.level == OVERALL else (section.benchmark, line.level)
            for label, difference in line.differences.items():
                families.setdefault(family, {})[section.benchmark, index, label] = difference.p
    known = {key: p for family in families.values() for key, p in holm(family).items()}
    return [
        replace(
            section,
            lines=[
                replace(line, corrected={label: known[section.benchmark, index, label] for label in line.differences})
                for index, line in enumerate(section.lines)
            ],
        )
        for section in sections
    ]
