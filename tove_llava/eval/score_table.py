"""Tables of scores for the terminal."""

from collections.abc import Mapping, Sequence

from tove_llava.core.text import aligned
from tove_llava.eval.benchmarks import Score

UNPARSED = "answers not read"  # the label of a row of counts
MEANINGS = {
    "unanswered": "questions without an answer (wrong)",
    "duplicated": "questions answered more than once (the last answer counts)",
    "unknown": "answers to other questions (left out)",
    "unparsed_ids": "answers that the rule could not read (failures of form, scored as the rule says)",
    "wordless_references": "images whose reference captions hold no word",
    "unparsed_replies": "replies of the judge that could not be read (scored as the rule says)",
}


def score_table(columns: Mapping[str, Score], corner: str = "") -> str:
    """Make a benchmark's table: categories as rows, conditions as columns, in percent."""
    labels = list(dict.fromkeys(label for score in columns.values() for label in score.rows))
    header = [corner, *columns, "questions"]
    lines = [header]
    for label in labels:
        cells = [score.rows.get(label) for score in columns.values()]
        counts = {cell[1] for cell in cells if cell is not None}
        shown = ["-" if cell is None else f"{cell[0]:.1f}" for cell in cells]
        lines.append([label, *shown, "/".join(str(count) for count in sorted(counts))])
    unread = [score.extras.get("unparsed") or 0 for score in columns.values()]
    if any(unread):
        counts = {score.count for score in columns.values()}
        lines.append([UNPARSED, *map(str, unread), "/".join(str(count) for count in sorted(counts))])
    return aligned(lines)


def first_ids(ids: Sequence[object], shown: int = 10) -> str:
    """List the first ids, and three dots where there are more."""
    return ", ".join(map(str, ids[:shown])) + (", ..." if len(ids) > shown else "")


def notes(score: Score) -> list[str]:
    """Return the lines below a table: rule, unavailable metrics, notable ids."""
    lines = [f"rule: {score.rule}"] if score.rule else []
    lines += [f"{name}: unavailable ({reason})" for name, reason in score.unavailable.items()]
    for key, meaning in MEANINGS.items():
        ids = score.extras.get(key) or []
        if ids:
            lines.append(f"{len(ids)} {meaning}: {first_ids(ids)}")
    return lines
