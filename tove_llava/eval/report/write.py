"""The folder of a report's pages."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tove_llava.core.errors import ConfigError
from tove_llava.core.files import check_writable, staged
from tove_llava.eval.report.comparison import compare
from tove_llava.eval.report.page import IMAGES, build, images, render, to_json
from tove_llava.eval.report.published import choose_published
from tove_llava.eval.report.runs import read_runs
from tove_llava.eval.report.statistics import Bootstrap
from tove_llava.eval.report.thumbnails import Thumbnails


@dataclass(frozen=True)
class Options:
    """Settings of a report; see ``tove-llava report --help``."""

    baseline: str | None = None
    benchmarks: Sequence[str] = ()
    conditions: Sequence[str] = ()
    published: str = "all"
    differences: int = 20
    thumbnail: int = 160
    data_root: str | None = None
    resamples: int = 10_000
    seed: int = 0


def write_report(sources: Sequence[str], out: Path, options: Options | None = None) -> dict[str, Any]:
    """Write ``report.html``, ``report.md``, ``pictures/`` and ``report.json``; return the content of the last.

    Args:
        sources: ``FOLDER`` or ``NAME=FOLDER``; see :func:`tove_llava.eval.report.runs.read_runs`.
        out: a folder that does not exist.

    Raises:
        ConfigError: the folder exists, or an option does not fit the runs.
        DataError: results are missing or malformed.
    """
    options = options or Options()
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists already; choose another --out, or move it away")
    check_writable(out)
    runs = read_runs(sources, options.benchmarks, options.conditions)
    published = choose_published(options.published, [run.benchmark for run in runs])
    bootstrap = Bootstrap(options.resamples, options.seed)
    comparison = compare(runs, options.baseline, bootstrap, options.differences)
    thumbnails = Thumbnails(options.thumbnail, options.data_root) if options.thumbnail else None
    content = build(comparison, published, thumbnails)
    html, markdown = render(content)
    record = to_json(comparison, published)
    with staged(out) as stage:
        (stage / "report.html").write_text(html, encoding="utf-8")
        (stage / "report.md").write_text(markdown, encoding="utf-8")
        (stage / "report.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        folder = stage / IMAGES
        folder.mkdir()
        for image in images(content):
            (folder / image.name).write_bytes(image.jpeg)
    return record
