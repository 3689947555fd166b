"""Thumbnails of the images that differing questions are about."""

import io
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from tove_llava.core.errors import DataError, ToveError
from tove_llava.eval.benchmarks import EmbeddedImage, get_benchmark
from tove_llava.eval.report.runs import Run

QUALITY = 80  # of the JPEG


class Thumbnails:
    """A maker of small images, each made once.

    Args:
        side: pixels of the longer side.
        root: folder of the benchmarks' data; by default, the one that each run recorded.
    """

    def __init__(self, side: int = 160, root: str | None = None) -> None:
        self.side = side
        self.root = root
        self._made: dict[tuple[Path, str], bytes | str] = {}

    def of(self, run: Run, name: str) -> bytes | str | None:
        """Return a JPEG, a sentence if it cannot be shown, or None."""
        image = run.items[name].image
        root = Path(self.root or str(run.result.get("data_root", "")))
        if image is None:
            embedded = _embedded(run.benchmark, root)
            if name not in embedded:
                return None
            image = name
        key = (root, f"{run.benchmark}/{image}")
        if key not in self._made:
            self._made[key] = self._make(run, root, image, name)
        return self._made[key]

    def _make(self, run: Run, root: Path, image: str, name: str) -> bytes | str:
        from tove_llava.data.images import open_image, resolve_image, to_rgb

        try:
            if run.items[name].image is None:
                opened = _embedded(run.benchmark, root)[name].open()
            else:
                opened = open_image(resolve_image(root, image, allow_links=True))
            opened = to_rgb(opened)
        except DataError as error:
            return f"no image: {error}"
        opened.thumbnail((self.side, self.side))
        buffer = io.BytesIO()
        opened.save(buffer, "JPEG", quality=QUALITY)
        return buffer.getvalue()


@lru_cache(maxsize=4)
def _embedded(benchmark: str, root: Path) -> Mapping[str, EmbeddedImage]:
    """Return the images inside a question file, by the question's id."""
    try:
        questions = get_benchmark(benchmark).questions(root)
    except ToveError:
        return {}
    return {str(q.question_id): q.image for q in questions if isinstance(q.image, EmbeddedImage)}
