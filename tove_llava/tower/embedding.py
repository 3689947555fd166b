"""Expert-specific first layers: a feature map becomes one row per token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tove_llava.core.errors import ConfigError
from tove_llava.tower.tower_config import ToveVisionConfig

STEM_WIDTH = 16  # channels of the stem that embeds a dense prediction


def resample_grid(features: Tensor, size: int) -> Tensor:
    """Resample ``[B,c,h,w]`` to ``[B,c,size,size]``: bilinear, antialiased when shrinking.

    Computed in float32 (antialiasing has no bfloat16 kernel on the CPU), returned in the input's dtype.
    """
    height, width = features.shape[-2:]
    if (height, width) == (size, size):
        return features
    shrinking = height > size or width > size
    resized = F.interpolate(
        features.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=shrinking
    )
    return resized.to(features.dtype)


class ClosedLinear(nn.Linear):
    """A linear layer that starts at zero, to close its residual branch."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class TokenEmbedding(nn.Module):
    """Expert-specific first layer for an encoder's tokens: resample, LayerNorm, Linear, GELU."""

    def __init__(self, channels: int, width: int, *, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, width)

    def rows(self, features: Tensor) -> Tensor:
        """Turn ``[B,c,h,w]`` into one row per token, ``[B*N,c]``, for :meth:`forward`."""
        return _as_rows(resample_grid(features, self.grid).flatten(2))

    def forward(self, rows: Tensor, activate: bool = True) -> Tensor:
        """Map ``[R,c]`` to ``[R,m]``; without the GELU if ``activate`` is False."""
        hidden = self.linear(self.norm(rows.to(self.norm.weight.dtype)))
        return F.gelu(hidden) if activate else hidden

    def empty_rows(self, device: torch.device) -> Tensor:
        return torch.empty(0, self.linear.in_features, device=device)


class MapEmbedding(nn.Module):
    """Expert-specific first layer for a dense prediction: a small convolutional stem.

    A 3x3 convolution, GELU, a patch embedding, GELU. The expert keeps the map's values of order 1. A map with a whole
    number of cells per token keeps its resolution, and a patch covers the same part of the image as a token; any other
    map is resampled to the image's resolution.
    """

    def __init__(
        self, channels: int, width: int, *, map_size: tuple[int, int], image_size: int, grid: int, stem_width: int
    ) -> None:
        super().__init__()
        rows, columns = map_size
        native = rows == columns and rows % grid == 0 and rows <= image_size
        self.map_size = rows if native else image_size
        self.patch_size = patch_size = self.map_size // grid
        self.conv = nn.Conv2d(channels, stem_width, kernel_size=3, padding=1)
        # The convolution of kernel and stride p, as a linear layer on unfolded patches: tokens can be left out.
        self.linear = nn.Linear(stem_width * patch_size**2, width)

    def rows(self, features: Tensor) -> Tensor:
        """Turn ``[B,c,h,w]`` into one row per token, ``[B*N, stem_width*p*p]``, for :meth:`forward`."""
        maps = resample_grid(features, self.map_size).to(self.conv.weight.dtype)  # [B,c,S,S]
        stem = F.gelu(self.conv(maps))  # [B,s,S,S]
        patches = F.unfold(stem, kernel_size=self.patch_size, stride=self.patch_size)  # [B, s*p*p, N]
        return _as_rows(patches)

    def forward(self, rows: Tensor, activate: bool = True) -> Tensor:
        """Map ``[R, stem_width*p*p]`` to ``[R,m]``; without the GELU if ``activate`` is False."""
        hidden = self.linear(rows.to(self.linear.weight.dtype))
        return F.gelu(hidden) if activate else hidden

    def empty_rows(self, device: torch.device) -> Tensor:
        # Through the convolution too, so that its parameters are in the graph.
        empty = torch.empty(0, self.conv.in_channels, self.map_size, self.map_size, device=device)
        return self.conv(empty.to(self.conv.weight.dtype)).reshape(0, self.linear.in_features)


class ExpertEmbeddings(nn.ModuleDict):
    """One first layer per expert, with rows of width ``config.projection_dim``.

    Raises:
        ConfigError: the tower has no experts, or an expert's width is not recorded.
    """

    def __init__(self, config: ToveVisionConfig, stem_width: int = STEM_WIDTH) -> None:
        super().__init__()
        if not config.experts:
            raise ConfigError(
                f"fusion {config.fusion!r} needs at least one expert; for a tower of only CLIP set fusion to 'none'"
            )
        for spec in config.expert_specs:
            if spec.width < 1:
                raise ConfigError(
                    f"expert {spec.name!r}: its width is not recorded in the configuration; build the configuration "
                    "with ToveVisionConfig.from_sources, which reads it from the source"
                )
            if spec.mode == "map":
                self[spec.name] = MapEmbedding(
                    spec.width,
                    config.projection_dim,
                    map_size=spec.grid,
                    image_size=config.image_size,
                    grid=config.grid,
                    stem_width=stem_width,
                )
            else:
                self[spec.name] = TokenEmbedding(spec.width, config.projection_dim, grid=config.grid)

    def hidden(self, name: str, features: Tensor, usable: Mapping[str, Tensor] | None) -> Tensor:
        """Compute ``H_k`` of one expert for all tokens, ``[B,N,m]``.

        Args:
            features: ``[B,d_k,h_k,w_k]``.
            usable: ``[B]`` bool by expert; the rows of other images are zero.
        """
        embedding = self[name]
        hidden = embedding(embedding.rows(features)).unflatten(0, (len(features), -1))  # [B,N,m]
        if usable and name in usable:
            hidden = hidden * usable[name].to(hidden.device)[:, None, None]
        return hidden

    def touched(self, name: str, device: torch.device) -> Tensor:
        """Compute zero through all parameters of an expert that is left out.

        In training every rank and every step has to touch the same parameters; this costs nothing.
        """
        embedding = self[name]
        return embedding(embedding.empty_rows(device)).sum()


def _as_rows(columns: Tensor) -> Tensor:
    """Turn ``[B,c,N]`` into ``[B*N,c]``, contiguous even for one image."""
    return columns.transpose(1, 2).flatten(0, 1).contiguous()  # any selection of rows then gives the same bits
