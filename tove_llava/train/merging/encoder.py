"""Prepare the student, a copy of CLIP; turn it into plain CLIP."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import CLIPVisionModel

from tove_llava.core.errors import ConfigError
from tove_llava.llava.adapters import fold_adapters
from tove_llava.presets import MergePreset


def prepare_encoder(clip: CLIPVisionModel, settings: MergePreset) -> tuple[CLIPVisionModel, list[nn.Parameter]]:
    """Return a copy of CLIP and those of its parameters that learn.

    With ``settings.lora`` adapters on the linear layers of the chosen blocks learn; without, the blocks themselves. If
    no blocks are chosen, all of CLIP learns.

    Raises:
        ConfigError: this CLIP has no such block.
    """
    student = copy.deepcopy(clip).requires_grad_(False)
    blocks = _blocks(student, settings.layers)
    if settings.lora is not None:
        parameters = _inject(student, blocks, settings)
    elif settings.layers is None:
        parameters = list(student.parameters())
    else:
        parameters = [p for block in blocks for p in student.encoder.layers[block].parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return student, parameters


def merged_encoder(
    clip: CLIPVisionModel, settings: MergePreset, tensors: Mapping[str, torch.Tensor]
) -> CLIPVisionModel:
    """Return plain CLIP with the student's parameters, on the CPU.

    Args:
        clip: the original of the student.
        tensors: the learned parameters by their names in the student.
    """
    student, parameters = prepare_encoder(clip, settings)
    learned = {id(p) for p in parameters}
    expected = {name for name, p in student.named_parameters() if id(p) in learned}
    if expected != set(tensors):
        raise ValueError(f"not the student's parameters: {sorted(expected ^ set(tensors))[:3]}")
    student = student.to("cpu", next(iter(tensors.values())).dtype)
    student.load_state_dict(dict(tensors), strict=False)
    if settings.lora is not None:
        fold_adapters(student)
    return student.requires_grad_(False).eval()


def _blocks(clip: CLIPVisionModel, wanted: Iterable[int] | None) -> list[int]:
    count = len(clip.encoder.layers)
    if wanted is None:
        return list(range(count))
    wanted = list(wanted)
    bad = [index for index in wanted if not isinstance(index, int) or not -count <= index < count]
    if bad or not wanted:
        raise ConfigError(f"merge layers {wanted}: this CLIP uses {count} blocks, numbered 0 to {count - 1}")
    return sorted({index % count for index in wanted})


def _inject(student: CLIPVisionModel, blocks: list[int], settings: MergePreset) -> list[nn.Parameter]:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    assert settings.lora is not None
    linear = sorted(
        {name.rpartition(".")[2] for name, m in student.encoder.named_modules() if isinstance(m, nn.Linear)}
    )
    config = LoraConfig(
        r=settings.lora.r,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=rf"encoder\.layers\.(?:{'|'.join(map(str, blocks))})\..*(?:{'|'.join(linear)})",
    )
    inject_adapter_in_model(config, student)
    layers = [layer for layer in student.modules() if isinstance(layer, LoraLayer)]
    return [p for layer in layers for name in layer.adapter_layer_names for p in getattr(layer, name).parameters()]
