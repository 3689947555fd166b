"""Check every record, image and length of a data set before training."""

import os
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.text import printable
from tove_llava.data.data_files import DataFiles
from tove_llava.data.dataset import truncate
from tove_llava.data.dialects import unread_keys
from tove_llava.data.images import MAX_PIXELS, check_shape, naming, open_image, resolve_image, to_rgb
from tove_llava.data.parallel import parallel_map
from tove_llava.data.records import Record, prepare_turns, record_name
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
        unread_keys: records by key that nothing reads (harmless).
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
    unread_keys: dict[str, int] = field(default_factory=dict)
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
        image_size, image_aspect_ratio: how training brings images to a square; by default ``square`` for the template
            of stage 1, ``pad`` for others.
        image_placeholder: see :func:`tove_llava.data.records.place_images`.
        allow_image_links, max_pixels: see :mod:`tove_llava.data.images`.
    """

    image_folder: str | Path | None = None
    template: str = "v1"
    tokenizer: PreTrainedTokenizerBase | None = None
    num_image_tokens: int = 576
    model_max_length: int = 2048
    decode: bool = True
    image_size: int = 336
    image_aspect_ratio: str | None = None
    image_placeholder: str = "written"
    allow_image_links: bool = False
    max_pixels: int = MAX_PIXELS


_Length = tuple[int, int, bool]  # tokens, supervised tokens, cut at the maximum
_ImageKey = str | tuple[int, int]  # a file's name; record and number of an image inside the data file
_Show = Callable[[Iterable[Any], int, str], Iterable[Any]]


def check_dataset(
    data_path: str | Path, options: CheckOptions, workers: int = 1, progress: _Show | None = None
) -> CheckReport:
    """Check everything in a data set, without stopping at a problem.

    Args:
        data_path: data files, see :class:`tove_llava.data.data_files.DataFiles`.
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
    files = DataFiles(data_path, options.image_placeholder)
    show = progress or (lambda items, total, label: items)
    report = CheckReport(str(data_path), records=len(files))

    lengths: list[_Length] = []
    images: dict[_ImageKey, list[tuple[int, str]]] = {}  # index and id of its records
    ids, unread = array("q"), Counter[str]()
    results = parallel_map(_RecordCheck(files, options, template), range(len(files)), workers)
    for index, checked in enumerate(show(results, len(files), "records")):
        unread.update(checked.unread)
        if checked.id is not None:
            ids.append(hash(checked.id))
        if checked.problem is not None:
            report.problems.append(checked.problem)
        if checked.length is not None:
            lengths.append(checked.length)
        if checked.turns:
            _count(checked, report)
        for key in checked.images:
            images.setdefault(key, []).append((index, checked.id or ""))
    report.duplicate_ids = int((np.unique(np.array(ids), return_counts=True)[1] > 1).sum())
    report.unread_keys = dict(unread.most_common())
    report.images = len(images)
    if options.image_folder is not None or not any(isinstance(key, str) for key in images):
        ratio = options.image_aspect_ratio or ("square" if template.single_turn else "pad")
        found = parallel_map(_ImageCheck(files, options, ratio), list(images), workers)
        _add_images(show(found, len(images), "images"), images, files, report)
    else:
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


@dataclass(frozen=True)
class _Checked:
    """The result of one record's check, without the record's content."""

    id: str | None
    images: tuple[_ImageKey, ...] = ()
    turns: int = 0
    problem: Problem | None = None
    length: _Length | None = None
    unread: tuple[str, ...] = ()


def _count(checked: _Checked, report: CheckReport) -> None:
    report.text_only += not checked.images
    report.multi_image += len(checked.images) > 1
    report.turns = max(report.turns, checked.turns)
    first = (checked.images or ("",))[0]
    folder, slash, _ = first.partition("/") if isinstance(first, str) else ("", "", "")
    if slash:
        report.folders[folder] = report.folders.get(folder, 0) + 1


def _add_images(
    found: Iterable[tuple[_ImageKey, str, str]],
    images: dict[_ImageKey, list[tuple[int, str]]],
    files: DataFiles,
    report: CheckReport,
) -> None:
    modes: Counter[str] = Counter()
    for key, mode, message in found:
        modes[mode] += bool(mode)
        for index, record_id in images[key] if message else []:
            file, number = files.place(index)
            where = record_name(file, number, record_id)
            name = key if isinstance(key, str) else ""
            report.problems.append(Problem(index, record_id, "image", f"{where}: {message}", name))
    report.image_modes = {mode: count for mode, count in sorted(modes.items()) if count}


@dataclass(frozen=True)
class _RecordCheck:
    files: DataFiles
    options: CheckOptions
    template: Template

    def __call__(self, index: int) -> _Checked:
        kind, raw = "structure", None
        checked = _Checked(None)
        try:
            raw = self.files.raw(index)
            if isinstance(raw, dict):
                known = str(printable(raw["id"])) if "id" in raw else None
                checked = _Checked(known, unread=tuple(unread_keys(raw)))
            record = self.files.parse(raw, index)
            inside = record.contents or (None,) * len(record.images)
            keys = (name if inside[k] is None else (index, k) for k, name in enumerate(record.images))
            checked = replace(checked, images=tuple(keys), turns=len(record.turns))
            kind = "conversation"
            turns = prepare_turns(record, self.template)
            kind = "length"
            if not any(turn.role == "assistant" and turn.text for turn in turns):
                raise DataError(f"{record.where}: no answer to learn from; add one or take the record out")
            return replace(checked, length=self._length(record, turns))
        except DataError as error:
            return replace(checked, problem=Problem(index, checked.id or "", kind, str(error)))

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
    files: DataFiles
    options: CheckOptions
    aspect_ratio: str

    def __call__(self, key: _ImageKey) -> tuple[_ImageKey, str, str]:
        """Return key, mode, and the problem (empty if there is none)."""
        options, mode = self.options, ""
        try:
            if isinstance(key, str):
                file, name = resolve_image(options.image_folder or "", key, options.allow_image_links), None
            else:
                record = self.files[key[0]]
                file, name = record.contents[key[1]], record.images[key[1]]
            if options.decode:
                image = open_image(file, options.max_pixels, name)
                mode = image.mode
                with naming(file if name is None else name):
                    check_shape(image, options.image_size, self.aspect_ratio, options.max_pixels)
                    to_rgb(image)
        except DataError as error:
            return key, mode, str(error)
        return key, mode, ""
