"""Answer benchmarks while a run trains. The room of evaluation, which has them, is handed in from above."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

from transformers import LlavaProcessor

from tove_llava.core.errors import ConfigError
from tove_llava.data.images import AspectRatio
from tove_llava.inference.generation import Answerer
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration
from tove_llava.llava.varlen import padded_rows
from tove_llava.train.run_settings import Settings

FOLDER = "benchmarks"  # of the answers, in a run's folder

# (answerer, folder for its answers) -> scores on the first rank
Benchmarks = Callable[[Answerer, Path], Mapping[str, float]]
# (names, questions of each, folder of their data or None, questions in the model at a time) -> Benchmarks
MakeBenchmarks = Callable[[str, int, str | None, int], Benchmarks]


def read_benchmarks(settings: Settings, make: MakeBenchmarks | None) -> Benchmarks | None:
    """Read the benchmarks of a run, if it has any.

    Raises:
        ConfigError: an unknown benchmark, or none can be made here.
        DataError: their data is missing or malformed.
    """
    if settings.eval_benchmarks is None:
        return None
    if make is None:
        raise ConfigError("--eval_benchmarks needs the command tove-llava train, launch or merge")
    batch = settings.training.get("per_device_eval_batch_size", 8)
    return make(settings.eval_benchmarks, settings.eval_benchmarks_limit, settings.eval_data_root, batch)


def scores_of(
    benchmarks: Benchmarks | None,
    settings: Settings,
    model: ToveLlavaForConditionalGeneration,
    processor: LlavaProcessor,
) -> Callable[[Path], Mapping[str, float]] | None:
    """Return what answers with the model as it is, given a folder for its answers; None without benchmarks."""
    return None if benchmarks is None else partial(_answer, benchmarks, settings, model, processor)


def _answer(
    benchmarks: Benchmarks,
    settings: Settings,
    model: ToveLlavaForConditionalGeneration,
    processor: LlavaProcessor,
    folder: Path,
) -> Mapping[str, float]:
    ratio = cast(AspectRatio, settings.stage.image_aspect_ratio)
    with padded_rows(model.model.language_model):
        return benchmarks(Answerer(model, processor, settings.stage.template, ratio), folder)
