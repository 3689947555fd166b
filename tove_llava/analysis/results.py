"""Results of the analyses: dataclasses, tables and JSON files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tove_llava.analysis.samples import COUNTED
from tove_llava.core.files import write_atomically
from tove_llava.core.text import aligned, number, percent


@dataclass(frozen=True)
class ExpertContribution:
    """One expert within one group of records.

    Attributes:
        gate_weight: mean over the tokens of the group's images; None for a fusion without a gate.
        norm_share: mean of ``|G_k P_k| / |T'|`` over the same tokens.
        loss_change: LM loss without it minus LM loss with all (positive: it helps).
        accuracy_change: accuracy without it minus accuracy with all (negative: it helps); None without counted answers.
    """

    gate_weight: float | None
    norm_share: float
    loss_change: float
    accuracy_change: float | None


@dataclass(frozen=True)
class Group:
    """All records, or those of one question type.

    Attributes:
        records, images: how many.
        tokens: supervised tokens, over which the loss is averaged.
        answers: replies that count for the accuracy.
        loss, accuracy: with all attached experts.
        loss_without_experts, accuracy_without_experts: with every expert detached.
        experts: by name.
    """

    records: int
    images: int
    tokens: int
    answers: int
    loss: float
    accuracy: float | None
    loss_without_experts: float
    accuracy_without_experts: float | None
    experts: dict[str, ExpertContribution]


@dataclass(frozen=True)
class Contributions:
    """Contributions over all records, and by question type."""

    overall: Group
    types: dict[str, Group]

    @property
    def ranking(self) -> list[str]:
        """Rank the experts by leave-one-out loss, ties by gate weight, ascending."""
        found = self.overall.experts
        return sorted(found, key=lambda name: (found[name].loss_change, found[name].gate_weight or 0.0))

    def to_json(self) -> dict[str, Any]:
        return {
            "experts": list(self.overall.experts),
            "ranking_least_first": self.ranking,
            "counted_answers": COUNTED,
            "overall": dataclasses.asdict(self.overall),
            "types": {name: dataclasses.asdict(group) for name, group in self.types.items()},
        }

    def __str__(self) -> str:
        return "\n\n".join([_overall_table(self), *_type_tables(self)])


@dataclass(frozen=True)
class Step:
    """One point of the curve.

    Attributes:
        removed: the expert removed at this step; None at the first.
        experts: those that are left.
        loss: token-weighted LM loss.
        accuracy: over the counted answers; None without any.
        images_per_second: of the tower; median of several batches.
    """

    removed: str | None
    experts: tuple[str, ...]
    loss: float
    accuracy: float | None
    images_per_second: float


def write_record(file: Path, record: dict[str, Any]) -> None:
    """Write the JSON file of an analysis."""
    write_atomically(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _overall_table(found: Contributions) -> str:
    group = found.overall
    lines = [["expert", "gate weight", "norm share", "loss without it", "accuracy without it"]]
    for name, expert in group.experts.items():
        lines.append(
            [
                name,
                number(expert.gate_weight, ".3f"),
                number(expert.norm_share, ".3f"),
                f"{group.loss + expert.loss_change:.4f} ({expert.loss_change:+.4f})",
                _accuracy(group.accuracy, expert.accuracy_change),
            ]
        )
    change = group.loss_without_experts - group.loss
    gap = None if group.accuracy is None else (group.accuracy_without_experts or 0.0) - group.accuracy
    lines.append(
        ["no expert", "", "", f"{group.loss_without_experts:.4f} ({change:+.4f})", _accuracy(group.accuracy, gap)]
    )
    lines.append(["all experts", "", "", f"{group.loss:.4f}", _accuracy(group.accuracy, None)])
    counts = (
        f"{group.records} records, {group.images} images; loss over {group.tokens} tokens, accuracy (%) over "
        f"{group.answers} answers ({COUNTED})"
    )
    return f"{aligned(lines)}\n{counts}\nleast contributing first: {', '.join(found.ranking)}"


def _type_tables(found: Contributions) -> list[str]:
    if not found.types:
        return []
    names = list(found.overall.experts)
    loss = [["loss change by type", *(f"-{name}" for name in names), "no expert", "all", "tokens"]]
    accuracy = [["accuracy change by type", *(f"-{name}" for name in names), "no expert", "all", "answers"]]
    weights = [["gate weight by type", *names, "images"]]
    shares = [["norm share by type", *names, "images"]]
    for kind, group in found.types.items():
        experts = group.experts.values()
        drop = f"{group.loss_without_experts - group.loss:+.4f}"
        loss.append([kind, *(f"{e.loss_change:+.4f}" for e in experts), drop, f"{group.loss:.4f}", str(group.tokens)])
        gap = None if group.accuracy is None else (group.accuracy_without_experts or 0.0) - group.accuracy
        points = [percent(change, "+.1f") for change in (*(e.accuracy_change for e in experts), gap)]
        accuracy.append([kind, *points, percent(group.accuracy, ".1f"), str(group.answers)])
        weights.append([kind, *(number(e.gate_weight, ".3f") for e in experts), str(group.images)])
        shares.append([kind, *(number(e.norm_share, ".3f") for e in experts), str(group.images)])
    return [aligned(table) for table in (loss, accuracy, weights, shares)]


def _accuracy(all_experts: float | None, change: float | None) -> str:
    if all_experts is None or change is None:
        return percent(all_experts, ".1f")
    return f"{100 * (all_experts + change):.1f} ({100 * change:+.1f})"
