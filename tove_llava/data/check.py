"""Check every record, image and length of a data set before training."""

import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data.dataset import truncate
from tove_llava.data.images import MAX_PIXELS, open_image, resolve_image, to_rgb
from tove_llava.data.parallel import parallel_map
from tove_llava.data.records import Record, parse_record, prepare_turns, read_records, record_name
from tove_llava.data.templates import Template, Turn, get_template
from tove_llava.data.tokenization import encode_turns

#: kinds of problem, in the order in which a record is checked
KINDS = ("structure", "conversation", "length", "image")


@dataclass(frozen=True)
class Problem:
    """A fault of one record; ``image`` names the image at fault."""

    index: int
    id: str
    kind: str
    message: str
    image: str = ""


@dataclass
class CheckReport:
    """The result of :func:`check_dataset`.

    Attributes:
        file: the data file.
        records: number of its records.
        bad: number of records with a problem.
        problems: all problems, by index.
        counts: problems by kind.
        images: distinct image files.
        image_modes: images by Pillow mode.
        text_only: records without an image.
        multi_image: records with several images.
        turns: most turns of a record.
        folders: records by the first folder of their first image's path.
        duplicate_ids: ids that occur more than once (harmless).
        tokens: with a tokenizer: mean and largest length (images expanded), mean of supervised tokens, and number of
            records that are cut at the maximum length.
    """

    file: str
    records: int = 0
    bad: int = 0
    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    images: int = 0
    image_modes: dict[str, int] = field(default_factory=dict)
    text_only: int = 0
    multi_image: int = 0
    turns: int = 0
    folders: dict[str, int] = field(default_factory=dict)
    duplicate_ids: int = 0
    tokens: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class CheckOptions:
    """Settings of :func:`check_dataset`.

    Attributes:
        image_folder: folder of the images; None checks no image.
        template: conversation template.
        tokenizer: measures lengths; None measures none.
        num_image_tokens: tokens of an image in the sequence.
        model_max_length: longest sequence.
        decode: decode each image; otherwise only check that it exists.
        allow_image_links, max_pixels: see :mod:`tove_llava.data.images`.
    """

    image_folder: str | Path | None = None
    template: str = "v1"
    tokenizer: PreTrainedTokenizerBase | None = None
    num_image_tokens: int = 576
    model_max_length: int = 2048
    decode: bool = True
    allow_image_links: bool = False
    max_pixels: int = MAX_PIXELS


_Length = tuple[int, int, bool]  # tokens, supervised tokens, cut at the maximum
_Show = Callable[[Iterable[Any], int, str], Iterable[Any]]


def check_dataset(
    data_path: str | Path, options: CheckOptions, workers: int = 1, progress: _Show | None = None
) -> CheckReport:
    """Check everything in a data set, without stopping at a problem.

    Args:
        data_path: a JSON or JSONL file.
        options: what to check.
        workers: number of processes.
        progress: wraps an iterator, given the number of items and a label (a tqdm factory).

    Raises:
        DataError: the file itself cannot be read.
        ConfigError: the template does not exist, or the image folder.
    """
    if workers < 1:
        raise ConfigError(f"the number of workers must be positive, not {workers}")
    if options.image_folder is not None and not os.path.isdir(options.image_folder):
        raise ConfigError(f"there is no image folder {options.image_folder}; check --image-folder")
    template = get_template(options.template)
    raw = read_records(data_path)
    show = progress or (lambda items, total, label: items)
    report = CheckReport(str(data_path), records=len(raw), duplicate_ids=_duplicates(raw))

    lengths: list[_Length] = []
    images: dict[str, list[tuple[int, str]]] = {}  # name -> index and id of its records
    results = parallel_map(_RecordCheck(str(data_path), options, template), list(enumerate(raw)), workers)
    for record, problem, length in show(results, len(raw), "records"):
        if problem is not None:
            report.problems.append(problem)
        if length is not None:
            lengths.append(length)
        if record is not None:
            _count(record, report)
            for name in record.images:
                images.setdefault(name, []).append((record.index, record.id))
    report.images = len(images)
    if options.image_folder is not None:
        found = parallel_map(_ImageCheck(options), list(images), workers)
        _add_images(show(found, len(images), "images"), images, report)
    elif images:
        raise ConfigError(f"{data_path} has images; say where they are with --image-folder")

    report.problems.sort(key=lambda problem: (problem.index, KINDS.index(problem.kind)))
    report.bad = len({problem.index for problem in report.problems})
    counts = Counter(problem.kind for problem in report.problems)
    report.counts = {kind: counts[kind] for kind in KINDS if counts[kind]}
    if lengths:
        totals, supervised, cut = zip(*lengths, strict=True)
        report.tokens = {
            "mean": round(statistics.fmean(totals), 1),
            "max": max(totals),
            "mean_supervised": round(statistics.fmean(supervised), 1),
            "truncated": sum(cut),
        }
    return report


def _count(record: Record, report: CheckReport) -> None:
    report.text_only += not record.images
    report.multi_image += len(record.images) > 1
    report.turns = max(report.turns, len(record.turns))
    folder, slash, _ = (record.images or ("",))[0].partition("/")
    if slash:
        report.folders[folder] = report.folders.get(folder, 0) + 1


def _add_images(
    found: Iterable[tuple[str, str, str]], images: dict[str, list[tuple[int, str]]], report: CheckReport
) -> None:
    modes: Counter[str] = Counter()
    for name, mode, message in found:
        modes[mode] += bool(mode)
        for index, record_id in images[name] if message else []:
            where = record_name(report.file, index, record_id)
            report.problems.append(Problem(index, record_id, "image", f"{where}: {message}", name))
    report.image_modes = {mode: count for mode, count in sorted(modes.items()) if count}


@dataclass(frozen=True)
class _RecordCheck:
    file: str
    options: CheckOptions
    template: Template

    def __call__(self, item: tuple[int, Any]) -> tuple[Record | None, Problem | None, _Length | None]:
        index, raw = item
        kind, record = "structure", None
        try:
            record = parse_record(raw, index, self.file)
            kind = "conversation"
            turns = prepare_turns(record, self.template)
            kind = "length"
            if not any(turn.role == "assistant" and turn.text for turn in turns):
                raise DataError(f"{record.where}: no answer to learn from; add one or take the record out")
            return record, None, self._length(record, turns)
        except DataError as error:
            record_id = str(raw.get("id", "")) if isinstance(raw, dict) else ""
            return record, Problem(index, record_id, kind, str(error)), None

    def _length(self, record: Record, turns: list[Turn]) -> _Length | None:
        options = self.options
        if options.tokenizer is None:
            return None
        with record.errors():
            images = bool(record.images) or self.template.single_turn
            encoded = encode_turns(turns, options.tokenizer, self.template, images)
        total = len(encoded.input_ids) + encoded.num_images * (options.num_image_tokens - 1)
        kept = truncate(encoded, options.model_max_length, options.num_image_tokens)
        if not kept.num_supervised:
            raise DataError(
                f"{record.where}: the answers lie beyond the maximum length of {options.model_max_length} (the record "
                f"has {total} tokens); shorten the questions or raise the maximum"
            )
        return total, kept.num_supervised, total > options.model_max_length


@dataclass(frozen=True)
class _ImageCheck:
    options: CheckOptions

    def __call__(self, name: str) -> tuple[str, str, str]:
        """Return name, mode, and the problem (empty if there is none)."""
        options, mode = self.options, ""
        try:
            file = resolve_image(options.image_folder or "", name, options.allow_image_links)
            if options.decode:
                image = open_image(file, options.max_pixels)
                mode = image.mode
                to_rgb(image)
        except DataError as error:
            return name, mode, str(error)
        return name, mode, ""


def _duplicates(raw: Sequence[Any]) -> int:
    ids = Counter(str(record["id"]) for record in raw if isinstance(record, dict) and "id" in record)
    return sum(count > 1 for count in ids.values())
