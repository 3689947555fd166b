"""The step of LLaVA's own model code, in a separate process (original_step.py).

``LLAVA_SRC`` names its folder, ``LLAVA_PYTHON`` the interpreter of an environment that it can be imported in (default:
this one). Its model is LLaVA's: plain CLIP, no experts, and so has less to compute than ours.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from common import Bench, dtype_name
from llava_child import LlavaChild
from measuring import Samples

from tove_llava.core.errors import ConfigError
from tove_llava.llava import ToveLlavaForConditionalGeneration
from tove_llava.presets import StagePreset

LANGUAGE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings",
)  # fmt: skip
CLIP = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "hidden_act", "projection_dim",
)  # fmt: skip
Rows = list[tuple[int, int, bool]]  # of a micro-batch: tokens of text, supervised ones, with an image or not


def is_there() -> bool:
    return "LLAVA_SRC" in os.environ


class LlavaStep:
    """LLaVA's model in its process; a call steps on every micro-batch.

    Raises:
        ConfigError: the preset's language model is not of LLaMA's kind, or the process ended.
    """

    def __init__(
        self, bench: Bench, model: ToveLlavaForConditionalGeneration, stage: StagePreset, batches: Sequence[Rows]
    ) -> None:
        language, vision, lora = model.config.text_config, model.config.vision_config, stage.lora
        if language.model_type != "llama" or lora is None:
            raise ConfigError("LLaVA's own step is one of LoRA on a LLaMA")
        given = {
            "source": os.environ["LLAVA_SRC"],
            "threads": torch.get_num_threads(),
            "device": bench.device.type,
            "dtype": dtype_name(bench.dtype),
            "language": {key: getattr(language, key) for key in LANGUAGE},
            "clip": {key: getattr(vision.clip_config, key) for key in CLIP},
            "clip_layer": vision.clip_layer,
            "longest": stage.model_max_length,
            "lora": {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": lora.bias},
            "max_grad_norm": stage.arguments.get("max_grad_norm", 1.0),
            "batches": batches,
        }
        self._child = LlavaChild("original_step.py", "LLaVA's own step", given)
        self.made, self.close = json.loads(self._child.made), self._child.close

    def measure(self, repeats: int, over: Any = lambda: False) -> tuple[Samples, int | None]:
        """Return each repeat's seconds, and the GPU's peak memory."""
        samples, peak = Samples(), self._ask("once")["peak_bytes"]
        for repeat in range(repeats):
            if repeat and over():
                break
            found = self._ask("once more")
            samples.wall.append(found["wall"])
            samples.cpu.append(found["cpu"])
            peak = found["peak_bytes"] and max(found["peak_bytes"], peak)
        return samples, peak

    def _ask(self, line: str) -> dict[str, Any]:
        return json.loads(self._child.ask(line))
