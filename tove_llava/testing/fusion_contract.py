"""The contract of a fusion."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tove_llava.checkpoints.flatten import flatten_modules
from tove_llava.core.errors import ConfigError
from tove_llava.testing.contract import Contract, Skip, require, require_close
from tove_llava.tower.fusion import Fusion
from tove_llava.tower.tower_config import FUSIONS, ToveVisionConfig

# Three experts: tokens on CLIP's grid, tokens on a grid of their own, and a map.
_EXPERTS = (
    {"name": "first", "width": 6, "grid": [4, 4]},
    {"name": "second", "width": 5, "grid": [3, 3]},
    {"name": "third", "mode": "map", "width": 2, "grid": [16, 16]},
)
_NAMES = [str(entry["name"]) for entry in _EXPERTS]
_STATES: tuple[list[str], ...] = ([], ["second"], _NAMES)  # detached experts


@dataclass
class _Subject:
    """A fusion with random parameters, and inputs for it."""

    fusion: Fusion
    base: Tensor
    experts: dict[str, Tensor]

    @property
    def config(self) -> ToveVisionConfig:
        return self.fusion.config

    def tokens(self, **keys: Any) -> Tensor:
        return self.fusion(self.base, self.experts, **keys).tokens


_contract: Contract[_Subject] = Contract()


def check_fusion(name: str, options: dict[str, Any] | None = None) -> list[str]:
    """Check a registered fusion against its contract, without weights of any expert.

    Args:
        name: registered name.
        options: the ``fusion_options`` to check it with.

    Returns:
        the rules that hold.

    Raises:
        ContractError: rules are broken; each is named, with the fusion's file and line.
        ConfigError: no fusion has that name.

    Example:
        >>> from tove_llava.testing import check_fusion
        >>> check_fusion("tove")[0]
        "returns tokens [images, num_tokens, output_width] in the dtype of CLIP's"
    """
    cls = FUSIONS.get(name)
    return _contract.check(lambda: _subject(name, options), f"fusion {name!r}", cls)


def _subject(name: str, options: dict[str, Any] | None, **keys: Any) -> _Subject:
    clip = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ToveVisionConfig(
        clip_config=clip | {"intermediate_size": 8}, experts=list(_EXPERTS), fusion=name, fusion_options=options,
        projection_dim=6, **keys,
    )  # fmt: skip
    fusion = FUSIONS.get(name)(config).eval()
    with torch.no_grad():
        for parameter in fusion.parameters():  # so that no branch is closed
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    experts = {spec.name: torch.randn(3, spec.width, *spec.grid) for spec in config.expert_specs}
    return _Subject(fusion, torch.randn(3, config.num_patches, config.clip_width), experts)


@_contract.rule("returns tokens [images, num_tokens, output_width] in the dtype of CLIP's")
def _shapes(subject: _Subject) -> None:
    for detached in _STATES:
        subject.config.detached_experts = list(detached)
        tokens, config = subject.tokens(), subject.config
        expected = (3, config.num_image_tokens, config.hidden_size)
        require(tuple(tokens.shape) == expected, f"tokens {tuple(tokens.shape)}, and the class says {expected}")
        require(tokens.dtype == subject.base.dtype, f"tokens in {tokens.dtype}, CLIP's in {subject.base.dtype}")
        require(bool(tokens.isfinite().all()), "tokens that are not finite")


@_contract.rule("runs in bfloat16")
def _bfloat16(subject: _Subject) -> None:
    subject.fusion.to(torch.bfloat16)
    subject.base = subject.base.bfloat16()
    subject.experts = {name: value.bfloat16() for name, value in subject.experts.items()}
    require(subject.tokens().dtype == torch.bfloat16, "tokens that are not bfloat16")


@_contract.rule("gives an image the same tokens in a batch as by itself, and the same twice")
def _batch(subject: _Subject) -> None:
    tokens = subject.tokens()
    require_close(subject.tokens(), tokens, "a second call in eval mode", 0.0)
    for image in range(3):
        one = {name: value[image : image + 1] for name, value in subject.experts.items()}
        single = subject.fusion(subject.base[image : image + 1], one).tokens
        require_close(single[0], tokens[image], "an image by itself")


@_contract.rule("gives a detached expert no influence, and runs without its features")
def _detached(subject: _Subject) -> None:
    if not subject.fusion.uses_experts:
        raise Skip
    whole = subject.tokens()
    subject.config.detached_experts = ["second"]
    reduced = subject.tokens()
    require(reduced.shape != whole.shape or not torch.allclose(reduced, whole), "detaching an expert changes nothing")
    subject.experts["second"] = subject.experts["second"] * 100
    require_close(subject.tokens(), reduced, "other features of a detached expert", 0.0)
    del subject.experts["second"]
    require_close(subject.tokens(), reduced, "without the features of a detached expert", 0.0)


@_contract.rule("lets an unusable expert count for nothing in its image only")
def _unusable(subject: _Subject) -> None:
    if not subject.fusion.uses_experts:
        raise Skip
    usable = {"second": torch.tensor([True, False, True])}
    whole, tokens = subject.tokens(), subject.tokens(usable=usable)
    require_close(tokens[[0, 2]], whole[[0, 2]], "the other images")
    subject.experts["second"] = subject.experts["second"].clone()
    subject.experts["second"][1] = 1e4
    require_close(subject.tokens(usable=usable), tokens, "other features where the expert is unusable")
    everywhere = {name: torch.zeros(3, dtype=torch.bool) for name in subject.config.expert_names}
    require(bool(subject.tokens(usable=everywhere).isfinite().all()), "not finite without a usable expert")


@_contract.rule("gives every parameter a gradient in training, whatever is detached (DDP and ZeRO need it)")
def _gradients(subject: _Subject) -> None:
    subject.fusion.train()
    for detached in _STATES:
        subject.config.detached_experts = list(detached)
        subject.fusion.zero_grad()
        output = subject.fusion(subject.base, subject.experts)
        statistics = subject.fusion.balance_statistics(output.gate_inputs)
        loss = output.tokens.square().sum()
        if statistics is not None:
            loss = loss + statistics.importance.square().sum()
            loss = loss if statistics.load is None else loss + statistics.load.square().sum()
        if not any(True for _ in subject.fusion.parameters()):
            raise Skip
        loss.backward()
        without = [name for name, parameter in subject.fusion.named_parameters() if parameter.grad is None]
        require(not without, f"no gradient for {', '.join(without)} with {detached or 'nothing'} detached")


@_contract.rule("weighs experts with weights that add up to one at most, and none on a detached expert")
def _routing(subject: _Subject) -> None:
    routing = subject.fusion(subject.base, subject.experts).routing
    if routing is None:
        raise Skip
    slots = len(_NAMES) + subject.config.null_slot
    require(tuple(routing.shape) == (3, subject.config.num_patches, slots), f"routing {tuple(routing.shape)}")
    require(bool((routing >= 0).all()) and bool((routing.sum(-1) <= 1 + 1e-4).all()), "weights outside 0 to 1")
    subject.config.detached_experts = ["second"]
    routing = subject.fusion(subject.base, subject.experts).routing
    require(bool((routing[..., 1] == 0).all()), "a detached expert has weight")


@_contract.rule("gives balance statistics of no image through the same parameters, if it has a gate that is balanced")
def _balance(subject: _Subject) -> None:
    subject.fusion.train()
    output = subject.fusion(subject.base, subject.experts)
    if subject.fusion.balance_statistics(output.gate_inputs) is None:
        raise Skip
    require(output.gate_inputs is not None, "no gate_inputs in training, which the balance loss is computed from")
    empty = subject.fusion.balance_statistics(None)
    assert empty is not None
    require(float(empty.tokens) == 0, "statistics of no image count tokens")
    require_close(empty.importance, torch.zeros_like(empty.importance), "importance of no image")


@_contract.rule("splits what it adds into one part for each expert, if it has transfers")
def _transfers(subject: _Subject) -> None:
    parts = subject.fusion.transfers(subject.base, subject.experts)
    if not parts:
        raise Skip
    added, tokens = sum(parts.values(), torch.zeros_like(subject.base)), subject.tokens()
    sums = [torch.allclose(total, tokens, rtol=1e-4, atol=1e-4) for total in (subject.base + added, added)]
    require(any(sums), "the parts do not add up to the tokens, with CLIP's or without")


@_contract.rule("has a reset_parameters in each layer that owns parameters, so that a seed decides the start")
def _initial_values(subject: _Subject) -> None:
    for name, module in subject.fusion.named_modules():
        own = isinstance(module, nn.Module) and any(True for _ in module.parameters(recurse=False))
        require(not own or hasattr(module, "reset_parameters"), f"{name or type(module).__name__} has none")


@_contract.rule("restores its tokens from its state dict")
def _state(subject: _Subject) -> None:
    again = type(subject.fusion)(copy.deepcopy(subject.config)).eval()
    again.load_state_dict(subject.fusion.state_dict())
    require_close(again(subject.base, subject.experts).tokens, subject.tokens(), "after loading", 0.0)


@_contract.rule("refuses an unknown key of fusion_options")
def _options(subject: _Subject) -> None:
    try:
        _subject(subject.config.fusion, {**(subject.config.fusion_options or {}), "no_such_option": 1})
    except ConfigError:
        return
    raise AssertionError("takes the option 'no_such_option'; call super().__init__(config)")


@_contract.rule("can go along in a remote-code export: its file imports this package by 'from tove_llava...'")
def _export(subject: _Subject) -> None:
    module = type(subject.fusion).__module__
    if getattr(sys.modules.get(module), "__spec__", None) is None:
        raise Skip  # a notebook's cell has no file
    flatten_modules([module])
