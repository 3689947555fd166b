"""NoCaps (Agrawal et al. 2019, arXiv 1812.08658): objects that COCO's captions lack.

Layout, with the official file: ``nocaps/nocaps_val_4500_captions.json`` (``images`` with ``id``, ``file_name`` and
``domain``; ``annotations``) and ``nocaps/images/``.
"""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import Question, Score, register_benchmark
from tove_llava.eval.captions import PROMPT, UNAVAILABLE, CaptionBenchmark, caption_scores, remarks, table_rows
from tove_llava.eval.fields import TEXT, check_rows
from tove_llava.eval.rows import Row

DOMAINS = ("in-domain", "near-domain", "out-domain")
SUBSET, MEANS = "subset", "means"
_MEAN_METRICS = ("CIDEr", "ROUGE_L", "METEOR")


@register_benchmark("nocaps")
class NoCaps(CaptionBenchmark):
    """Caption metrics over all images and by domain."""

    question_path = "nocaps/nocaps_val_4500_captions.json"
    rules = {
        SUBSET: "a domain's scores are those of its images only, CIDEr's document frequencies included",
        MEANS: "a domain's scores are means of its images' scores in the run over all images",
    }

    def questions(self, root: Path) -> list[Question]:
        file = self.question_file(root)
        rows = check_rows(self.read_ground_truth(file), file, {"file_name": TEXT})
        images = root / "nocaps" / "images"
        return [
            Question(row["question_id"], PROMPT, images / row["file_name"], {"domain": row["domain"]}) for row in rows
        ]

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        return check_rows(super().read_ground_truth(file), file, {"domain": TEXT})

    def groups(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        return {"domain": [row["domain"]]}

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        tokens = self.tokens(truth, matched)
        members: dict[str, list[Hashable]] = {}
        for row in truth:
            members.setdefault(row["domain"], []).append(row["question_id"])
        names = [name for name in DOMAINS if name in members] + sorted(set(members) - set(DOMAINS))
        subsets = [members[name] for name in names] if self.rule == SUBSET else []
        whole, *parts = caption_scores(tokens, [list(tokens.candidates), *subsets])
        if self.rule == SUBSET:
            domains = {name: part.total for name, part in zip(names, parts, strict=True)}
        else:
            domains = {name: _means([whole.per_image[key] for key in members[name]]) for name in names}
        rows = table_rows(whole.total, len(truth))
        for name, scores in domains.items():
            rows |= table_rows(scores, len(members[name]), f"{name} ")
        extras = {
            "domains": {name: {**scores, "count": len(members[name])} for name, scores in domains.items()},
            **remarks(tokens, matched),
        }
        details = {"per_item": whole.per_image, "tokenized": vars(tokens)}
        return Score(whole.total, len(truth), rows, extras, details, {}, UNAVAILABLE, self.rule)


def _means(images: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {metric: mean([image[metric] for image in images]) for metric in _MEAN_METRICS}
