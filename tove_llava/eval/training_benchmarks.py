"""Answer benchmarks with a model that is in training."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import distributed

from tove_llava.core.errors import ConfigError
from tove_llava.core.files import write_atomically
from tove_llava.eval.benchmarks import Score
from tove_llava.eval.conditions import FULL
from tove_llava.eval.judge import JudgedBenchmark
from tove_llava.eval.runner import Ranks, Settings, forget, run_benchmark
from tove_llava.eval.tasks import Task, find_data
from tove_llava.inference.generation import Answerer

T = TypeVar("T")


class TrainingBenchmarks:
    """Benchmarks of a run, read and checked before its weights are loaded.

    Args:
        names: comma-separated.
        limit: questions of each.
        data_roots: folders to look for their data in.
        batch_size: questions in the model at a time.

    Raises:
        ConfigError: an unknown benchmark, or one that cannot be scored without a judge or a server.
        DataError: data is missing or malformed.
    """

    def __init__(self, names: str, limit: int, data_roots: Sequence[str | Path], batch_size: int) -> None:
        self.batch_size = batch_size
        self.tasks = []
        for name, benchmark, root in find_data(names, data_roots):
            if isinstance(benchmark, JudgedBenchmark):
                raise ConfigError(f"--eval_benchmarks {name}: it needs a judge; run tove-llava eval after training")
            task = Task.read(name, benchmark, root, limit)
            if task.truth is None:
                raise ConfigError(f"--eval_benchmarks {name}: its answers are not public, so it has no score here")
            task.check()
            self.tasks.append(task)

    def __call__(self, answerer: Answerer, folder: Path) -> dict[str, float]:
        """Write answers and scores to ``folder/BENCHMARK``; return the scores in percent.

        All ranks call this and share the questions. Only the first returns scores: one for each benchmark, and one for
        each further row of its table.
        """
        ranks, metrics = _Ranks(), {}
        for task in self.tasks:
            place = folder / task.name
            if ranks.rank == 0:
                forget(place)  # of a run that was interrupted after this step
            settings = Settings(folder.name, batch_size=self.batch_size)
            run = run_benchmark(answerer, task, place, FULL, settings, ranks, label=None)
            if ranks.rank == 0:
                score = task.score(run.rows)
                write_atomically(place / "scores.json", json.dumps(score.to_json(task.name), indent=1) + "\n")
                metrics |= _metrics(task.name, score)
        return metrics


def _metrics(name: str, score: Score) -> Mapping[str, float]:
    """Name the table's rows; that of most questions bears the benchmark's name."""
    main = max(score.rows, key=lambda label: score.rows[label][1])
    return {
        f"eval_{name}" if label == main else f"eval_{name}/{label.replace(' ', '_')}": percent
        for label, (percent, _) in score.rows.items()
    }


class _Ranks(Ranks):
    """The processes of a training run; they take portions in turn."""

    def __init__(self) -> None:
        joined = distributed.is_available() and distributed.is_initialized()
        super().__init__(*((distributed.get_rank(), distributed.get_world_size()) if joined else ()))

    def claim(self, counter: str, items: Sequence[T]) -> Iterator[T]:
        return iter(items[self.rank :: self.world])
