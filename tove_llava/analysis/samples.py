"""Calibration data: LLaVA records, or the playground's questions."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tove_llava.checkpoints.manifest import MANIFEST, Manifest
from tove_llava.core.errors import DataError
from tove_llava.data import IMAGE_PLACEHOLDER, Record, encode_record
from tove_llava.data.data_files import DataFiles
from tove_llava.data.dataset import Example, truncate
from tove_llava.data.images import resolve_image
from tove_llava.data.records import prepare_turns
from tove_llava.eval.rows import spread
from tove_llava.inference.generation import Answerer

SHORT_REPLY_WORDS = 5
COUNTED = f"the first reply of each record, where it has at most {SHORT_REPLY_WORDS} words"


@dataclass(frozen=True)
class Sample:
    """A record with at least one image, ready to be measured.

    Attributes:
        category: its question type, from the record's ``category``; None where it has none.
        files: image files in the order of the placeholders that are left after the cut at ``model_max_length``.
        input_ids, labels: int64 [L], as in training; an image is one -200.
        prompt: ids of the first question; None when the reply to it is not short.
        prompt_files: images of that question.
        reply: the reference's first reply.
    """

    category: str | None
    files: tuple[Path, ...]
    input_ids: torch.Tensor
    labels: torch.Tensor
    prompt: list[int] | None
    prompt_files: tuple[Path, ...]
    reply: str

    @property
    def images(self) -> list[Path]:
        """List the images of the sample, each once."""
        return list(dict.fromkeys((*self.files, *self.prompt_files)))

    @property
    def example(self) -> Example:
        """Return the collator's input, with empty pixels: images' tokens come separately."""
        counted = torch.empty(len(self.files), 0)
        return {"input_ids": self.input_ids, "labels": self.labels, "pixel_values": counted, "vision_features": None}


@dataclass(frozen=True)
class Samples:
    """The usable records of a file, and why others were left out.

    Attributes:
        rows: samples of one image are neighbours.
        total: records in the file, before ``limit``.
        left_out: number of records by reason.
    """

    rows: list[Sample]
    total: int
    left_out: dict[str, int] = field(default_factory=dict)

    def origin(self, data: str | Path) -> dict[str, Any]:
        """Describe the samples in a results file."""
        return {"data": os.fspath(data), "records_in_file": self.total, "left_out": self.left_out}


def load_samples(
    data: str | Path, image_folder: str | Path | None, answerer: Answerer, model: str | Path, limit: int | None = None
) -> Samples:
    """Encode a calibration file as training would, without opening images.

    Args:
        data: LLaVA records (JSON or JSONL; a ``category`` key is the question type), or questions with
            ``question_id, image, text, answer, category``, as ``tove-llava scenes`` writes them.
        image_folder: folder that image names start from; by default ``images/`` next to ``data``, or else the folder
            of ``data``.
        model: its folder, whose manifest limits the length of a sequence.
        limit: keep this many records, spread evenly over the file.

    Raises:
        DataError: a record or image path cannot be used, or nothing is left.
    """
    files = DataFiles(data)
    chosen = set(spread(range(len(files)), limit))
    folder = _image_folder(data, image_folder)
    longest = answerer.max_length
    if (Path(model) / MANIFEST).exists():
        longest = min(longest, Manifest.read(model).model_max_length)
    rows: list[Sample] = []
    left_out: Counter[str] = Counter()
    for index in range(len(files)):
        row = files.raw(index)
        record = files.parse(_as_record(row, index, data), index)
        if index not in chosen:
            continue
        if not record.images:
            left_out["no image"] += 1  # the experts change nothing there
            continue
        sample = _sample(record, row.get("category"), folder, answerer, longest)
        if not sample.files or not bool((sample.labels[1:] >= 0).any()):
            left_out[f"no image or no answer within {longest} tokens"] += 1
            continue
        rows.append(sample)
    if not rows:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in left_out.items())
        raise DataError(f"{data}: no record is left to measure ({reasons}); give records with an image and an answer")
    first = {file: index for index, file in reversed(list(enumerate(row.files[0] for row in rows)))}
    return Samples(sorted(rows, key=lambda row: first[row.files[0]]), len(files), dict(left_out))


def _as_record(row: Any, index: int, data: str | Path) -> Any:
    """Turn a question of the playground into a LLaVA record."""
    if not isinstance(row, dict) or "conversations" in row or not {"text", "answer"} <= row.keys():
        return row
    where = f"{data}: record {index} (question_id {row.get('question_id')!r})"
    if not isinstance(row["text"], str) or not isinstance(row["answer"], (str, int, float)):
        raise DataError(f"{where}: 'text' and 'answer' must be text")
    image = row.get("image")
    text = row["text"].replace(IMAGE_PLACEHOLDER, "").strip() if image else row["text"]
    turns = [
        {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{text}" if image else text},
        {"from": "gpt", "value": str(row["answer"])},
    ]
    return {"id": row.get("question_id", ""), "image": image, "conversations": turns}


def _image_folder(data: str | Path, given: str | Path | None) -> Path:
    if given is not None:
        if not Path(given).is_dir():
            raise DataError(f"there is no image folder {given}; check --image-folder")
        return Path(given)
    beside = Path(data).parent / "images"
    return beside if beside.is_dir() else Path(data).parent


def _sample(record: Record, category: Any, folder: Path, answerer: Answerer, longest: int) -> Sample:
    if category is not None and not isinstance(category, str):
        raise DataError(f"{record.where}: 'category' must be a string, not {json.dumps(category)}")
    turns = prepare_turns(record, answerer.template)
    encoded = truncate(encode_record(record, answerer.tokenizer, answerer.template), longest, answerer.num_image_tokens)
    with record.errors():
        files = [resolve_image(folder, name) for name in record.file_names()]
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        reply = (turns[answers[0]].text or "").strip() if answers else ""
        prompt, prompt_files = None, 0
        if 0 < len(reply.split()) <= SHORT_REPLY_WORDS:
            question = turns[: answers[0]]
            prompt_files = sum((turn.text or "").count(IMAGE_PLACEHOLDER) for turn in question)
            prompt = answerer.encode(question, prompt_files)
    return Sample(
        category=category,
        files=tuple(files[: encoded.num_images]),
        input_ids=torch.tensor(encoded.input_ids, dtype=torch.long),
        labels=torch.tensor(encoded.labels, dtype=torch.long),
        prompt=prompt,
        prompt_files=tuple(files[:prompt_files]),
        reply=reply,
    )
