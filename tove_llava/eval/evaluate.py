"""A whole evaluation: every benchmark under every condition, with one loaded model."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tove_llava.checkpoints.hub import shown_name
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import write_atomically
from tove_llava.core.locks import locked
from tove_llava.eval import result_files
from tove_llava.eval.benchmarks import Score
from tove_llava.eval.conditions import Condition
from tove_llava.eval.judge import Judge, JudgedBenchmark
from tove_llava.eval.score_table import notes, score_table
from tove_llava.eval.tasks import Task, find_data

if TYPE_CHECKING:
    from tove_llava.eval.own_questions import Found
    from tove_llava.eval.runner import Ranks, Run

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """Settings of an evaluation.

    Attributes:
        model: folder that training wrote.
        benchmarks: comma-separated names, or ``all`` for those whose data is there; empty for only ``own``.
        own: further benchmarks, from :func:`tove_llava.eval.own_questions.from_file`.
        data_roots: folders to look for a benchmark's data in; the first that has it is used.
        output: ``MODEL/eval`` by default.
        limit: ask about this many questions of each benchmark; see :meth:`Benchmark.limited`.
        overwrite: delete the answers of an earlier run.
        decoding: overrides of each benchmark's own settings; see :class:`~tove_llava.eval.tasks.Decoding`.
        conv_mode: conversation template; by default the one that the model was trained with, or, where its folder does
            not record one, the benchmark's.
        score_options: name of an answering mode that scores the options of multiple-choice questions; by default the
            model generates its answer.
        workers: threads that open images.
        judge: gives the judge of a file of answers, for the benchmarks that need one; None for none.
        loading: further arguments of :meth:`tove_llava.inference.generation.Answerer.load`.
    """

    model: str | Path
    benchmarks: str
    data_roots: Sequence[str | Path]
    conditions: Sequence[Condition]
    output: str | Path | None = None
    batch_size: int = 32
    limit: int | None = None
    overwrite: bool = False
    decoding: Mapping[str, Any] = field(default_factory=dict)
    conv_mode: str | None = None
    score_options: str | None = None
    workers: int = 4
    judge: Callable[[Path], Judge | None] | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)
    own: Sequence["Found"] = ()


def evaluate(evaluation: Evaluation) -> tuple[dict[str, Any], str] | None:
    """Run and score benchmarks; write ``OUTPUT/results.json`` and the answers under ``OUTPUT/BENCHMARK/CONDITION``.

    Returns:
        what ``results.json`` holds, and tables of it; None on processes other than the first.

    Raises:
        ConfigError: an unknown benchmark, device, dtype or template, or a benchmark without options to score.
        DataError: data is missing or malformed, or the output folder holds answers of another run.
        CheckpointError: the folder holds no model, or the output cannot be written.
        BusyError: another process writes the same answers.
    """
    # Everything that can be wrong is checked before anything is written, and most of it before the model is loaded.
    folder, tasks = Path(evaluation.model), _read_tasks(evaluation)

    from tove_llava.eval.runner import Ranks

    ranks = Ranks.from_environment()
    if evaluation.output is None and shown_name(folder) != str(folder):
        raise ConfigError(f"{shown_name(folder)} lies in the hub's cache; give --output, a folder for the answers")
    target = Path(evaluation.output) if evaluation.output is not None else folder / "eval"
    with ExitStack() as locks:
        for task, condition in product(tasks, evaluation.conditions) if ranks.rank == 0 else ():
            locks.enter_context(locked(target / task.name / condition.name))
        return _evaluate(evaluation, tasks, ranks, target)


def _evaluate(
    evaluation: Evaluation, tasks: Sequence[Task], ranks: "Ranks", target: Path
) -> tuple[dict[str, Any], str] | None:
    from tove_llava.eval.provenance import provenance
    from tove_llava.eval.runner import Settings, forget, run_benchmark
    from tove_llava.inference.generation import Answerer
    from tove_llava.llava.quantization import loaded_bits

    folder = Path(evaluation.model)
    loading = dict(evaluation.loading)
    if ranks.world > 1 and loading.get("device") is None:
        loading["device"] = _local_device()
    answerer = Answerer.load(folder, **loading)
    for condition in evaluation.conditions:
        condition.check(answerer.model)
    origin = {
        **provenance(answerer, folder),
        "backbones": result_files.backbone_fingerprints(answerer.model),
        "processes": ranks.world,
        "batch_size": evaluation.batch_size,
        "language_model_bits": str(loaded_bits(answerer.model)),
    }
    settings = Settings(folder.name, evaluation.score_options, evaluation.batch_size, evaluation.workers)
    results: dict[str, dict[str, Any]] = {}
    tables = []
    for task in tasks:
        asker = answerer.with_template(evaluation.conv_mode or answerer.recorded_template or task.benchmark.conv_mode)
        columns: dict[str, Score] = {}
        results[task.name] = {}
        for condition in evaluation.conditions:
            run_folder = target / task.name / condition.name
            if evaluation.overwrite and ranks.rank == 0:
                forget(run_folder)
            ranks.wait()
            label = task.name if len(evaluation.conditions) == 1 else f"{task.name}, {condition.title}"
            run = run_benchmark(asker, task, run_folder, condition, settings, ranks, label)
            if ranks.rank == 0:
                score, result = _score(evaluation, task, run, run_folder, condition, asker.template.name, origin)
                columns[condition.title], results[task.name][condition.name] = score, result
        remarks = dict.fromkeys(line for score in columns.values() for line in notes(score))
        for thought in (result["reasoning"] for result in results[task.name].values() if "reasoning" in result):
            count, never = thought["answers"], thought["never_closed"]
            remarks[f"{count} answers began with a think block, which is not scored; {never} never closed it."] = None
        tables.append("\n".join([score_table(columns, corner=f"{task.name} (%)"), *_origin_of_data(task), *remarks]))
    if ranks.rank != 0:
        return None
    whole = {**origin, "benchmarks": results}
    write_atomically(target / "results.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    return whole, "\n\n".join(tables)


def _origin_of_data(task: Task) -> list[str]:
    """Say that generated scenes are not the public benchmark."""
    from tove_llava.scenes.writer import MANIFEST

    if task.name == "scenes" or not (task.root / MANIFEST).is_file():
        return []
    return [f"Data: generated scenes in {task.root}, not the public benchmark {task.name}. --data-root names its data."]


def _read_tasks(evaluation: Evaluation) -> list[Task]:
    if not Path(evaluation.model).is_dir():
        raise CheckpointError(f"there is no model folder {evaluation.model}; give the folder that training wrote")
    found = list(evaluation.own)
    if evaluation.benchmarks or not found:
        found += find_data(evaluation.benchmarks, evaluation.data_roots)
    tasks = [Task.read(name, benchmark, root, evaluation.limit, evaluation.decoding) for name, benchmark, root in found]
    for task in tasks:
        task.check()
    if evaluation.judge is not None:
        evaluation.judge(Path(ANSWERS))

    from tove_llava.data import get_template
    from tove_llava.eval.answering import get_option_mode

    if evaluation.score_options is not None:
        get_option_mode(evaluation.score_options)
        for task in tasks:
            task.check_options()
    if evaluation.conv_mode is not None:
        get_template(evaluation.conv_mode)
    return tasks


def _score(
    evaluation: Evaluation,
    task: Task,
    run: "Run",
    folder: Path,
    condition: Condition,
    template: str,
    origin: Mapping[str, Any],
) -> tuple[Score, dict[str, Any]]:
    """Score a run, save result and items, and return score and result."""
    if isinstance(task.benchmark, JudgedBenchmark) and evaluation.judge is not None:
        task.benchmark.judge = evaluation.judge(folder / ANSWERS)
    score = task.score(run.rows)
    items = result_files.item_rows(task, run.rows, score)
    result = {
        **score.to_json(task.name),
        **run.record(),
        "rows": score.rows,
        "breakdown": result_files.breakdown(items),
        "data_root": os.fspath(task.root),
        "data": result_files.data_fingerprint(task.asked, task.truth),
        "limit": evaluation.limit,
        "template": template,
        "answers": os.fspath(folder / ANSWERS),
        **_reasoning(run.rows),
    }
    result_files.save(folder, {**origin, "condition": dataclasses.asdict(condition), **result}, items)
    return score, result


def _reasoning(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count the answers that began with a think block, which is not scored."""
    closed = [row["metadata"]["reasoning_closed"] for row in rows if "reasoning_closed" in row["metadata"]]
    return {"reasoning": {"answers": len(closed), "never_closed": closed.count(False)}} if closed else {}


def _local_device() -> str:
    """Return the device of this process under torchrun."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
