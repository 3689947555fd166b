"""Show the settings of a run and estimate its steps, memory and time; train nothing.

Operations are counted on the architectures (:mod:`tove_llava.llava.sizes`): two for each multiply-add. A frozen part
counts once, the language model twice (forward, and gradients of activations), and what trains once more. Layers that
are computed again (``checkpointing: full``) count once more too.
"""

import math
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from tove_llava.checkpoints.loading import load_processor
from tove_llava.core.errors import ConfigError, ToveError
from tove_llava.core.sources import Source
from tove_llava.core.text import GIB
from tove_llava.data import ImageTransform, LlavaDataset, WeightedSampler
from tove_llava.data.data_files import DataFiles
from tove_llava.llava.build import read_tokenizer, torch_dtype
from tove_llava.llava.sizes import TEXT_TOKENS, Size, format_sizes, preset_sizes
from tove_llava.presets import Preset, StagePreset, dump_preset, load_preset
from tove_llava.train.arguments import Parser, resolve
from tove_llava.train.flags import RunArguments
from tove_llava.train.memory import Run, training_memory
from tove_llava.train.recomputation import FULL
from tove_llava.train.run_files import complete
from tove_llava.train.run_settings import resolve_deepspeed
from tove_llava.train.shapes import Shape, stage_shape

SAMPLE = 256  # records whose tokens are counted
SHARE = 0.4  # of the speed of matrix products that a step reaches (benchmarks/results/train_step-tiny-cpu.md)
MEASURED = 0.5  # seconds


@dataclass(frozen=True)
class Records:
    """Counts of a data file; the means are of a sample."""

    count: int
    sampled: int = 0
    images: float = 1.0
    tokens: float = 0.0  # of a sequence, image tokens included
    supervised: float = 0.0


def print_config(argv: Sequence[str]) -> str:
    """Return the resolved preset as YAML, with the plan of the run in comments.

    Raises:
        ConfigError: as :func:`tove_llava.train.arguments.parse`, except for data, which may be missing.
    """
    run, preset, stage, training = resolve(Parser().given(argv))
    output = training.pop("output_dir", None)
    stage = replace(stage, arguments=training)
    preset = replace(preset, stages={run.stage: stage})
    plain = RunArguments(preset="THIS.yaml", stage=run.stage)
    run = replace(run, preset=plain.preset)
    changed = {key: value for key, value in vars(run).items() if value != getattr(plain, key)}
    given = {"preset": run.preset, "stage": run.stage, **changed, "output_dir": output}
    start, world = "train", int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        start = f"launch {given.pop('stage')} --gpus {world}"
    again = shlex.join(word for key, value in given.items() if value for word in (f"--{key}", str(value)))
    lines = [f"This is a preset. The same run: tove-llava {start} {again}", *_plan(run, preset, stage)]
    if run.pretrained is not None and not Path(run.pretrained).is_dir():
        lines.append(f"{run.pretrained} is not there yet; the run starts from it")
    if output is not None and complete(Path(output)):
        lines.append(f"{complete(Path(output))[-1]} is there: the run goes on from it, if its settings are these")
    return dump_preset(preset) + "".join(f"# {line}\n" for line in lines)


def print_sizes(argv: Sequence[str]) -> str:
    """Return a preset's parameters and GFLOPs, without loading weights."""
    given = Parser().given([word for word in argv if word != "--meta"])
    return format_sizes(preset_sizes(load_preset(given.get("preset", "tiny"), given["set"])))


def _plan(run: RunArguments, preset: Preset, stage: StagePreset) -> list[str]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(stage)
    deepspeed = resolve_deepspeed(stage.arguments.get("deepspeed", stage.deepspeed))
    batch = stage.arguments.get("per_device_train_batch_size", 8)
    windows = stage.arguments.get("gradient_accumulation_steps", 1)
    shape = stage_shape(preset, run.stage)
    lines = [
        f"processes: {world} on {device.type}, DeepSpeed: {Path(deepspeed or 'none').stem}",
        f"global batch: {batch * windows * world} records ({batch}, accumulated {windows} times, on {world} processes)",
        _memory(preset, run.stage, shape, Run(world, deepspeed, batch, stage.model_max_length), device),
    ]
    if run.data_path is None:
        return [*lines, "steps and time: give --data_path"]
    records = count_records(run, preset, stage, shape)
    epochs, steps = planned_steps(records.count, batch * world, stage.arguments)
    lines.append(f"steps: {steps:,} (epochs: {epochs:.3g}, records: {records.count:,})")
    if not records.sampled:
        return [*lines, "tokens and time: the tokenizer is not on this machine"]
    trained = steps * batch * windows * world
    lines.append(
        f"tokens: about {records.tokens * trained:,.0f}, {records.supervised * trained:,.0f} of them supervised "
        f"({records.tokens:.0f} and {records.supervised:.0f} a record, the mean of {records.sampled})"
    )
    return [*lines, _time(run, preset, stage, shape, records, trained / world, device)]


def _memory(preset: Preset, stage: str, shape: Shape, run: Run, device: torch.device) -> str:
    memory = training_memory(preset, stage, shape, run)
    parts = ("weights", "backbones", "gradients", "optimizer", "activations")
    listed = ", ".join(f"{part} {getattr(memory, part) / GIB:.2f}" for part in parts)
    if device.type == "cuda":
        listed += f"; free now: {torch.cuda.mem_get_info(device)[0] / GIB:.1f}"
    return f"memory: about {memory.total / GIB:.1f} GiB a process with records of {run.length} tokens ({listed})"


def _time(
    run: RunArguments,
    preset: Preset,
    stage: StagePreset,
    shape: Shape,
    records: Records,
    trained: float,
    device: torch.device,
) -> str:
    cached = run.feature_cache is not None
    work = trained * record_operations(preset_sizes(preset), stage, shape, records, cached=cached)
    mixed = stage.arguments.get("bf16") or stage.arguments.get("fp16")
    speed = product_speed(device, torch.bfloat16 if mixed else torch_dtype(preset.language.dtype))
    left = timedelta(seconds=round(work / (SHARE * speed)))
    return (
        f"time: about {left}, an estimate: {work / 1e12:,.3g} TFLOP a process at {SHARE:.0%} of the "
        f"{speed / 1e12:,.3g} TFLOP/s that matrix products reach here; waiting for data and other ranks not counted"
    )


def planned_steps(records: int, batch: int, arguments: dict[str, Any]) -> tuple[float, int]:
    """Return epochs and optimizer steps, as transformers' Trainer counts them.

    Args:
        batch: records of a micro-batch on all processes.

    Raises:
        ConfigError: the records fill no batch, and a smaller one is dropped.
    """
    windows = arguments.get("gradient_accumulation_steps", 1)
    dropped = arguments.get("dataloader_drop_last", False)
    if dropped and records < batch:
        raise ConfigError(
            f"--dataloader_drop_last True leaves nothing to train on: {records} records do not fill a batch of {batch}"
        )
    batches = records // batch if dropped else math.ceil(records / batch)
    each = max(math.ceil(batches / windows), 1)
    steps = arguments.get("max_steps", -1)
    if steps <= 0:
        steps = math.ceil(arguments.get("num_train_epochs", 3) * each)
    return steps / each, steps


def count_records(run: RunArguments, preset: Preset, stage: StagePreset, shape: Shape) -> Records:
    """Count a run's records, and the tokens of some; image files are not looked at."""
    assert run.data_path is not None
    tokenizer = _tokenizer(run, preset)
    if tokenizer is None:
        return Records(len(DataFiles(run.data_path)))
    dataset = LlavaDataset(
        run.data_path,
        run.image_folder,
        tokenizer,
        stage.template,
        ImageTransform(32, "square"),  # of images that are not opened
        num_image_tokens=shape.image_tokens,
        model_max_length=stage.model_max_length,
        check_files=False,
        image_placeholder=stage.image_placeholder,
    )
    stride = max(1, len(dataset) // SAMPLE)
    rows = [dataset.encode(record) for record in dataset.records[::stride]]
    images = sum(row.num_images for row in rows)
    tokens = sum(len(row.input_ids) for row in rows) + images * (shape.image_tokens - 1)
    supervised = sum(row.num_supervised for row in rows)
    count = len(WeightedSampler(dataset.sizes, dataset.weights, 0))
    return Records(count, len(rows), images / len(rows), tokens / len(rows), supervised / len(rows))


def _tokenizer(run: RunArguments, preset: Preset) -> PreTrainedTokenizerBase | None:
    """Load the run's tokenizer if it is on this machine."""
    if run.pretrained is not None and Path(run.pretrained).is_dir():
        return load_processor(Path(run.pretrained)).tokenizer
    source = Source.parse(preset.language.tokenizer or preset.language.source)
    cached = source.path is not None or source.scheme != "hf"
    if not cached:
        name = source.pretrained()["pretrained_model_name_or_path"]
        cached = isinstance(try_to_load_from_cache(name, "tokenizer_config.json"), str)
    try:
        return read_tokenizer(preset.language) if cached else None
    except ToveError:
        return None


def record_operations(
    sizes: Sequence[Size], stage: StagePreset, shape: Shape, records: Records, *, cached: bool
) -> float:
    """Count a mean record's operations in training.

    Args:
        sizes: :func:`tove_llava.llava.sizes.preset_sizes` of the preset.
        cached: features are read from a cache, so no encoder runs.
    """
    gflops = {size.part: size.gflops for size in sizes}
    language = gflops.pop("language model") * records.tokens / (shape.image_tokens + TEXT_TOKENS)
    trained = gflops.pop("projector") + gflops.pop("tower: gate and projections")
    encoders = 0.0 if cached else sum(gflops.values())
    if shape.encoder_kept:  # CLIP's copy
        trained += gflops["CLIP"]
    times = 2 + (shape.trained >= shape.quantizable) + (stage.kept == FULL)
    return 1e9 * (language * times + records.images * (encoders + 3 * trained))


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations a second of square matrix products, for half a second."""
    width = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    _wait(device)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < MEASURED:
        a @ b
        count += 1
        _wait(device)
    return 2 * width**3 * count / (time.perf_counter() - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(stage: StagePreset) -> torch.device:
    if stage.arguments.get("use_cpu") or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
