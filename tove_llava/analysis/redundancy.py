"""Measure the redundancy of encoders by masking each (arXiv 2507.03262).

``CUR_i = (acc(all) - acc(without i)) / acc(all)`` is the Conditional Utilization Rate of encoder ``i``. The Information
Gap is the largest CUR minus the smallest. How each fusion masks an expert:

* ``tove``, ``top1``, ``replace``: the gate renormalises over the other experts.
* ``add``: the mean is over the other experts.
* ``channel_concat``: the expert's channels are zero.
* ``sequence_append``: the expert's tokens are left out.

CLIP's tokens become zero in every fusion, also for the gate; in ``replace`` they only steer the gate. A fusion that is
registered elsewhere masks an expert as its own ``detached_experts`` do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.checkpoints.loading import read_config
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.text import aligned, number
from tove_llava.eval.conditions import CLIP, FULL, Condition, parse_conditions
from tove_llava.eval.judge import JudgedBenchmark
from tove_llava.eval.tasks import find_data
from tove_llava.tower import FUSIONS, ToveVisionConfig

Row = dict[str, Any]


def masking_conditions(model: str | Path, encoders: Sequence[str] = ()) -> dict[str, Condition]:
    """Return a condition for each encoder that is left out, by its name.

    Args:
        encoders: CLIP and every attached expert by default.

    Raises:
        CheckpointError: no such folder, or no model in it.
        ConfigError: the model has no attached experts, or not this encoder.
    """
    if not Path(model).is_dir():
        raise CheckpointError(f"there is no model folder {model}; give the folder that training wrote")
    config = read_config(Path(model)).vision_config
    attached = config.attached_experts if isinstance(config, ToveVisionConfig) else []
    if not attached or not FUSIONS.get(config.fusion).uses_experts:
        raise ConfigError(f"{model} has no attached experts; with a single encoder there is nothing to compare")
    known = list(dict.fromkeys([CLIP, *attached]))
    unknown = [name for name in encoders if name not in known]
    if unknown:
        raise ConfigError(f"--encoders: {model} has no encoder {unknown[0]!r} to mask; it has: {', '.join(known)}")
    return {name: parse_conditions(None, detach=name)[0] for name in dict.fromkeys(encoders or known)}


def check_scored(benchmarks: str, data_roots: Sequence[str | Path]) -> None:
    """Raise ConfigError for a benchmark that is not scored here, before any question is answered."""
    for name, benchmark, root in find_data(benchmarks, data_roots):
        if isinstance(benchmark, JudgedBenchmark):
            raise ConfigError(f"benchmark {name!r} is scored by a judge, so it has no accuracy here; leave it out")
        if benchmark.ground_truth(root) is None:
            raise ConfigError(f"benchmark {name!r} has no accuracy: its answers are not public; leave it out")


def utilization(whole: float, without: Mapping[str, float]) -> dict[str, float | None]:
    """Compute each encoder's CUR; None where the whole model scores zero."""
    return {name: (whole - score) / whole if whole else None for name, score in without.items()}


def redundancy(results: Mapping[str, Mapping[str, Any]], masked: Mapping[str, Condition]) -> dict[str, dict[str, Row]]:
    """Compute CUR and Information Gap by benchmark and row of its table.

    Args:
        results: the ``benchmarks`` of :func:`tove_llava.eval.evaluate.evaluate`.
        masked: the condition that leaves an encoder out, by encoder.

    Raises:
        ConfigError: a benchmark has no scores.
    """
    found: dict[str, dict[str, Row]] = {}
    for benchmark, runs in results.items():
        found[benchmark] = {}
        everywhere = set.intersection(*(set(run["rows"]) for run in runs.values()))
        for label, (whole, count) in runs[FULL.name]["rows"].items():
            if label not in everywhere:  # such as a category that no answer of a run belongs to
                continue
            without = {name: runs[condition.name]["rows"][label][0] for name, condition in masked.items()}
            cur = utilization(whole, without)
            known = [value for value in cur.values() if value is not None]
            gap = max(known) - min(known) if known else None
            row = {"all": whole, "without": without, "cur": cur, "information_gap": gap, "questions": count}
            found[benchmark][label] = row
        if not found[benchmark]:
            reasons = runs[FULL.name].get("unavailable", {}).values()
            raise ConfigError(f"benchmark {benchmark!r} has no accuracy: {', '.join(reasons) or 'no scores'}")
    return found


def redundancy_table(benchmark: str, rows: Mapping[str, Row]) -> str:
    """Make a benchmark's table: score, CUR of each encoder, and Information Gap."""
    encoders = next(iter(rows.values()))["cur"]
    lines = [[benchmark, "all (%)", *(f"CUR {name}" for name in encoders), "gap", "questions"]]
    for label, row in rows.items():
        shares = [number(value, ".3f") for value in [*row["cur"].values(), row["information_gap"]]]
        lines.append([label, f"{row['all']:.1f}", *shares, str(row["questions"])])
    return aligned(lines)
