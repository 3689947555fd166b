"""Edges from kornia's DexiNed; ``edge_dense.py`` needs no kornia."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tove_llava.core.errors import ConfigError
from tove_llava.core.sources import Source
from tove_llava.experts.base import Expert, library, register_expert

_WEIGHTS = "DexiNed_BIPED_10.pth"
_DECODER = tuple(f"up_block_{k}" for k in range(1, 7))


class _Tap(nn.Module):
    """Replaces an upsampling block; ``get_features`` then returns the encoder's block."""

    def forward(self, block: Tensor, out_shape: tuple[int, int]) -> Tensor:
        return block


@register_expert("edge")
class DexiNedEdge(Expert):
    """DexiNed from kornia's own weights (``kornia:dexined``) or from a weights file.

    Mode "features" gives the last of the six encoder blocks (256 channels at a sixteenth of the input) and builds no
    upsampling block; mode "map" gives the fused edge probability at input size.
    """

    default_source = "kornia:dexined"
    default_image_size = 336
    modes = ("features", "map")
    convolutional = True
    # DexiNed was trained on BGR in 0..255 minus its mean; here it is RGB in 0..1, flipped in features().
    mean = (123.68 / 255, 116.779 / 255, 103.939 / 255)
    std = (1 / 255, 1 / 255, 1 / 255)
    interpolation = "bilinear"

    def build(self, pretrained: bool) -> nn.Module:
        if self.spec.revision:
            raise ConfigError(f"expert {self.name!r}: kornia sources take no revision")
        if self.source.path is None and self.source.target != "dexined":
            raise ConfigError(
                f"expert {self.name!r}: kornia has no {self.source.target!r}; use kornia:dexined or a file"
            )
        with library(self.source, "kornia"):
            from kornia.models.dexined import DexiNed
        model = DexiNed(pretrained=pretrained and self.source.path is None)
        taken: tuple[str, ...] = ()
        if self.spec.mode == "features":
            for name in _DECODER:
                setattr(model, name, _Tap())
            model.block_cat = nn.Identity()
            taken = (*_DECODER, "block_cat")
        if pretrained and self.source.path is not None:
            weights = {k: v for k, v in _read(self.source.require()).items() if k.split(".")[0] not in taken}
            model.load_state_dict(weights)
        return model

    def features(self, pixels: Tensor) -> Tensor:
        bgr = pixels.flip(1)
        if self.spec.mode == "map":
            return self.network(bgr).sigmoid()
        return self.network.get_features(bgr)[-1]

    def hub_file(self) -> tuple[str, str] | None:
        return ("kornia/dexined", _WEIGHTS) if self.source.path is None else None

    def is_cached(self) -> bool:
        return (Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS).is_file()  # kornia's downloads

    def licence(self) -> str:
        return "MIT" if self.source.path is None else super().licence()

    def save_backbone(self, folder: Path) -> Source:
        file = folder / "model.safetensors"
        save_file({k: v.contiguous() for k, v in self.network.state_dict().items()}, file)
        return self.source.at(file)


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)
