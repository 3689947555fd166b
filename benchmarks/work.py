"""A training stage's operations per record, counted without loading anything.

The convention is that of ``train_step.py``: two operations per multiply-add, no recomputation, no gradients of frozen
weights.
"""

import copy
from typing import Any

import torch
from measuring import count_flops

from tove_llava.llava import ToveLlavaForConditionalGeneration
from tove_llava.llava.build import build_on_meta, language_config
from tove_llava.llava.sizes import preset_sizes
from tove_llava.presets import Preset
from tove_llava.tower import ToveVisionModel, TowerFeatures
from tove_llava.train.stages import freeze


class Work:
    """Counts of a preset's stages that train at least fusion and projector.

    Attributes:
        image_tokens: tokens of an image in the language model.
        encoders: operations of CLIP and the experts for an image.
        transfer: operations of fusion and projector for an image, gradients included.
    """

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self._vision: Any = build_on_meta(preset, layers=1).config.vision_config  # takes longest
        self._layers: int = language_config(preset.language).num_hidden_layers
        self.image_tokens: int = self._vision.num_image_tokens
        sizes = preset_sizes(preset)
        self.encoders = 1e9 * sum(s.gflops for s in sizes if s.part == "CLIP" or s.part.startswith("expert "))
        self.transfer = self._transfer()

    def record(self, stage: str, *, positions: int, scored: int, pictures: float = 1.0) -> float:
        """Count the operations of one record.

        Args:
            positions: of the language model, the images' included.
            scored: positions whose logits are needed.
            pictures: of the record; of a mean record, a fraction.
        """
        shallow, deeper = (self._language(stage, layers, positions, scored) for layers in (1, 2))
        language = shallow + (self._layers - 1) * (deeper - shallow)
        return language + pictures * (self.encoders + self.transfer)

    def _transfer(self) -> int:
        """Count on the CPU: autocast does not know the meta device."""
        vision = self._vision
        features = TowerFeatures(
            base=torch.zeros(1, vision.num_patches, vision.clip_width),
            experts={s.name: torch.zeros(1, s.width, *s.grid) for s in vision.expert_specs},
        )
        tower = ToveVisionModel(copy.deepcopy(vision)).train()
        projector = self._model(1).model.multi_modal_projector.to_empty(device="cpu").float()
        return count_flops(lambda: projector(tower.fuse(features).last_hidden_state).sum().backward())

    def _language(self, stage: str, layers: int, positions: int, scored: int) -> int:
        """Count a shorter language model, forward and backward, below a projector."""
        model = self._model(layers)
        freeze(model, self.preset.stage(stage))
        model.to("meta").train()  # adapters too
        language, head = model.model.language_model, model.lm_head
        dtype = head.weight.dtype
        inputs = torch.zeros(1, positions, head.in_features, dtype=dtype, device="meta", requires_grad=True)
        # A finished mask: transformers would look at values to make one, and the meta device has none.
        mask = torch.zeros(1, 1, positions, positions, dtype=dtype, device="meta")

        def step() -> None:
            hidden = language(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
            head(hidden[:, :scored]).sum().backward()

        return count_flops(step)

    def _model(self, layers: int) -> ToveLlavaForConditionalGeneration:
        return build_on_meta(self.preset, layers=layers, vision=copy.deepcopy(self._vision))
