"""Estimate a stage's memory on each device, by the formulas of docs/reference/memory.md.

With ``b`` bytes a number, ``n`` devices, and ``t`` tokens on a device (records times their length):

* Weights: ``b`` a parameter, fewer with quantisation. ZeRO-3 holds an n-th, and the layers that it has gathered. CLIP
  and the experts are whole on every device.
* Gradients and AdamW: ``b + 12`` bytes a trained parameter under DeepSpeed (the gradient; master copy and two moments
  in float32), of which ZeRO-2 and ZeRO-3 hold an n-th. Without DeepSpeed ``4 + 8``, with weights of 4 bytes.
* Activations: what the language model's layers, the projector and the tower keep for the backward pass, and the
  largest working memory: of the loss, of one layer, or of the encoders. With checkpointing a layer keeps its input,
  with selective checkpointing its wide products too, and one layer at a time is whole.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tove_llava.core.errors import ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.text import GIB
from tove_llava.llava.build import torch_dtype
from tove_llava.llava.loss import PIECE
from tove_llava.presets import Preset, QuantizationPreset, StagePreset
from tove_llava.train.recomputation import NONE, SELECTIVE, LayerCosts
from tove_llava.train.run_settings import DEEPSPEED_FOLDER
from tove_llava.train.shapes import Shape

PROCESS = GIB  # Python and the libraries; on a GPU the driver's context and the kernels
GATHERED = 10**9  # parameters that ZeRO-3 may hold whole at a time (stage3_max_live_parameters)


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, and on the host."""

    weights: int
    backbones: int
    gradients: int
    optimizer: int
    activations: int
    host: int  # for all processes together

    @property
    def total(self) -> int:
        """Return the bytes on each device, with the process's own gigabyte."""
        parts = (self.weights, self.backbones, self.gradients, self.optimizer, self.activations)
        return sum(parts) + PROCESS


@dataclass(frozen=True)
class Run:
    """The circumstances of a run."""

    devices: int
    deepspeed: str | None  # name or file of the DeepSpeed configuration
    batch: int  # records on a device
    length: int  # tokens of the longest record, image tokens included

    @classmethod
    def of(
        cls,
        preset: Preset,
        stage_name: str,
        *,
        devices: int = 1,
        deepspeed: str | None = None,
        batch: int | None = None,
        length: int | None = None,
    ) -> "Run":
        """Take settings that are not given from the stage. ``deepspeed="none"``: without DeepSpeed."""
        stage = preset.stage(stage_name)
        name = deepspeed or stage.deepspeed
        return cls(
            devices=devices,
            deepspeed=None if name in (None, "none") else name,
            batch=batch or stage.arguments.get("per_device_train_batch_size", 8),
            length=min(length or stage.model_max_length, stage.model_max_length),
        )


def training_memory(preset: Preset, stage_name: str, shape: Shape, run: Run) -> Memory:
    """Estimate the memory of a stage.

    Args:
        shape: :func:`tove_llava.train.shapes.stage_shape` of the same stage.

    Raises:
        ConfigError: no such DeepSpeed configuration.
    """
    size = _bytes(preset)
    backbones = size * shape.backbones
    loaded = run.devices * (size * shape.registered + backbones + PROCESS)  # each process makes the model on the host
    activations = _activations(preset, stage_name, shape, run)
    packed = _packed(preset.stage(stage_name).quantization, size, shape)
    if run.deepspeed is None:
        weights = size * (shape.registered - shape.trained) + 4 * shape.trained - packed
        return Memory(weights, backbones, 4 * shape.trained, 8 * shape.trained, activations, loaded)
    zero = _zero(run.deepspeed)
    level, offloaded = int(zero.get("stage", 0)), "offload_optimizer" in zero
    weights = size * shape.registered - packed
    if level == 3 and (run.devices > 1 or offloaded):
        own = 0 if "offload_param" in zero else weights // run.devices
        weights = own + size * min(GATHERED, shape.registered)
    optimizer = 12 * shape.trained // (run.devices if level >= 1 else 1)
    return Memory(
        weights=weights,
        backbones=backbones,
        gradients=size * shape.trained // (run.devices if level >= 2 else 1),
        optimizer=0 if offloaded else optimizer,
        activations=activations,
        host=loaded + (run.devices * (optimizer + size * shape.trained // run.devices) if offloaded else 0),
    )


def answering_memory(preset: Preset, shape: Shape, length: int = 2048) -> Memory:
    """Estimate the memory of answering one question at a time.

    Args:
        shape: of any stage.
        length: tokens of the conversation, image tokens included.
    """
    size = _bytes(preset)
    weights, backbones = size * shape.registered, size * shape.backbones
    cache = 2 * shape.layers * shape.hidden * length  # keys and values, unless the model shares them among heads
    work = max(shape.encoder_work, length * shape.layer_kept)
    return Memory(weights, backbones, 0, 0, size * (cache + work), weights + backbones + PROCESS)


def checkpoint_size(preset: Preset, shape: Shape, deepspeed: str | None) -> int:
    """Return the bytes of a checkpoint to resume from.

    DeepSpeed's state has a master copy in float32 and, below ZeRO-3, the trained parameters once more.

    Args:
        deepspeed: name or file of the DeepSpeed configuration, or None.
    """
    if deepspeed is None:
        return shape.trained * (4 + 8)
    copies = 1 if _zero(deepspeed).get("stage") == 3 else 2
    return shape.trained * (copies * _bytes(preset) + 12)


def stage_disk(preset: Preset, stage_name: str, shape: Shape) -> int:
    """Return the peak bytes of a run's folder while it saves."""
    stage = preset.stage(stage_name)
    kept = 1 + int(stage.arguments.get("save_total_limit") or 1)
    return shape.trained * _bytes(preset) + kept * checkpoint_size(preset, shape, stage.deepspeed)


def download_size(preset: Preset, shape: Shape) -> int:
    """Return the bytes of the published weights."""
    # The language model is published in 16 bits, encoders in 32.
    return 2 * shape.registered + 4 * shape.backbones


def largest_batch(preset: Preset, stage_name: str, shape: Shape, run: Run, available: int) -> int:
    """Halve the run's batch until it fits; return 0 if none does."""
    batch = run.batch
    while batch:
        needed = training_memory(preset, stage_name, shape, Run(run.devices, run.deepspeed, batch, run.length))
        if needed.total <= available:
            return batch
        batch //= 2
    return 0


def _activations(preset: Preset, stage_name: str, shape: Shape, run: Run) -> int:
    size, tokens = _bytes(preset), run.batch * run.length
    layer = tokens * shape.layer_kept
    kept = tokens * _kept_by_layers(preset.stage(stage_name), shape, tokens, size)
    # Projector: its two layers' inputs and the activation between them.
    kept += run.batch * (shape.fusion_kept + shape.encoder_kept + 3 * shape.image_tokens * shape.hidden)
    whole = run.deepspeed is not None and int(_zero(run.deepspeed).get("stage", 0)) == 3
    scored = tokens if whole else min(tokens, PIECE // max(shape.vocabulary, 1))
    loss = scored * shape.vocabulary * (size + 12)  # logits; in float32 again, their softmax and their gradient
    return size * kept + max(loss, 2 * size * layer, size * run.batch * shape.encoder_work)


def _packed(quantization: QuantizationPreset | None, size: int, shape: Shape) -> int:
    """Return the bytes that quantisation saves."""
    if quantization is None:
        return 0
    scales = 0.0
    if quantization.bits == 4:  # a scale for each 64 weights, in float32 or in about 8 bits
        scales = (8.125 if quantization.double_quant else 32) / 64
    return int(shape.quantizable * (size - (quantization.bits + scales) / 8))


def _kept_by_layers(stage: StagePreset, shape: Shape, tokens: int, size: int) -> int:
    """Return the numbers per token that layers keep."""
    if stage.kept == NONE:
        return shape.layers * shape.layer_kept
    kept = shape.layers * shape.hidden
    if stage.kept == SELECTIVE:
        costs = LayerCosts(shape.layers, shape.hidden, shape.layer_products, shape.layer_kept)
        budget = None if stage.checkpointing_gib is None else int(stage.checkpointing_gib * GIB)
        kept += shape.layer_products * costs.selective_layers(tokens, size, budget)
    return kept


def _zero(name: str) -> dict[str, Any]:
    file = Path(name) if name.endswith(".json") else DEEPSPEED_FOLDER / f"{name}.json"
    return read_json_object(file, ConfigError, "check --deepspeed").get("zero_optimization", {})


def _bytes(preset: Preset) -> int:
    return torch_dtype(preset.language.dtype).itemsize
