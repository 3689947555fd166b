"""COCO Caption (Chen et al. 2015, arXiv 1504.00325): Karpathy's test split.

Layout: ``coco_caption/coco_karpathy_test.json`` (a list of ``image`` and ``caption``, as BLIP and LAVIS publish it) and
the images under ``coco_caption/`` by the names it gives (``val2014/...``). An answer's id is the image's, which is
the number at the end of its name.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json
from tove_llava.eval.benchmarks import Question, Score, register_benchmark
from tove_llava.eval.captions import PROMPT, UNAVAILABLE, CaptionBenchmark, caption_scores, remarks, table_rows
from tove_llava.eval.fields import TEXT, a_list, check_rows
from tove_llava.eval.rows import Row

_NUMBER = re.compile(r"(\d+)\.\w+$")


@register_benchmark("coco_caption")
class CocoCaption(CaptionBenchmark):
    """Captions of everyday images."""

    question_path = "coco_caption/coco_karpathy_test.json"

    def questions(self, root: Path) -> list[Question]:
        rows = karpathy_references(self.question_file(root))
        return [Question(row["question_id"], PROMPT, root / "coco_caption" / row["image"]) for row in rows]

    def ground_truth(self, root: Path) -> list[Row]:
        return karpathy_references(self.question_file(root))

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        if Path(file).suffix == ".json" and isinstance(read_json(file), list):
            return karpathy_references(file)
        rows = super().read_ground_truth(file)
        if any("domain" in row for row in rows):
            raise DataError(f"{file} has domains: it is NoCaps' ground truth; give --benchmark nocaps")
        return rows

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        tokens = self.tokens(truth, matched)
        (result,) = caption_scores(tokens, [list(tokens.candidates)])
        details = {"per_item": result.per_image, "tokenized": vars(tokens)}
        rows = table_rows(result.total, len(truth))
        return Score(result.total, len(truth), rows, remarks(tokens, matched), details, unavailable=UNAVAILABLE)


def karpathy_references(file: str | Path) -> list[Row]:
    """Read Karpathy's split, a list of images with their captions."""
    rows = []
    content = read_json(file)
    if not isinstance(content, list):
        raise DataError(f"{file} is no list of images with captions")
    for row in check_rows(content, file, {"image": TEXT, "caption": a_list(str)}):
        found = _NUMBER.search(row["image"])
        if not found:
            raise DataError(f"{file}: the image's name {row['image']!r} must end in its number")
        rows.append({"question_id": int(found.group(1)), "image": row["image"], "references": row["caption"]})
    return rows
