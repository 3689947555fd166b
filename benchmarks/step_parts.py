"""Shared parts of the step's benchmarks: step, batches, FLOPs and utilisation."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from common import Bench
from measuring import Samples, count_flops
from models import build_llava, weight_bytes
from torch import nn

from tove_llava.llava import ToveLlavaForConditionalGeneration, VisionInputs
from tove_llava.presets import StagePreset
from tove_llava.tower import TowerFeatures
from tove_llava.train.stages import Trainable, freeze, parameter_groups

# Published dense bfloat16 and float16 TFLOP/s, by the name that the driver gives.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
}
LEARNING_RATE = 1e-5  # the time does not depend on it


class TrainingStep:
    """One optimiser step of a stage on one batch; calls return losses.

    Args:
        model: on its device, with backbones. The stage's freezing policy is applied to it.
        stage: of the preset.
        dtype: of the computation; what trains is float32.
    """

    def __init__(self, model: ToveLlavaForConditionalGeneration, stage: StagePreset, dtype: torch.dtype) -> None:
        self.model, self.dtype = model.train(), dtype
        self.device = next(model.parameters()).device
        self.trainable: Trainable = freeze(model, stage)
        model.to(self.device)  # adapters too
        for parameter in self.trainable.parameters():
            parameter.data = parameter.data.float()
        groups = parameter_groups(
            self.trainable, learning_rate=LEARNING_RATE, weight_decay=stage.arguments.get("weight_decay", 0.0)
        )
        self.optimizer = torch.optim.AdamW(groups, fused=self.device.type == "cuda")
        self.max_grad_norm = stage.arguments.get("max_grad_norm", 1.0)

    def precision(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def forward(self, batch: dict[str, Any], *, add_aux_loss: bool = True) -> torch.Tensor:
        with self.precision():
            return self.model(**batch, add_aux_loss=add_aux_loss, use_cache=False).loss

    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        loss = self.forward(batch)
        loss.backward()
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(list(self.trainable.parameters()), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def encode(self, pixel_values: torch.Tensor) -> TowerFeatures:
        with self.precision():
            return self.model.tower.encode(pixel_values)

    def needed_flops(self, batch: dict[str, Any]) -> dict[str, int]:
        """Count the FLOPs of a step; checkpointing has to be off."""
        rest, encoders = batch, 0
        if "pixel_values" in batch:
            rest = with_features(batch, self.encode(batch["pixel_values"]))
            encoders = count_flops(lambda: self.encode(batch["pixel_values"]))
        trained = count_flops(lambda: self.forward(rest, add_aux_loss=False).backward())
        forward = count_flops(lambda: self.forward(rest, add_aux_loss=False))
        self.optimizer.zero_grad(set_to_none=True)
        return {"frozen_encoders": encoders, "forward": forward, "backward": trained - forward}

    def resident_bytes(self) -> int:
        """Return the bytes of weights, backbones and optimiser state."""
        frozen = self.model.tower.frozen
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return weight_bytes(self.model, frozen.clip, frozen.hub) + sum(t.numel() * t.element_size() for t in state)


class SharedModel:
    """The preset's model, built once, when it is first needed."""

    def __init__(self, bench: Bench, weights: str) -> None:
        self.bench, self.weights = bench, weights
        self._model: ToveLlavaForConditionalGeneration | None = None

    @property
    def model(self) -> ToveLlavaForConditionalGeneration:
        if self._model is None:
            self._model = build_llava(self.bench, self.weights)
        return self._model

    @contextmanager
    def step(self, stage: StagePreset) -> Iterator[TrainingStep]:
        """Make a stage's step; afterwards only trained values differ."""
        model = self.model
        children = {module: dict(module._modules) for module in model.modules()}
        attributes, dtypes = set(vars(model)), {p: p.dtype for p in model.parameters()}
        try:
            yield TrainingStep(model, stage, self.bench.dtype)
        finally:
            for module, before in children.items():  # without adapters
                module._modules.clear()
                module._modules.update(before)
            for name in set(vars(model)) - attributes:
                delattr(model, name)
            for parameter, dtype in dtypes.items():
                parameter.data, parameter.grad = parameter.data.to(dtype), None

    def take(self) -> ToveLlavaForConditionalGeneration:
        """Hand over the model; a later part builds a new one."""
        model, self._model = self.model, None
        return model


def make_batch(
    model: ToveLlavaForConditionalGeneration,
    size: int,
    text_tokens: int,
    dtype: torch.dtype,
    seed: int,
    *,
    supervised: int | None = None,
) -> dict[str, Any]:
    """Make ``size`` samples of an image and ``text_tokens`` tokens each.

    Args:
        supervised: the number of last tokens that are; by default half of them, and then with all logits.
    """
    device, vision = next(model.parameters()).device, model.config.vision_config
    generator = torch.Generator().manual_seed(seed)
    image = model.config.image_token_index
    text = torch.randint(3, model.config.text_config.vocab_size - 1, (size, text_tokens), generator=generator)
    text += text >= image  # any word but the image's
    images = torch.full((size, vision.num_patches), image)
    input_ids = torch.cat([text[:, :1], images, text[:, 1:]], dim=1)  # [B, N + text_tokens]
    labels = input_ids.clone()
    labels[:, : -(supervised or text_tokens // 2)] = -100
    pixels = torch.randn(size, 3, vision.image_size, vision.image_size, generator=generator)
    batch = {
        "input_ids": input_ids.to(device),
        "attention_mask": torch.ones_like(input_ids).to(device),
        "labels": labels.to(device),
        "pixel_values": pixels.to(device, dtype),
    }
    if supervised is not None:
        length = labels.shape[1]
        ends = torch.arange(1, size + 1, device=device)[:, None] * length - 1
        batch["supervised"] = (ends + torch.arange(-supervised, 0, device=device)).flatten()
    return batch


def packed(batch: dict[str, Any]) -> dict[str, Any]:
    """Put the samples into one row, as the collator does."""
    rows, length = batch["input_ids"].shape
    device = batch["input_ids"].device
    bounds = torch.arange(rows + 1, device=device, dtype=torch.int32) * length
    kept = {key: value for key, value in batch.items() if key in ("pixel_values", "vision", "supervised")}
    return kept | {
        "input_ids": batch["input_ids"].reshape(1, -1),
        "labels": batch["labels"].reshape(1, -1),
        "position_ids": torch.arange(length, device=device).repeat(rows)[None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
        **dict.fromkeys(("max_length_q", "max_length_k"), length),
    }


def with_features(batch: dict[str, Any], features: TowerFeatures) -> dict[str, Any]:
    """Return the batch with encoders' output instead of images."""
    return {**{k: v for k, v in batch.items() if k != "pixel_values"}, "vision": VisionInputs(features)}


def utilisation(
    bench: Bench, samples: dict[str, Samples], flops: dict[str, int], product_flops: float
) -> dict[str, Any]:
    """Return needed FLOPs per step, and their share of both peaks."""
    found = utilisation_of(bench, sum(flops.values()) / samples["step"].median)
    ceiling = product_flops / samples["matrix_product"].median / 1e12
    return {
        "needed_gflop_per_step": {
            **{key: value / 1e9 for key, value in flops.items()},
            "all": sum(flops.values()) / 1e9,
        },
        **found,
        "matrix_product_tflops": ceiling,
        "share_of_matrix_product": found["achieved_tflops"] / ceiling,
    }


def utilisation_of(bench: Bench, flops_per_second: float) -> dict[str, Any]:
    """Compare with the published peak, where it is known."""
    achieved, peak = flops_per_second / 1e12, bench.args.peak_tflops
    if peak is None and bench.device.type == "cuda" and bench.dtype in (torch.bfloat16, torch.float16):
        peak = PEAK_TFLOPS.get(torch.cuda.get_device_name(bench.device))
    return {
        "achieved_tflops": achieved,
        "published_peak_tflops": peak,
        "mfu": None if peak is None else achieved / peak,
    }
