"""Scores by agreement with people (Antol et al. 2015, arXiv 1505.00468)."""

from collections.abc import Hashable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal


def agreement(answer: Hashable, references: Sequence[Hashable], copies: Sequence[int] | None = None) -> float:
    """Return the mean of min(1, matches among the *other* references / 3).

    With ten references, 0, 1, 2, 3, 4 or more matches give 0, 0.3, 0.6, 0.9, 1.

    Args:
        copies: for each reference the number of records that equal it as a whole, itself included, none of which
            counts among the others. 1 for each by default.
    """
    matches = sum(reference == answer for reference in references)
    if not matches:
        return 0.0
    total = 0.0
    for reference, own in zip(references, copies or [1] * len(references), strict=True):
        others = matches - own if reference == answer else matches
        total += min(1.0, others / 3)
    return total / len(references)


def record_copies(records: Sequence[Mapping[str, object]]) -> list[int] | None:
    """Count each record's occurrences; None if ids make all records different."""
    ids = {repr(record.get("answer_id")) for record in records}
    if len(ids) == len(records):
        return None
    return [sum(record == other for other in records) for record in records]


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean of at least one value."""
    return sum(values) / len(values)


def rounded(value: float, digits: int) -> float:
    """Round with ties away from zero, as Python 2 prints VQA's numbers."""
    return float(Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_UP))
