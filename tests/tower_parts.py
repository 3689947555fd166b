"""Small random parts for tower tests: a CLIP folder, experts, towers, LLaVAs."""

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from tove_llava.core.sources import HubSource
from tove_llava.experts import Expert, ExpertSpec, register_expert
from tove_llava.tower import ToveVisionConfig, ToveVisionModel

IMAGE = 32  # pixels per side
GRID = 4  # tokens per side


def dummy_network(channels, stride):
    return nn.Sequential(nn.Conv2d(3, channels, stride, stride), nn.BatchNorm2d(channels))


@register_expert("dummy", "hf")
class DummyExpert(Expert):
    """One convolution, its weights from a folder. ``nan_above`` breaks bright images."""

    default_source = "hf:./nowhere"
    option_names = ("channels", "stride", "nan_above")
    modes = ("features", "map")
    calls = 0

    def configure(self):
        return IMAGE

    def build(self, pretrained):
        net = dummy_network(self.option("channels", 12), self.option("stride", 8))
        if pretrained:
            net.load_state_dict(load_file(self.source.require() / "model.safetensors"))
        return net

    def features(self, pixels):
        type(self).calls += 1
        out = self.backbone(pixels)
        if (limit := self.option("nan_above")) is not None:
            out = torch.where(pixels.mean(dim=(1, 2, 3), keepdim=True) > limit, torch.nan, out)
        return out

    def save_backbone(self, folder):
        save_file(self.backbone.state_dict(), folder / "model.safetensors")
        return HubSource(str(folder))


def save_dummy(folder, *, channels=12, stride=8, seed=0):
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    save_file(dummy_network(channels, stride).state_dict(), folder / "model.safetensors")
    return f"hf:{folder}"


def save_clip(folder, *, image_size=IMAGE, layers=3, width=16, seed=1):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = CLIPVisionConfig(image_size=image_size, patch_size=image_size // GRID, projection_dim=8, **sizes)
    CLIPVisionModel(config).save_pretrained(folder)
    return f"hf:{folder}"


def expert_entries(folder, names=("depth", "edge", "normal"), **options):
    """A dummy expert per name, in ``folder``, with varied widths and grids."""
    entries = []
    for i, name in enumerate(names):
        shape = {"channels": 6 + 2 * i, "stride": (8, 4, 16)[i % 3]}
        source = save_dummy(folder / name, seed=10 + i, **shape)
        entries.append(ExpertSpec(name=name, expert="dummy", source=source, options=shape | options.get(name, {})))
    return entries


def tower_config(folder, names=("depth", "edge", "normal"), expert_options=None, **keys):
    return ToveVisionConfig.from_sources(
        save_clip(folder / "clip"),
        expert_entries(folder, names, **(expert_options or {})),
        **{"projection_dim": 10, **keys},
    )


def make_tower(folder, *, opened=False, seed=0, **keys):
    """A loaded tower in eval mode.

    ``opened`` gives the zero-initialised output layer random weights.
    """
    torch.manual_seed(seed)
    tower = ToveVisionModel(tower_config(folder, **keys)).load_backbones().eval()
    if opened:
        open_output(tower)
    return tower


def open_output(tower, scale=0.5):
    with torch.no_grad():
        tower.fusion.output.weight.normal_(std=scale)
        tower.fusion.gate.score.weight.normal_(std=scale)


def text_config(**keys):
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaConfig(**{**sizes, **heads, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **keys})


def pixels(batch=2, seed=3, size=IMAGE):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
