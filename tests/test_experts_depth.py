"""A depth expert that knows distances may keep their scale."""

import pytest
import torch

from tove_llava.core.errors import ConfigError
from tove_llava.experts import ExpertSpec, build_expert

PICTURES = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def maps(**options):
    expert = build_expert(ExpertSpec(name="depth", source="bundled:depth", mode="map", options=options))
    expert.load()
    return expert(PICTURES)


def test_relative_depth_fills_the_unit_range_and_metric_depth_keeps_its_own():
    relative, metric = maps(), maps(relative=False)
    assert relative.amin((1, 2, 3)).tolist() == [0, 0] and relative.amax((1, 2, 3)).tolist() == pytest.approx([1, 1])
    low, high = metric.amin((1, 2, 3), keepdim=True), metric.amax((1, 2, 3), keepdim=True)
    assert torch.allclose((metric - low) / (high - low), relative, atol=1e-5)
    assert not torch.allclose(high, torch.ones_like(high), atol=1e-2)


def test_an_option_of_another_expert_is_refused():
    with pytest.raises(ConfigError, match="relative"):
        build_expert(ExpertSpec(name="edge", source="bundled:edge", mode="map", options={"relative": False}))
