"""The files of a finished run that ``tove-llava report`` reads.

``result.json`` holds the scores and their provenance, ``items.jsonl`` the marks of each question. Both are in
``OUTPUT/BENCHMARK/CONDITION/``, next to the answers.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.files import write_atomically
from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import Question, Score
from tove_llava.eval.rows import Row
from tove_llava.eval.tasks import Task

RESULT, ITEMS = "result.json", "items.jsonl"
MARK = "mark"  # the metric of a benchmark whose score is a mean over questions
_SHOWN = 300  # characters of an expected answer in items.jsonl


def item_values(score: Score) -> dict[str, dict[str, float]]:
    """Return each question's values: its name -> metric -> value.

    They are marks where the score is a mean of marks; else the scorer's numbers for each image (caption metrics).
    """
    if score.marks:
        return {str(key): {MARK: float(value)} for key, value in score.marks.items()}
    details = score.details.get("per_item")
    values = {}
    for key, entry in details.items() if isinstance(details, Mapping) else ():
        numbers = entry.items() if isinstance(entry, Mapping) else ()
        found = {name: float(value) for name, value in numbers if isinstance(value, int | float)}
        if found:
            values[str(key)] = found
    return values


def item_rows(task: Task, answers: Sequence[Row], score: Score) -> list[Row]:
    """Make the lines of ``items.jsonl``: marks, groups and texts to show.

    Args:
        answers: rows that were scored.
    """
    values, benchmark = item_values(score), task.benchmark
    asked = {benchmark.question_key(question): question for question in task.asked}
    given = {benchmark.answer_key(row): row["text"] for row in answers} if values else {}
    rows = []
    for row in task.truth or []:
        name = str(benchmark.mark_name(row))
        if name not in values:
            continue
        key = benchmark.truth_key(row)
        question = asked.get(key)
        image = None
        if question is not None and isinstance(question.image, Path) and question.image.is_relative_to(task.root):
            image = question.image.relative_to(task.root).as_posix()
        rows.append(
            {
                "item": name,
                "question_id": row["question_id"],
                "values": values[name],
                "groups": benchmark.groups(row),
                "prompt": None if question is None else question.text,
                "image": image,
                "answer": given.get(key),
                "expected": expected(row),
            }
        )
    return rows


def expected(row: Mapping[str, Any]) -> str | None:
    """Format a row's right answer; of several, the most frequent first."""
    found = next((row[key] for key in ("answer", "label", "answers", "references") if row.get(key) is not None), None)
    if found is None:
        return None
    if isinstance(found, list):
        texts = [str(entry.get("answer", entry)) if isinstance(entry, dict) else str(entry) for entry in found]
        found = " | ".join(text for text, _ in Counter(texts).most_common())
    return str(found)[:_SHOWN]


def breakdown(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Return level -> group -> ``count`` and the mean of each metric."""
    members: dict[str, dict[str, list[Mapping[str, float]]]] = {}
    for row in rows:
        for level, names in row["groups"].items():
            for name in names:
                members.setdefault(level, {}).setdefault(name, []).append(row["values"])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for level, groups in members.items():
        found[level] = {}
        for name, items in sorted(groups.items()):
            means = {metric: mean([item[metric] for item in items]) for metric in items[0]}
            found[level][name] = {"count": len(items), **means}
    return found


def data_fingerprint(questions: Sequence[Question], truth: Sequence[Row] | None) -> dict[str, Any]:
    """Digest questions (with image names) and right answers, in any order."""
    asked = [[str(q.question_id), q.text, q.image_names] for q in questions]
    return {
        "questions": _digest(asked),
        "ground_truth": None if truth is None else _digest(truth),
        "question_count": len(questions),
    }


def _digest(rows: Iterable[Any]) -> str:
    lines = sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def backbone_fingerprints(model: Any) -> dict[str, str]:
    """Digest a tower's frozen parts: CLIP and each loaded expert."""
    from tove_llava.checkpoints.weight_fingerprints import sampled_fingerprint

    frozen = getattr(model.base_model.vision_tower, "frozen", None)
    if frozen is None or frozen.clip is None:
        return {}
    hub = frozen.hub
    parts = {"clip": frozen.clip, **{name: hub[name] for name in hub.names if hub.is_loaded([name])}}
    return {name: sampled_fingerprint(part) for name, part in parts.items()}


def save(folder: Path, result: Mapping[str, Any], items: Sequence[Row]) -> None:
    """Write ``result.json`` and ``items.jsonl``; without items delete an older ``items.jsonl``."""
    if items:
        write_atomically(folder / ITEMS, "".join(json.dumps(row) + "\n" for row in items))
    else:
        (folder / ITEMS).unlink(missing_ok=True)
    write_atomically(folder / RESULT, json.dumps(result, indent=1) + "\n")
