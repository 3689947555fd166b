"""Caption metrics of pycocoevalcap 1.2, for COCO Caption and NoCaps."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json
from tove_llava.eval import java
from tove_llava.eval.benchmarks import Benchmark
from tove_llava.eval.fields import ID, Kinds, a_list, check_rows
from tove_llava.eval.matching import Matched
from tove_llava.eval.rows import Row, read_truth

PROMPT = "Provide a one-sentence caption for the provided image."
METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
UNAVAILABLE = {"SPICE": "its parser's models are not part of pycocoevalcap"}
_RECORD: Kinds = {"image_id": ID, "references": a_list(str)}


@dataclass(frozen=True)
class CaptionScores:
    """Metrics of a set of images, as a whole and per image."""

    total: dict[str, float]
    per_image: dict[Hashable, dict[str, float]]


@dataclass(frozen=True)
class Tokens:
    """Tokenized captions by image id."""

    candidates: dict[Hashable, str]
    references: dict[Hashable, list[str]]

    @classmethod
    def of(cls, candidates: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]) -> "Tokens":
        """Tokenize; both mappings have the same keys.

        Raises:
            ConfigError: Java or pycocoevalcap is missing.
        """
        tokenized = java.tokenize(list(candidates.values()))
        known = iter(java.tokenize([text for texts in references.values() for text in texts]))
        return cls(
            dict(zip(candidates, tokenized, strict=True)),
            {key: [next(known) for _ in texts] for key, texts in references.items()},
        )


def caption_scores(tokens: Tokens, subsets: Sequence[Sequence[Hashable]]) -> list[CaptionScores]:
    """Compute all metrics for each subset as if it were all images.

    Raises:
        ConfigError: Java or pycocoevalcap is missing, or METEOR failed.
        DataError: the references of a subset hold no word at all.
    """
    with java.Meteor() as meteor:
        counts = {key: meteor.statistics(tokens.candidates[key], tokens.references[key]) for key in tokens.candidates}
        return [_scores(tokens, subset, meteor.evaluate([counts[key] for key in subset])) for subset in subsets]


def _scores(tokens: Tokens, keys: Sequence[Hashable], meteor: tuple[float, list[float]]) -> CaptionScores:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates = {key: [tokens.candidates[key]] for key in keys}
    references = {key: tokens.references[key] for key in keys}
    if not any(text for texts in references.values() for text in texts):
        raise DataError("the reference captions hold no words, so there is nothing to compare with")
    bleu, bleus = Bleu(4).compute_score(references, candidates, verbose=0)
    rouge, rouges = Rouge().compute_score(references, candidates)
    cider, ciders = Cider().compute_score(references, candidates)
    columns = [*bleus, meteor[1], rouges, ciders]
    return CaptionScores(
        dict(zip(METRICS, map(float, [*bleu, meteor[0], rouge, cider]), strict=True)),
        {
            key: dict(zip(METRICS, (float(column[index]) for column in columns), strict=True))
            for index, key in enumerate(keys)
        },
    )


class CaptionBenchmark(Benchmark):
    """One caption an image, against several human ones."""

    max_new_tokens = 128

    def check_requirements(self) -> None:
        java.check()

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        """Read references from JSONL (``image_id``, ``references``) or COCO's format."""
        if Path(file).suffix == ".jsonl":
            rows = read_truth(file, _RECORD)
        else:
            rows = check_rows(coco_references(file), file, _RECORD)
        return [{"question_id": row["image_id"], **row} for row in rows]

    @staticmethod
    def tokens(truth: Sequence[Mapping[str, Any]], matched: Matched) -> Tokens:
        """Tokenize answers and references; a missing answer is an empty caption."""
        keys = [row["question_id"] for row in truth]
        candidates = {key: text or "" for key, text in zip(keys, matched.texts, strict=True)}
        return Tokens.of(candidates, {row["question_id"]: row["references"] for row in truth})


def remarks(tokens: Tokens, matched: Matched) -> dict[str, Any]:
    """Return a report's entries: ids that need attention."""
    wordless = [key for key, texts in tokens.references.items() if not any(texts)]
    return {**matched.notes(), "wordless_references": wordless}


def coco_references(file: str | Path) -> list[Row]:
    """Read a COCO caption file, ``images`` with all their keys."""
    content = read_json(file)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise DataError(f"{file} has no 'images' and 'annotations'; give a caption file of the COCO format")
    captions: dict[Any, list[str]] = {}
    for row in check_rows(content["annotations"], file, {"image_id": ID, "caption": str}):
        captions.setdefault(row["image_id"], []).append(row["caption"])
    images = check_rows(content["images"], file, {"id": ID})
    return [{**row, "image_id": row["id"], "references": captions.get(row["id"], [])} for row in images]


def table_rows(total: Mapping[str, float], count: int, prefix: str = "") -> dict[str, tuple[float, int]]:
    """Return rows of the report, times 100 as papers print them."""
    return {f"{prefix}{name}": (100 * value, count) for name, value in total.items()}
