"""The expert weights of each vision token of one image.

``g * g = N`` vision tokens, ``S`` gate columns: the experts, and a null slot (called "none") where there is one.
"""

from dataclasses import dataclass

import torch

from tove_llava.tower import ToveVisionModel

NULL_SLOT = "none"


@dataclass(frozen=True)
class RoutingMap:
    """Gate weights of one image.

    Attributes:
        names: one per column.
        weights: float32 ``[g,g,S]`` on the CPU; each token's sum to 1 (to less where the fusion keeps probabilities,
            and to 0 where no column is allowed).
    """

    names: tuple[str, ...]
    weights: torch.Tensor

    @property
    def means(self) -> dict[str, float]:
        """Return the mean over the tokens, by column."""
        return dict(zip(self.names, self.weights.mean(dim=(0, 1)).tolist(), strict=True))

    @property
    def argmax(self) -> torch.Tensor:
        """Return int64 ``[g,g]``: the column with the largest weight."""
        return self.weights.argmax(dim=-1)

    @property
    def chosen(self) -> dict[str, float]:
        """Return the share of tokens whose largest weight is this column's."""
        return {name: (self.argmax == column).float().mean().item() for column, name in enumerate(self.names)}

    @property
    def grids(self) -> dict[str, list[list[float]]]:
        """Return a column's weights as rows of the token grid."""
        return {name: self.weights[..., column].tolist() for column, name in enumerate(self.names)}


@torch.inference_mode()
def routing_map(tower: ToveVisionModel, pixels: torch.Tensor) -> RoutingMap | None:
    """Return one image's routing; None for a tower without a gate.

    Args:
        pixels: ``[3,S,S]`` or ``[1,3,S,S]``, CLIP-normalised, on any device; another size is a ConfigError.
    """
    batch = pixels if pixels.ndim == 4 else pixels[None]
    weights = tower(batch.to(tower.device, tower.dtype)).routing  # [1,N,S]
    if weights is None:
        return None
    columns = weights.shape[-1]
    names = (*tower.config.expert_names, NULL_SLOT)[:columns]
    side = tower.config.grid
    return RoutingMap(names, weights[0].float().cpu().reshape(side, side, columns))
