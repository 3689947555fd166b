"""Replace a tower while it is merged, by student and teacher."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tove_llava.core.errors import ConfigError
from tove_llava.presets import MergePreset
from tove_llava.tower import FUSIONS, ToveVisionConfig, ToveVisionModel, ToveVisionOutput, TowerFeatures
from tove_llava.train.merging.encoder import merged_encoder, prepare_encoder
from tove_llava.train.merging.merge_losses import MERGE_LOSSES, TOKEN_WEIGHTS, merge_loss

CLIP_FOLDER = "clip"  # of the merged encoder, in the checkpoint


class MergingTower(PreTrainedModel):
    """A tower whose CLIP learns to predict its teacher's tokens.

    The language model reads the student, which gets the gradients of both losses. The teacher is frozen and no
    submodule, like backbones (:mod:`tove_llava.tower.frozen`). ``config`` is that of the result, without experts.

    Args:
        teacher: a tower with its backbones loaded.
        settings: with a coefficient of 0 the teacher is not run, and only the language model's loss tunes CLIP.

    Raises:
        ConfigError: the teacher has no experts, or its tokens do not have CLIP's shape.
    """

    config: ToveVisionConfig
    config_class = ToveVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, teacher: ToveVisionModel, settings: MergePreset) -> None:
        config = merged_config(teacher.config)
        config._attn_implementation = teacher.config._attn_implementation
        super().__init__(config)
        MERGE_LOSSES.get(settings.loss)
        TOKEN_WEIGHTS.get(settings.token_weights)
        if settings.coefficient and not teacher.active_experts:
            raise ConfigError(
                "this model has no experts to merge: its tower is CLIP already. To tune CLIP by the language model's "
                "loss, set the merge coefficient to 0"
            )
        if (teacher.config.hidden_size, teacher.config.num_image_tokens) != (config.hidden_size, config.num_patches):
            raise ConfigError(
                f"fusion {teacher.config.fusion!r} gives tokens of another shape than CLIP's, which CLIP cannot learn "
                "to predict; merge a tower whose fusion keeps their shape, such as 'tove'"
            )
        assert teacher.frozen.clip is not None
        self.settings = settings
        self.fusion = FUSIONS.get(config.fusion)(config)  # without parameters
        self._teacher = (teacher.requires_grad_(False).eval(),)  # in a tuple: not a submodule
        self.student, self._learning = prepare_encoder(teacher.frozen.clip, settings)

    @property
    def teacher(self) -> ToveVisionModel:
        return self._teacher[0]

    @property
    def merge_coefficient(self) -> float:
        return self.settings.coefficient

    @property
    def active_experts(self) -> list[str]:
        """Return the experts of the result: none."""
        return []

    def learning(self) -> list[nn.Parameter]:
        """Return the student's parameters that train."""
        return self._learning

    def matrices(self) -> list[nn.Parameter]:
        """Return those that are weights of linear layers."""
        learning = {id(p) for p in self._learning}
        linear = (module.weight for module in self.student.modules() if isinstance(module, nn.Linear))
        return [weight for weight in linear if id(weight) in learning]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MergingTower:
        super()._apply(fn, recurse)
        self.teacher._apply(fn)
        return self

    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        features: TowerFeatures | None = None,
        gate_noise: torch.Tensor | None = None,
        output_hidden_states: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ToveVisionOutput:
        """Return the student's tokens ``[B,N,d]``, and in training ``merge_loss`` ``[B]``.

        Args:
            pixel_values: ``[B,3,S,S]``, S the teacher's input size.
            features: results of ``teacher.encode``, if they were computed earlier.
        """
        size, clip_size = pixel_values.shape[-1], self.config.image_size
        pixels = pixel_values
        if size != clip_size:
            pixels = F.interpolate(pixel_values.float(), (clip_size, clip_size), mode="bicubic", antialias=True)
        tokens = self.student(pixels.to(self.student.dtype)).last_hidden_state[:, 1:]  # [B,N,d]
        loss = None
        if self.training and self.settings.coefficient:
            with torch.no_grad():
                features = self.teacher.encode(pixel_values) if features is None else features
                target = self.teacher.fuse(features).last_hidden_state
            loss = merge_loss(
                tokens, features.base, target, loss=self.settings.loss, token_weights=self.settings.token_weights
            )
        return ToveVisionOutput(last_hidden_state=tokens, hidden_states=(tokens,), merge_loss=loss)

    def blank_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Return an image of zeros; see :meth:`ToveVisionModel.blank_inputs`."""
        size = self.teacher.config.image_size
        return {"pixel_values": torch.zeros(1, 3, size, size, device=device, dtype=dtype)}

    def save_parts(
        self, folder: str | os.PathLike[str], trained: Mapping[str, torch.Tensor], prefix: str, self_contained: bool
    ) -> tuple[ToveVisionConfig, dict[str, torch.Tensor]]:
        """Write the merged encoder as plain CLIP; see :meth:`ToveVisionModel.save_parts`."""
        start = f"{prefix}student."
        learned = {name.removeprefix(start): value for name, value in trained.items() if name.startswith(start)}
        clip = self.teacher.frozen.clip
        assert clip is not None
        merged_encoder(clip, self.settings, learned).save_pretrained(Path(folder) / CLIP_FOLDER)
        config = ToveVisionConfig.from_dict(self.config.to_dict())
        config.clip_source, config.clip_revision = f"hf:./{CLIP_FOLDER}", None
        return config, {name: value for name, value in trained.items() if not name.startswith(start)}


def merged_config(config: ToveVisionConfig) -> ToveVisionConfig:
    """Return a merged tower's configuration: CLIP without experts."""
    return ToveVisionConfig(
        clip_config=config.clip_config.to_dict(),
        clip_source=config.clip_source,
        clip_revision=config.clip_revision,
        clip_layer=config.clip_layer,
        image_mean=config.image_mean,
        image_std=config.image_std,
        fusion="none",
    )
