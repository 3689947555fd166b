"""The check that a data set is whole."""

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
from tove_llava.eval.benchmarks import Benchmark, EmbeddedImage, Question, get_benchmark
from tove_llava.eval.score_table import first_ids

TEXT_ONLY = "text only"  # the group of a training set's records without an image
_GROUPS = ("category", "domain")  # of a question's metadata
Image = Path | EmbeddedImage
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass
class Completeness:
    """Findings about one data set.

    Attributes:
        root: folder that was looked at.
        questions: their number (of a training set: records); None where the file cannot be read.
        images: distinct images that they are about.
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
        """Return plain types, for JSON; ``complete`` says whether nothing is wrong."""
        return {**asdict(self), "complete": not self.findings}


def check_set(
    data_set: DataSet,
    root: Path,
    decode: bool = True,
    workers: int = 1,
    allow_image_links: bool = False,
    progress: Progress | None = None,
) -> Completeness:
    """Check everything of a public data set; continue after a problem.

    Args:
        root: the folder that the set's parts are relative to.
        decode: decode every image; else only check that it exists.
        workers: processes that decode.
        allow_image_links: let links of a training set's images lead out of the image folder.
        progress: wraps an iterator, given the number of items and a label (a tqdm factory).

    Raises:
        ConfigError: there is no folder ``root``.
    """
    show = progress or (lambda items, total, label: items)
    options = CheckOptions(root, decode=decode, allow_image_links=allow_image_links)
    return _Check(data_set, root, options, workers, show).run()


class _Check:
    def __init__(self, data_set: DataSet, root: Path, options: CheckOptions, workers: int, show: Progress) -> None:
        self.set, self.root, self.options, self.workers, self.show = data_set, root, options, workers, show
        self.result = Completeness(data_set.name, str(root), findings=check_parts(data_set, root))
        self.lost = [root / part.path for part in data_set.parts if part.found(root) is None]

    def run(self) -> Completeness:
        try:
            if self.set.kind == BENCHMARK:
                self._benchmark()
            else:
                self._training()
        except DataError as error:
            self._found("file", str(error))
        self._counts()
        return self.result

    def _found(self, kind: str, message: str) -> None:
        self.result.findings.append(Finding(kind, message))

    def _benchmark(self) -> None:
        benchmark = get_benchmark(self.set.name)
        if benchmark.question_file(self.root) in self.lost:
            return
        questions = benchmark.questions(self.root)
        self.result.questions = len(questions)
        named = [str(q.metadata[key]) for q in questions for key in _GROUPS if key in q.metadata]
        self.result.groups = dict(Counter(named))
        askers: dict[Image, list[Question]] = {}
        for question in questions:
            for image in question.images:
                askers.setdefault(image, []).append(question)
        self.result.images = len(askers)
        wanted = [image for image in askers if not _below(image, self.lost)]
        other_lost = [path for path in self.lost if not any(_below(image, [path]) for image in askers)]
        self._ground_truth(benchmark, questions, bool(other_lost))
        found = parallel_map(_ImageCheck(self.options.decode), wanted, self.workers)
        for image, problem in self.show(found, len(wanted), f"{self.set.name}: images"):
            if problem:
                ids = first_ids([question.question_id for question in askers[image]], 3)
                self._found("picture", f"question {ids}: {problem}")

    def _ground_truth(self, benchmark: Benchmark, questions: Sequence[Question], lost: bool) -> None:
        """Find questions without a right answer, and answers without a question.

        Args:
            lost: a file that it may need is already among the missing parts.
        """
        try:
            truth = benchmark.ground_truth(self.root)
        except DataError as error:
            if not lost:
                self._found("ground truth", str(error))
            return
        if truth is None:
            return
        asked = {benchmark.question_key(question): question.question_id for question in questions}
        known = {benchmark.truth_key(row): row["question_id"] for row in truth}
        unknown = [name for key, name in asked.items() if key not in known]
        unasked = [name for key, name in known.items() if key not in asked]
        for names, text in (
            (unknown, "questions have no ground truth"),
            (unasked, "rows of the ground truth belong to no question"),
        ):
            if names:
                self._found(
                    "ground truth",
                    f"{len(names):,} {text}: {first_ids(names)}; the files are of different releases",
                )

    def _training(self) -> None:
        records, images = self.root / self.set.records, self.root / self.set.image_folder
        if records in self.lost:
            return
        options = replace(self.options, image_folder=images if images.is_dir() else self.root)
        report = check_dataset(records, options, self.workers, self.show)
        self.result.questions, self.result.images = report.records, report.images
        counts = {**report.folders, TEXT_ONLY: report.text_only}
        self.result.groups = {name: counts.get(name, 0) for name in self.set.groups or {}}
        for problem in report.problems:
            if not problem.image:
                self._found("record", problem.message)
            elif not _below(images / problem.image, self.lost):
                self._found("picture", problem.message)

    def _counts(self) -> None:
        """Compare the numbers with the publisher's."""
        what = "questions" if self.set.kind == BENCHMARK else "records"
        pairs = [(what, self.result.questions, self.set.questions), ("images", self.result.images, self.set.images)]
        if self.result.questions is not None and self.set.groups:
            groups = self.result.groups
            pairs += [(f"{what} of {name!r}", groups.get(name, 0), n) for name, n in self.set.groups.items()]
        for label, found, expected in pairs:
            if found is not None and expected is not None and found != expected:
                text = f"{found:,} {label} instead of {expected:,}"
                self._found("count", f"{text}: the file belongs to another release, or is not whole")


def _below(image: Image, folders: Sequence[Path]) -> bool:
    return isinstance(image, Path) and any(folder in image.parents for folder in folders)


@dataclass(frozen=True)
class _ImageCheck:
    decode: bool

    def __call__(self, image: Image) -> tuple[Image, str]:
        """Return the image and its problem; an empty string for none."""
        try:
            if isinstance(image, EmbeddedImage):
                if self.decode:
                    to_rgb(image.open())
            elif not image.is_file():
                return image, f"there is no image file {image}"
            elif self.decode:
                to_rgb(open_image(image))
        except DataError as error:
            return image, str(error)
        return image, ""
