"""A whole evaluation: load the model once, answer every benchmark under every condition, score, report."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.errors import CheckpointError
from tove_llava.core.files import write_atomically
from tove_llava.eval import result_files
from tove_llava.eval.benchmarks import Score
from tove_llava.eval.conditions import Condition
from tove_llava.eval.judge import Judge, JudgedBenchmark
from tove_llava.eval.score_table import notes, score_table
from tove_llava.eval.tasks import Task, find_data
from tove_llava.presets import QuantizationPreset


def evaluate(
    model_folder: str | Path,
    benchmarks: str,
    data_roots: Sequence[str | Path],
    conditions: Sequence[Condition],
    output: str | Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    overwrite: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    quantization: QuantizationPreset | None = None,
    tower_execution: str = "eager",
    as_json: bool = False,
    decoding: Mapping[str, Any] | None = None,
    conv_mode: str | None = None,
    score_options: str | None = None,
    workers: int = 4,
    judge: Callable[[Path], Judge | None] | None = None,
) -> str | None:
    """Run and score benchmarks; write ``OUTPUT/results.json`` and the answers under ``OUTPUT/BENCHMARK/CONDITION``.

    Args:
        benchmarks: comma-separated names, or ``all`` for those whose data is there.
        data_roots: folders to look for a benchmark's data in; the first that has it is used.
        output: ``MODEL/eval`` by default.
        quantization, tower_execution: see :meth:`tove_llava.inference.generation.Answerer.load`.
        decoding: overrides of each benchmark's own settings; see :class:`~tove_llava.eval.tasks.Decoding`.
        conv_mode: conversation template; by default the one that the model was trained with, or where its folder does
            not say, the benchmark's.
        score_options: name of an answering mode that scores the options of multiple-choice questions; by default the
            model says its answer.
        workers: threads that open pictures.
        judge: gives the judge of a file of answers, for the benchmarks that need one; None for none.

    Returns:
        the report's text (tables, or JSON); None on processes other than the first.

    Raises:
        ConfigError: an unknown benchmark, device, dtype or template, or a benchmark without options to score.
        DataError: data is missing or malformed, or the output folder holds answers of another run.
        CheckpointError: the folder holds no model.
    """
    folder = Path(model_folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}; give the folder that training wrote")
    # Everything that can be wrong is looked for before anything is written, and most of it before the model is loaded.
    found = find_data(benchmarks, data_roots)
    tasks = [Task.read(name, benchmark, root, limit, decoding) for name, benchmark, root in found]
    for task in tasks:
        task.check()
    if judge is not None:
        judge(Path("answers.jsonl"))

    from tove_llava.data import get_template
    from tove_llava.eval.answering import get_option_mode
    from tove_llava.eval.provenance import provenance
    from tove_llava.eval.ranks import Ranks
    from tove_llava.eval.runner import Settings, forget, run_benchmark
    from tove_llava.inference.generation import Answerer
    from tove_llava.llava.quantization import loaded_bits

    if score_options is not None:
        get_option_mode(score_options)
        for task in tasks:
            task.check_options()
    if conv_mode is not None:
        get_template(conv_mode)
    ranks = Ranks.from_environment()
    if ranks.world > 1 and device is None:
        device = local_device()
    answerer = Answerer.load(folder, device, dtype, quantization, tower_execution)
    for condition in conditions:
        condition.check(answerer.model)

    origin = {
        **provenance(answerer, folder),
        "backbones": result_files.backbone_fingerprints(answerer.model),
        "processes": ranks.world,
        "batch_size": batch_size,
        "language_model_bits": str(loaded_bits(answerer.model)),
    }
    target = Path(output) if output is not None else folder / "eval"
    results: dict[str, dict[str, Any]] = {}
    tables = []
    for task in tasks:
        asker = answerer.with_template(conv_mode or answerer.recorded_template or task.benchmark.conv_mode)
        settings = Settings(task.decoding, score_options, batch_size, workers)
        columns: dict[str, Score] = {}
        results[task.name] = {}
        for condition in conditions:
            place = target / task.name / condition.name
            if overwrite and ranks.rank == 0:
                forget(place)
            ranks.wait()
            label = task.name if len(conditions) == 1 else f"{task.name}, {condition.title}"
            run = run_benchmark(
                asker, task.benchmark, task.questions, place, condition, settings, limit, ranks, folder.name, label
            )
            if ranks.rank != 0:
                continue
            if isinstance(task.benchmark, JudgedBenchmark) and judge is not None:
                task.benchmark.judge = judge(place / "answers.jsonl")
            columns[condition.title] = score = task.score(run.rows)
            items = result_files.item_rows(task.benchmark, task.root, task.asked, run.rows, task.truth or [], score)
            results[task.name][condition.name] = result = {
                **score.to_json(task.name),
                **run.record(),
                "rows": score.rows,
                "breakdown": result_files.breakdown(items),
                "data_root": os.fspath(task.root),
                "data": result_files.data_fingerprint(task.asked, task.truth),
                "limit": limit,
                "template": asker.template.name,
                "answers": os.fspath(place / "answers.jsonl"),
            }
            result_files.save(place, {**origin, "condition": dataclasses.asdict(condition), **result}, items)
        if ranks.rank == 0:
            remarks = dict.fromkeys(line for score in columns.values() for line in notes(score))
            tables.append("\n".join([score_table(columns, corner=f"{task.name} (%)"), *remarks]))
    if ranks.rank != 0:
        return None
    whole = {**origin, "benchmarks": results}
    write_atomically(target / "results.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    return json.dumps(whole, ensure_ascii=False) if as_json else "\n\n".join(tables)


def local_device() -> str:
    """The device of this process under torchrun."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
