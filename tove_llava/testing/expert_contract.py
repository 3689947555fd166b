"""The contract of an expert."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tove_llava.checkpoints.flatten import flatten_modules
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.logs import quiet_transformers
from tove_llava.experts import Expert, ExpertHub, ExpertSpec, build_expert
from tove_llava.testing.contract import Contract, Skip, require, require_close

_contract: Contract[Expert] = Contract()


def check_expert(entry: str | dict[str, Any]) -> list[str]:
    """Check an expert against its contract.

    Args:
        entry: the expert's registered name, or its entry in a preset's ``vision.experts``. The weights of its source
            have to be on this machine; a ``random:`` source needs none.

    Returns:
        the rules that hold.

    Raises:
        ContractError: rules are broken; each is named, with the expert's file and line.
        ConfigError: an unknown expert, source or option. CheckpointError: the weights are not there.

    Example:
        >>> from tove_llava.testing import check_expert
        >>> check_expert({"name": "depth", "source": "bundled:depth", "mode": "map"})[0]
        'knows its output shape before any weight is loaded'
    """
    quiet_transformers()
    spec = ExpertSpec.from_dict({"name": entry} if isinstance(entry, str) else entry)
    first = build_expert(spec)
    first.load()
    return _contract.check(lambda: _loaded(first.spec), f"expert {spec.name!r}", type(first))


def _loaded(spec: ExpertSpec) -> Expert:
    expert = build_expert(spec)
    expert.load()
    return expert


def _pixels(expert: Expert, count: int = 2, extra: int = 0) -> torch.Tensor:
    size = expert.image_size + extra
    return torch.rand(count, 3, size, size)


@_contract.rule("knows its output shape before any weight is loaded")
def _shape(expert: Expert) -> None:
    declared = build_expert(expert.spec.replace(width=0, grid=(0, 0))).spec
    features = expert(_pixels(expert))
    require(tuple(features.shape[1:]) == (declared.width, *declared.grid), f"features {tuple(features.shape)}")
    require(bool(features.isfinite().all()), "features that are not finite")


@_contract.rule("takes images of any size and float dtype")
def _sizes(expert: Expert) -> None:
    larger = expert(_pixels(expert, extra=14).double())
    require(tuple(larger.shape[1:]) == (expert.spec.width, *expert.spec.grid), f"features {tuple(larger.shape)}")


@_contract.rule("gives an image the same features in a batch as by itself, and other images other features")
def _batch(expert: Expert) -> None:
    pixels = _pixels(expert, 3)
    features = expert(pixels)
    require_close(expert(pixels[1:2]), features[1:2], "an image by itself", 1e-3)
    require(not torch.equal(features[0], features[1]), "two images have the same features")


@_contract.rule("leaves the pixels that other experts share as they are")
def _pixels_stay(expert: Expert) -> None:
    prepared = expert.condition(_pixels(expert))
    before = prepared.clone()
    expert.features(prepared)
    require(torch.equal(prepared, before), "features() writes into its input")


@_contract.rule("stays frozen: no gradient, eval mode, the same result twice")
def _frozen(expert: Expert) -> None:
    expert.train().requires_grad_(True)
    require(not expert.network.training, "train() reaches the network")
    pixels = _pixels(expert)
    features = expert(pixels)
    require(not features.requires_grad, "features with a gradient")
    require(not any(parameter.requires_grad for parameter in expert.network.parameters()), "a parameter is trainable")
    require_close(expert(pixels), features, "a second call", 0.0)


@_contract.rule("runs in bfloat16")
def _bfloat16(expert: Expert) -> None:
    features = expert.to(torch.bfloat16)(_pixels(expert))
    require(features.dtype == torch.bfloat16, f"features in {features.dtype}")
    require(bool(features.isfinite().all()), "features that are not finite")


@_contract.rule("saved by value and read back, gives the same features (self-contained checkpoints, exports)")
def _saved(expert: Expert) -> None:
    pixels = _pixels(expert)
    with tempfile.TemporaryDirectory() as folder:
        hub = ExpertHub([expert.spec])
        hub.load()
        try:
            specs = hub.save(Path(folder))
        except CheckpointError as error:
            raise AssertionError(f"{error} (write save_backbone)") from error
        again = ExpertHub(specs, base_dir=folder)
        again.load()
        require_close(again.run(pixels).features[expert.name], expert(pixels), "after saving")


@_contract.rule("refuses an option that it does not know")
def _options(expert: Expert) -> None:
    try:
        build_expert(expert.spec.replace(options={"no_such_option": 1}))
    except ConfigError:
        return
    raise AssertionError("takes the option 'no_such_option'; list the options in option_names")


@_contract.rule("can go along in a remote-code export: its file imports this package by 'from tove_llava...'")
def _export(expert: Expert) -> None:
    module = type(expert).__module__
    if getattr(sys.modules.get(module), "__spec__", None) is None:
        raise Skip  # a notebook's cell has no file
    flatten_modules([module])
