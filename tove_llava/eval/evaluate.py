"""A whole evaluation: load the model once, answer every benchmark under every condition, score, report."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tove_llava.errors import CheckpointError, DataError
from tove_llava.eval.benchmarks import BENCHMARKS, Benchmark, Question, Score, get_benchmark
from tove_llava.eval.conditions import Condition
from tove_llava.eval.report import score_table
from tove_llava.eval.rows import Row, write_atomically
from tove_llava.presets import QuantizationPreset

MAKE_SCENES = "tove-llava scenes --out playground/data/scenes --train 8000 --val 300 --seed 0"


def evaluate(
    model_folder: str | Path,
    benchmarks: str,
    data_roots: Sequence[str | Path],
    conditions: Sequence[Condition],
    output: str | Path | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    overwrite: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    quantization: QuantizationPreset | None = None,
    as_json: bool = False,
) -> str | None:
    """Run and score benchmarks; write ``OUTPUT/results.json`` and the answers under ``OUTPUT/BENCHMARK/CONDITION``.

    Args:
        benchmarks: comma-separated names, or ``all`` for those whose data is there.
        data_roots: folders to look for a benchmark's data in; the first that has it is used.
        output: ``MODEL/eval`` by default.
        quantization: see :meth:`tove_llava.serve.generation.Answerer.load`.

    Returns:
        the report's text (tables, or JSON); None on processes other than the first.

    Raises:
        ConfigError: an unknown benchmark, device or dtype.
        DataError: data is missing or malformed, or the output folder holds answers of another run.
        CheckpointError: the folder holds no model.
    """
    folder = Path(model_folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}; give the folder that training wrote")
    jobs = find_data(benchmarks, data_roots)
    # All questions are read before the model is loaded: a missing file or program shows at once.
    for _, benchmark, _ in jobs:
        benchmark.check_requirements()
    questions = {name: benchmark.questions(root) for name, benchmark, root in jobs}
    truths = {name: benchmark.ground_truth(root) for name, benchmark, root in jobs}

    from tove_llava.eval.runner import Share, forget, run_benchmark, spread
    from tove_llava.llava.quantization import loaded_bits
    from tove_llava.serve.generation import Answerer

    share = Share.from_environment()
    if share.world > 1 and device is None:
        device = local_device()
    target = Path(output) if output is not None else folder / "eval"
    answerer = Answerer.load(folder, device, dtype, quantization)
    results: dict[str, dict[str, Any]] = {}
    tables = []
    for name, benchmark, root in jobs:
        columns: dict[str, Score] = {}
        results[name] = {}
        truth = _asked(benchmark, truths[name], spread(questions[name], limit))
        for condition in conditions:
            place = target / name / condition.name
            if overwrite and share.rank == 0:
                forget(place)
            share.wait()
            started = time.monotonic()
            label = name if len(conditions) == 1 else f"{name}, {condition.title}"
            rows = run_benchmark(
                answerer, benchmark, questions[name], place, condition, batch_size, limit, share, folder.name, label
            )
            if share.rank != 0:
                continue
            columns[condition.title] = score = _score(benchmark, rows, truth)
            seconds = time.monotonic() - started
            results[name][condition.name] = {
                **score.to_json(name),
                "data_root": os.fspath(root),
                "limit": limit,
                "seconds": round(seconds, 2),
                "answers": os.fspath(place / "answers.jsonl"),
            }
        if share.rank == 0:
            tables.append(score_table(columns, corner=f"{name} (%)"))
    if share.rank != 0:
        return None
    record = {"model": os.fspath(folder), "versions": versions(), "command": sys.argv, "benchmarks": results}
    record |= {"device": str(answerer.device), "dtype": str(answerer.model.dtype).removeprefix("torch.")}
    record |= {"language_model_bits": str(loaded_bits(answerer.model))}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_atomically(target / "results.json", text + "\n")
    return json.dumps(record, ensure_ascii=False) if as_json else "\n\n".join(tables)


def find_data(benchmarks: str, data_roots: Sequence[str | Path]) -> list[tuple[str, Benchmark, Path]]:
    """Each benchmark asked for, and the root that has its data.

    Raises:
        ConfigError: an unknown benchmark.
        DataError: no root has the data of a benchmark that was asked for by name, or of any when all were.
    """
    every = benchmarks.strip() == "all"
    names = list(BENCHMARKS) if every else [name.strip() for name in benchmarks.split(",") if name.strip()]
    if not names:
        raise DataError("no benchmark is named; give --benchmark a name")
    jobs = []
    for name in dict.fromkeys(names):
        benchmark = get_benchmark(name)
        files = [benchmark.question_file(Path(root)) for root in data_roots]
        found = [Path(root) for root, file in zip(data_roots, files, strict=True) if file.is_file()]
        if found:
            jobs.append((name, benchmark, found[0]))
        elif not every:
            raise DataError(
                f"the data of benchmark {name!r} is not there: no {' and no '.join(map(str, files))}. "
                f"Give --data-root, or make scenes: {MAKE_SCENES}"
            )
    if not jobs:
        raise DataError(f"no benchmark's data is under {', '.join(map(str, data_roots))}; give --data-root")
    return jobs


def _asked(benchmark: Benchmark, truth: list[Row] | None, questions: Sequence[Question]) -> list[Row] | None:
    """The rows of the ground truth that belong to the questions asked."""
    if truth is None:
        return None
    rows = [{"question_id": question.question_id, "prompt": question.text} for question in questions]
    keys = {benchmark.answer_key(row) for row in rows}
    return [row for row in truth if benchmark.truth_key(row) in keys]


def _score(benchmark: Benchmark, rows: Sequence[Row], truth: list[Row] | None) -> Score:
    if truth is not None:
        return benchmark.score(rows, truth)
    reason = "the answers are not public; 'tove-llava submission' writes the file for the benchmark's server"
    return Score({}, len(rows), {}, unavailable={"all": reason})


def local_device() -> str:
    """The device of this process under torchrun."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import platform

    import torch
    import transformers

    from tove_llava import __version__

    return {
        "tove_llava": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
