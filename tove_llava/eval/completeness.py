"""Whether a benchmark's data is whole: its parts, the questions and their number, the ground truth, every picture."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.data.check import CheckOptions, check_dataset
from tove_llava.data.images import open_image, to_rgb
from tove_llava.data.parallel import parallel_map
from tove_llava.data.presence import Finding, check_parts
from tove_llava.data.sets import BENCHMARK, DataSet
from tove_llava.eval.benchmarks import Benchmark, Question, get_benchmark
from tove_llava.eval.embedded_image import EmbeddedImage
from tove_llava.eval.score_table import first_ids

TEXT_ONLY = "text only"  # the group of a training set's records without a picture
_GROUPS = ("category", "domain")  # of a question's metadata
Picture = Path | EmbeddedImage
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass
class Completeness:
    """What a check of one data set found.

    Attributes:
        name: of the set.
        root: folder that was looked at.
        questions: how many there are (of a training set: records); None where the file cannot be read.
        images: distinct pictures that they are about.
        groups: questions of each category.
        findings: what is wrong.
    """

    name: str
    root: str
    questions: int | None = None
    images: int | None = None
    groups: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; ``complete`` says whether nothing is wrong."""
        return {**asdict(self), "complete": not self.findings}


def check_set(
    data_set: DataSet,
    root: Path,
    decode: bool = True,
    workers: int = 1,
    allow_image_links: bool = False,
    progress: Progress | None = None,
) -> Completeness:
    """Look at everything of a public data set; go on after a problem.

    Args:
        root: the folder that the set's parts are relative to.
        decode: decode every picture; else only look whether it is there.
        workers: processes that decode.
        allow_image_links: let links of a training set's pictures lead out of the image folder.
        progress: wraps an iterator, given the number of items and a label (a tqdm factory).

    Raises:
        ConfigError: there is no folder ``root``.
    """
    result = Completeness(data_set.name, str(root), findings=check_parts(data_set, root))
    show = progress or (lambda items, total, label: items)
    lost = [root / part.path for part in data_set.parts if part.found(root) is None]
    if data_set.kind == BENCHMARK:
        _check_benchmark(data_set, root, lost, result, decode, workers, show)
    else:
        options = CheckOptions(root, decode=decode, allow_image_links=allow_image_links)
        _check_training(data_set, root, lost, result, options, workers, show)
    _check_counts(data_set, result)
    return result


def _check_benchmark(
    data_set: DataSet,
    root: Path,
    lost: Sequence[Path],
    result: Completeness,
    decode: bool,
    workers: int,
    show: Progress,
) -> None:
    benchmark = get_benchmark(data_set.name)
    if benchmark.question_file(root) in lost:
        return
    try:
        questions = benchmark.questions(root)
    except DataError as error:
        result.findings.append(Finding("file", str(error)))
        return
    result.questions = len(questions)
    named = [str(q.metadata[key]) for q in questions for key in _GROUPS if key in q.metadata]
    result.groups = dict(Counter(named))
    askers: dict[Picture, list[Question]] = {}
    for question in questions:
        if question.image is not None:
            askers.setdefault(question.image, []).append(question)
    result.images = len(askers)
    wanted = [picture for picture in askers if not _below(picture, lost)]
    beside = [place for place in lost if not any(_below(picture, [place]) for picture in askers)]
    result.findings += _ground_truth(benchmark, root, questions, bool(beside))
    found = parallel_map(_PictureCheck(decode), wanted, workers)
    for picture, problem in show(found, len(wanted), f"{data_set.name}: pictures"):
        if problem:
            ids = first_ids([question.question_id for question in askers[picture]], 3)
            result.findings.append(Finding("picture", f"question {ids}: {problem}"))


def _below(picture: Picture, folders: Sequence[Path]) -> bool:
    return isinstance(picture, Path) and any(folder in picture.parents for folder in folders)


@dataclass(frozen=True)
class _PictureCheck:
    decode: bool

    def __call__(self, picture: Picture) -> tuple[Picture, str]:
        """The picture, and what is wrong with it; an empty string if nothing is."""
        try:
            if isinstance(picture, EmbeddedImage):
                if self.decode:
                    to_rgb(picture.open())
            elif not picture.is_file():
                return picture, f"there is no image file {picture}"
            elif self.decode:
                to_rgb(open_image(picture))
        except DataError as error:
            return picture, str(error)
        return picture, ""


def _ground_truth(benchmark: Benchmark, root: Path, questions: Sequence[Question], lost: bool) -> list[Finding]:
    """Questions without a right answer, and right answers to no question.

    Args:
        lost: a file that it may need is named among the missing parts already.
    """
    try:
        truth = benchmark.ground_truth(root)
    except DataError as error:
        return [] if lost else [Finding("ground truth", str(error))]
    if truth is None:
        return []
    asked = {benchmark.answer_key({"question_id": q.question_id, "prompt": q.text}): q.question_id for q in questions}
    known = {benchmark.truth_key(row): row["question_id"] for row in truth}
    unknown = [name for key, name in asked.items() if key not in known]
    unasked = [name for key, name in known.items() if key not in asked]
    findings = []
    if unknown:
        findings.append(f"{len(unknown):,} questions have no ground truth: {first_ids(unknown)}; ")
    if unasked:
        findings.append(f"{len(unasked):,} rows of the ground truth belong to no question: {first_ids(unasked)}; ")
    return [Finding("ground truth", f"{text}the files are of different releases") for text in findings]


def _check_training(
    data_set: DataSet,
    root: Path,
    lost: Sequence[Path],
    result: Completeness,
    options: CheckOptions,
    workers: int,
    show: Progress,
) -> None:
    records, images = root / data_set.records, root / data_set.image_folder
    if records in lost:
        return
    try:
        report = check_dataset(
            records, replace(options, image_folder=images if images.is_dir() else root), workers, show
        )
    except DataError as error:
        result.findings.append(Finding("file", str(error)))
        return
    result.questions, result.images = report.records, report.images
    counts = {**report.folders, TEXT_ONLY: report.text_only}
    result.groups = {name: counts.get(name, 0) for name in data_set.groups or {}}
    for problem in report.problems:
        if not problem.image:
            result.findings.append(Finding("record", problem.message))
        elif not _below(images / problem.image, lost):
            result.findings.append(Finding("picture", problem.message))


def _check_counts(data_set: DataSet, result: Completeness) -> None:
    """Compare with what the publisher says."""
    what = "questions" if data_set.kind == BENCHMARK else "records"
    pairs = [(what, result.questions, data_set.questions), ("pictures", result.images, data_set.images)]
    if result.questions is not None and data_set.groups:
        pairs += [(f"{what} of {name!r}", result.groups.get(name, 0), n) for name, n in data_set.groups.items()]
    for label, found, expected in pairs:
        if found is not None and expected is not None and found != expected:
            text = f"{found:,} {label} instead of {expected:,}: the file is of another release, or not whole"
            result.findings.append(Finding("count", text))
