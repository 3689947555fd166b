"""``register()``: rebind one function of LLaVA, and connect tower and model."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from tove_llava.core.errors import ConfigError
from tove_llava.experts import EXPERTS
from tove_llava.integrations.llava.balanced_loss import BalancedLoss
from tove_llava.integrations.llava.names import is_ours
from tove_llava.integrations.llava.tower import ToveVisionTower

# Where build_vision_tower is defined, and where it is imported.
_BUILDER, _ARCH = "llava.model.multimodal_encoder.builder", "llava.model.llava_arch"


def register() -> None:
    """Make LLaVA's ``build_vision_tower`` build ``tove:...``; other names go to the original function.

    Call it before a model is built. A second call does nothing.

    LLaVA gives a vision tower no access to its model. So a hook of torch reports when LLaVA sets ``mm_projector``
    (which the trained parts join), and when it sets the model inside its ``...ForCausalLM`` (whose loss function gets
    the balance loss).

    Raises:
        ConfigError: the package ``llava`` cannot be imported, or is not haotian-liu/LLaVA.
    """
    builder, arch = _load(_BUILDER), _load(_ARCH)
    EXPERTS.names()  # imports the experts' libraries: once ZeRO-3 has built a model, kornia cannot be imported any more
    if isinstance(builder.build_vision_tower, _BuildVisionTower):
        return
    builder.build_vision_tower = arch.build_vision_tower = _BuildVisionTower(builder.build_vision_tower)
    register_module_module_registration_hook(functools.partial(_meet, arch))


class _BuildVisionTower:
    def __init__(self, original: Callable[..., nn.Module]) -> None:
        self.original = original
        functools.update_wrapper(self, original)

    def __call__(self, vision_tower_cfg: Any, **kwargs: Any) -> nn.Module:
        name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        if name is None or not is_ours(name):
            return self.original(vision_tower_cfg, **kwargs)
        with torch.random.fork_rng(devices=[]):  # the projector, built next, starts from the values it has with CLIP
            return ToveVisionTower(name, vision_tower_cfg, **kwargs)


def _meet(arch: Any, module: nn.Module, name: str, submodule: nn.Module) -> None:
    if name == "mm_projector":
        tower = getattr(module, "vision_tower", None)
        if isinstance(tower, list) and isinstance(tower[0], ToveVisionTower):
            raise ConfigError("a ToVE tower cannot be trained under FSDP by LLaVA's code; use DeepSpeed instead")
        if isinstance(tower, ToveVisionTower):
            tower.join(submodule, module.config)
    elif isinstance(submodule, arch.LlavaMetaModel) and isinstance(module, arch.LlavaMetaForCausalLM):
        module.loss_function = BalancedLoss(module.loss_function, submodule)


def _load(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} cannot be imported ({error}): put the folder of haotian-liu/LLaVA on PYTHONPATH, and install what "
            "it needs"
        ) from error
    if not hasattr(module, "build_vision_tower"):
        raise ConfigError(f"{name} has no build_vision_tower: the package llava is not haotian-liu/LLaVA's")
    return module
