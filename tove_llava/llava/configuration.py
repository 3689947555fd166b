"""Configuration of a LLaVA with a ToVE tower."""

from __future__ import annotations

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig
from transformers.activations import ACT2FN

from tove_llava.core.errors import ConfigError
from tove_llava.tower import ToveVisionConfig


@strict
class ToveLlavaConfig(LlavaConfig):
    """LLaVA's configuration, with a :class:`~tove_llava.tower.ToveVisionConfig` as ``vision_config``.

    Args:
        vision_config: the tower's, or its dict; the other keys are LLaVA's.

    Raises:
        ConfigError: another kind of vision configuration, or a layer or token selection that the tower does not have.

    Example:
        >>> config = tove_llava.ToveLlavaConfig.from_pretrained(folder)
        >>> config.vision_config.expert_names, config.image_seq_length
        (['depth', 'normal', 'edge', 'segmentation'], 36)
    """

    model_type = "tove_llava"
    # transformers' Trainer then collects only logits when it evaluates.
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "image_hidden_states",
        "image_outputs",
        "lm_loss",
        "aux_loss",
        "routing",
        "gate_inputs",
    ]

    vision_feature_select_strategy: Literal["default", "full"] = "full"
    vision_feature_layer: int | list[int] = -1

    def __post_init__(self, **kwargs: Any) -> None:
        vision: Any = self.__dict__["vision_config"]
        # The class itself, because AutoConfig does not know it when this module is remote code.
        if vision is None or (isinstance(vision, dict) and vision.get("model_type", "tove_vision") == "tove_vision"):
            self.vision_config = ToveVisionConfig(**(vision or {}))
        super().__post_init__(**kwargs)
        if not isinstance(self.vision_config, ToveVisionConfig):
            raise ConfigError(
                f"ToveLlavaConfig needs a ToveVisionConfig as vision_config, not a {type(self.vision_config).__name__}"
            )
        if self.vision_feature_layer not in (-1, [-1]) or self.vision_feature_select_strategy != "full":
            raise ConfigError(
                "a ToVE tower returns one hidden state without a class token: set vision_feature_layer=-1 and "
                "vision_feature_select_strategy='full' (CLIP's layer is the tower's clip_layer)"
            )
        if str(self.projector_hidden_act) not in ACT2FN:
            raise ConfigError(f"projector_hidden_act {self.projector_hidden_act!r} is no activation of transformers")
        self.image_seq_length = self.vision_config.num_image_tokens
        forget_gguf(self)
        forget_gguf(self.text_config)


def forget_gguf(config: Any) -> None:
    """Remove what transformers' GGUF loader leaves in a configuration; other quantisations stay.

    The weights are ordinary by then. Otherwise ``from_pretrained`` would attach GGUF's quantiser to a saved model,
    which refuses to save, and servers would look for GGUF's blocks.
    """
    kept = vars(config)
    kept.pop("_model_name_or_path", None)  # the title in the file
    quantization = kept.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if getattr(method, "value", method) == "gguf":
        del kept["quantization_config"]
