"""The experts' contributions: gate weight, norm share, and leave-one-out losses.

For the tokens ``T' = T + sum_k G_k P_k`` with ``P_k = W_o H_k``: the mean gate weight ``G_k``, the mean norm share
``|G_k P_k| / |T'|``, and the change of the language model's loss and of the task accuracy when expert k is detached
and the gate renormalises over the others (leave-one-out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tove_llava.analysis.measure import Measurement, Subset, measure, tower_with_experts
from tove_llava.analysis.results import Contributions, ExpertContribution, Group, write_record
from tove_llava.analysis.samples import Sample, Samples
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.files import read_json_object
from tove_llava.eval.provenance import provenance
from tove_llava.inference.generation import Answerer

FILE = "contributions.json"
_KIND = "contributions"


def measure_contributions(answerer: Answerer, samples: Samples, batch_size: int = 16) -> Contributions:
    """Measure every attached expert of a model.

    Raises:
        ConfigError: the model has no experts, or its fusion does not add one part per expert.
        DataError: an image cannot be read.
    """
    names = tower_with_experts(answerer).config.attached_experts
    subsets: list[Subset] = [(), *((name,) for name in names), tuple(names)]
    found = measure(answerer, samples.rows, subsets, batch_size=batch_size, label="contributions")
    kinds = sorted({row.category for row in samples.rows if row.category is not None})
    return Contributions(
        overall=_group(names, samples.rows, found, range(len(samples.rows))),
        types={
            kind: _group(names, samples.rows, found, [i for i, row in enumerate(samples.rows) if row.category == kind])
            for kind in kinds
        },
    )


def loss_and_accuracy(found: Measurement, subset: Subset, rows: Sequence[int]) -> tuple[float, float | None]:
    """Compute loss per token and accuracy (None without counted answers)."""
    loss = math.fsum(found.losses[subset][i] for i in rows) / sum(found.tokens[i] for i in rows)
    marks = [mark for i in rows if (mark := found.right[subset][i]) is not None]
    return loss, sum(marks) / len(marks) if marks else None


def _group(names: list[str], samples: Sequence[Sample], found: Measurement, rows: Sequence[int]) -> Group:
    images = list(dict.fromkeys(file for i in rows for file in samples[i].images))  # each image counts once
    loss, accuracy = loss_and_accuracy(found, (), rows)
    loss_none, accuracy_none = loss_and_accuracy(found, tuple(names), rows)
    experts = {}
    for name in names:
        loss_without, accuracy_without = loss_and_accuracy(found, (name,), rows)
        weights = [found.gate_weights[file][name] for file in images if name in found.gate_weights[file]]
        experts[name] = ExpertContribution(
            gate_weight=math.fsum(weights) / len(weights) if weights else None,
            norm_share=math.fsum(found.norm_shares[file][name] for file in images) / len(images),
            loss_change=loss_without - loss,
            accuracy_change=None if accuracy is None or accuracy_without is None else accuracy_without - accuracy,
        )
    return Group(
        records=len(rows),
        images=len(images),
        tokens=sum(found.tokens[i] for i in rows),
        answers=sum(found.right[()][i] is not None for i in rows),
        loss=loss,
        accuracy=accuracy,
        loss_without_experts=loss_none,
        accuracy_without_experts=accuracy_none,
        experts=experts,
    )


def save_contributions(
    found: Contributions, folder: str | Path, answerer: Answerer, model: str | Path, samples: Samples, data: str | Path
) -> dict[str, Any]:
    """Write ``contributions.json`` and the plots; return the record in the file."""
    from tove_llava.analysis.plots import plot_contributions, plot_types

    folder = Path(folder)
    record = {"kind": _KIND, **provenance(answerer, model), **samples.origin(data), **found.to_json()}
    write_record(folder / FILE, record)
    plot_contributions(found, folder / "contributions.png")
    if found.types:
        plot_types(found, folder / "contributions_by_type.png")
    return record


def read_ranking(file: str | Path, experts: Sequence[str], model_print: str) -> list[str]:
    """Read a model's ranking from ``contributions.json``, the least contributing first.

    Args:
        experts: the model's attached experts.
        model_print: see :func:`model_fingerprint`.

    Raises:
        DataError: the file is missing, or ``tove-llava contributions`` did not write it.
        ConfigError: it was measured on another model, or with other experts attached.
    """
    record = read_json_object(file, DataError, "make it with 'tove-llava contributions'")
    try:
        ranking, measured = record["ranking_least_first"], record["fingerprint"]
        if record["kind"] != _KIND or not isinstance(ranking, list):
            raise KeyError("kind")
    except (KeyError, TypeError) as error:
        raise DataError(f"{file} is not what 'tove-llava contributions' writes ({error!r})") from error
    if measured != model_print:
        raise ConfigError(
            f"{file} was measured on another model (its fingerprint differs); measure this one, or --data"
        )
    if sorted(ranking) != sorted(experts):
        raise ConfigError(
            f"{file} was measured with the experts {', '.join(sorted(ranking))}, attached are "
            f"{', '.join(sorted(experts))}; measure again"
        )
    return ranking
