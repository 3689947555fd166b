"""From an expert's feature map to hidden rows ``H_k``, one per vision token: the expert-specific first layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from tove_llava.core.errors import ConfigError
from tove_llava.tower.configuration import ToveVisionConfig

STEM_WIDTH = 16  # channels of the stem that embeds a dense prediction


def resample_grid(features: torch.Tensor, size: int) -> torch.Tensor:
    """``[B,c,h,w]`` -> ``[B,c,size,size]``: bilinear, antialiased when shrinking; untouched when the size is right.

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
    """A linear layer that starts at zero, so that the residual branch behind it starts closed."""

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

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """``[B,c,h,w]`` -> ``[B*N,c]``: what :meth:`forward` takes, one row per token."""
        return _as_rows(resample_grid(features, self.grid).flatten(2))

    def forward(self, rows: torch.Tensor, activate: bool = True) -> torch.Tensor:
        """``[R,c]`` -> ``[R,m]``; without the GELU where ``activate`` is False."""
        hidden = self.linear(self.norm(rows.to(self.norm.weight.dtype)))
        return F.gelu(hidden) if activate else hidden

    def empty_rows(self, device: torch.device) -> torch.Tensor:
        return torch.empty(0, self.linear.in_features, device=device)


class MapEmbedding(nn.Module):
    """Expert-specific first layer for a dense prediction: a small convolutional stem with the tower's patch size.

    A map's values are used as they are: bringing them to the order of 1 is the expert's business, it knows its units.
    A 3x3 convolution, GELU, and a patch embedding, GELU. A map in which a whole number of cells makes up each token
    stays at its own resolution (its patch then covers the same part of the picture); any other is brought to the
    picture's.
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
        # A convolution of kernel and stride p, written on unfolded patches, so that tokens can be left out.
        self.linear = nn.Linear(stem_width * patch_size**2, width)

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """``[B,c,h,w]`` -> ``[B*N, stem_width*p*p]``."""
        maps = resample_grid(features, self.map_size).to(self.conv.weight.dtype)  # [B,c,S,S]
        stem = F.gelu(self.conv(maps))  # [B,s,S,S]
        patches = F.unfold(stem, kernel_size=self.patch_size, stride=self.patch_size)  # [B, s*p*p, N]
        return _as_rows(patches)

    def forward(self, rows: torch.Tensor, activate: bool = True) -> torch.Tensor:
        """``[R, stem_width*p*p]`` -> ``[R,m]``; without the GELU where ``activate`` is False."""
        hidden = self.linear(rows.to(self.linear.weight.dtype))
        return F.gelu(hidden) if activate else hidden

    def empty_rows(self, device: torch.device) -> torch.Tensor:
        # Through the convolution too: its parameters have to be in the graph like all others.
        empty = torch.empty(0, self.conv.in_channels, self.map_size, self.map_size, device=device)
        return self.conv(empty.to(self.conv.weight.dtype)).reshape(0, self.linear.in_features)


class ExpertEmbeddings(nn.ModuleDict):
    """One first layer per expert, by name; each gives rows of width ``config.projection_dim``.

    Raises:
        ConfigError: the tower has no experts, or an expert's width is not recorded.
    """

    def __init__(self, config: ToveVisionConfig, stem_width: int = STEM_WIDTH) -> None:
        super().__init__()
        if not config.experts:
            raise ConfigError(
                f"fusion {config.fusion!r} needs at least one expert; for CLIP alone set fusion to 'none'"
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

    def hidden(self, name: str, features: torch.Tensor, usable: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
        """``H_k`` of one expert for all tokens.

        Args:
            features: ``[B,d_k,h_k,w_k]``.
            usable: ``[B]`` bool by expert; the rows of other images are zero.

        Returns:
            ``[B,N,m]``.
        """
        embedding = self[name]
        hidden = embedding(embedding.rows(features)).unflatten(0, (len(features), -1))  # [B,N,m]
        if usable and name in usable:
            hidden = hidden * usable[name].to(hidden.device)[:, None, None]
        return hidden

    def touched(self, name: str, device: torch.device) -> torch.Tensor:
        """Zero, through all parameters of an expert that is not computed.

        In training every rank and every step has to touch the same parameters; this costs nothing.
        """
        embedding = self[name]
        return embedding(embedding.empty_rows(device)).sum()


def _as_rows(columns: torch.Tensor) -> torch.Tensor:
    """``[B,c,N]`` -> ``[B*N,c]``, laid out row by row also for one image: all rows picked out give the same bits."""
    return columns.transpose(1, 2).flatten(0, 1).contiguous()
