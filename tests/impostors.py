"""An expert and a fusion with a language model's layer names."""

from contextlib import contextmanager

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tove_llava.experts import EXPERTS, base
from tove_llava.experts.base import Expert, register_expert
from tove_llava.tower import FUSIONS
from tove_llava.tower.fusion.tove_gate import ToveFusion

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
WIDTH = 8


class Layers(nn.Module):
    """[B,3,H,W] -> [B,8,H/8,W/8], by linear layers under ``language_model.layers.0``."""

    def __init__(self):
        super().__init__()
        block = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in NAMES[:-1]})
        self.language_model = nn.ModuleDict({"layers": nn.ModuleList([block])})
        self.patches = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.lm_head = nn.Linear(WIDTH, WIDTH)

    def forward(self, pixels):
        tokens = self.patches(pixels).movedim(1, -1)
        for layer in self.language_model["layers"][0].values():
            tokens = layer(tokens)
        return self.lm_head(tokens).movedim(-1, 1)


class Impostor(Expert):
    default_source = "hf:/weights/impostor"
    default_image_size = 32

    def build(self, pretrained):
        network = Layers()
        if pretrained:
            network.load_state_dict(load_file(self.source.require() / "model.safetensors"))
        return network

    def features(self, pixels):
        return self.network(pixels)


class ImpostorFusion(ToveFusion):
    """ToVE after a block of linear layers."""

    def __init__(self, config):
        super().__init__(config)
        self.language_model = nn.ModuleDict({name: nn.Linear(config.clip_width, config.clip_width) for name in NAMES})

    def combine(self, base, delta):
        for layer in self.language_model.values():
            delta = layer(delta.to(layer.weight.dtype))
        return super().combine(base, delta)


@contextmanager
def impostors(folder):
    """Register both temporarily; return the ``vision`` entries of a preset.

    The expert's weights are in ``folder``.
    """
    torch.manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(Layers().state_dict(), folder / "model.safetensors")
    register_expert("impostor")(Impostor)
    FUSIONS.register("impostor")(ImpostorFusion)
    try:
        entry = {"name": "q_proj", "expert": "impostor", "source": f"hf:{folder}", "image_size": 32}
        yield {"experts": [entry], "fusion": "impostor"}
    finally:
        del EXPERTS._entries["impostor"], base._families["impostor"], FUSIONS._entries["impostor"]
