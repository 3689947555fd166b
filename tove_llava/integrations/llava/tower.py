"""The tower with everything that LLaVA's code asks of a vision tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.integrations.llava.names import TowerName
from tove_llava.integrations.llava.recorded_tower import RECORD, check_first_stage, recorded_config
from tove_llava.llava.processing import build_image_processor
from tove_llava.tower import GateInputs, ToveVisionConfig, ToveVisionModel, all_reduce_statistics, balance_loss

logger = logging.get_logger(__name__)

PART = "tove"  # attribute of the projector's first layer


class ToveVisionTower(nn.Module):
    """The vision tower that ``build_vision_tower`` returns.

    The trained parts are built at once, also under ``delay_load``; CLIP and the experts come with :meth:`load_model`.
    :meth:`join` makes the trained parts a part of LLaVA's projector. LLaVA then treats them as the projector: trains
    them in both stages with ``mm_projector_lr``, without LoRA, and saves and loads them in ``mm_projector.bin``,
    ``non_lora_trainables.bin`` and whole folders. This module holds no parameter, so freezing it freezes nothing.

    Args:
        vision_tower: ``tove:...``.
        args: LLaVA's ``ModelArguments``, or the configuration of a model that is being loaded.
        delay_load: leave CLIP and the experts out until :meth:`load_model`.

    Raises:
        ConfigError: a wrong name, or options of LLaVA's that contradict the tower.
        CheckpointError: a source or a folder that is not there, or is damaged.
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False) -> None:
        super().__init__()
        name = TowerName.parse(vision_tower)
        config = recorded_config(args) or name.config()
        _check_options(args, config)
        check_first_stage(getattr(args, "pretrain_mm_mlp_adapter", None), config)
        self.vision_tower_name = vision_tower
        self.select_layer = config.clip_layer
        self.select_feature = "patch"
        self.image_processor = build_image_processor(config)
        self.tower = ToveVisionModel(config)
        self._gate_inputs: GateInputs | None = None
        self._prefix = ""  # of the trained parts in the projector, once they have joined
        self._seen: set[str] = set()  # names that load_state_dict has brought for the projector and the trained parts
        if not delay_load:
            name.fill(self.tower)
            self.load_model()

    # -- what LLaVA asks ----------------------------------------------------------------------------------------------

    @property
    def is_loaded(self) -> bool:
        return self.tower.is_loaded

    def load_model(self, device_map: Any = None) -> None:
        """Load CLIP and the experts in float32, as LLaVA does, once.

        Args:
            device_map: a device, ``"auto"`` (the first GPU, if any), or a mapping with an entry for the whole model or
                its vision tower; by default the device of the trained parts.

        Raises:
            CheckpointError: weights are missing or of another model, or the stage-1 file lacks the trained parts.
        """
        if self.is_loaded:
            return
        self._check_seen()
        device = _device(device_map, self.tower.device)
        self.tower.frozen.load(self.tower.active_experts, base_dir=None, device=device, dtype=torch.float32)

    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Encode ``[B,3,S,S]``, or a list of ``[3,S,S]``, to ``[B,N,d]`` or ``[1,N,d]`` each.

        CLIP and the experts run in their own dtype without autograd, the trained parts in the images' dtype.
        """
        if isinstance(images, list):
            return list(self._tokens(torch.stack(images)).split(1))
        return self._tokens(images)

    @property
    def dummy_feature(self) -> torch.Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        clip = self.tower.frozen.clip
        return self.tower.dtype if clip is None else clip.dtype

    @property
    def device(self) -> torch.device:
        clip = self.tower.frozen.clip
        return self.tower.device if clip is None else clip.device

    @property
    def config(self) -> ToveVisionConfig:
        """Return a configuration with CLIP's ``image_size``, ``patch_size`` and ``hidden_size``."""
        return self.tower.config

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.grid

    @property
    def num_patches(self) -> int:
        """Return an image's tokens, for the server's limit on prompts."""
        return self.config.num_image_tokens

    # -- training -----------------------------------------------------------------------------------------------------

    def balance_loss(self) -> torch.Tensor | None:
        """Return the last training pass's balance loss times its coefficient, once.

        It covers the images of all ranks, so every rank has to call it, and is whole on each rank, for gradients that
        are averaged over ranks. None without a gate, or without such a pass.
        """
        inputs, self._gate_inputs = self._gate_inputs, None
        if inputs is None or not self.config.router_aux_loss_coef:
            return None
        statistics = self.tower.fusion.balance_statistics([inputs])
        if statistics is None:
            return None
        return self.config.router_aux_loss_coef * balance_loss(all_reduce_statistics(statistics))

    def join(self, projector: nn.Module, config: Any) -> None:
        """Add the trained parts to LLaVA's projector, and record the tower.

        The projector's first layer holds them, because an ``nn.Sequential`` would run them.
        """
        setattr(config, RECORD, self.config)
        if any(module is self.tower for module in projector.modules()):
            return
        tower = self.tower
        self._modules.pop("tower", None)
        self.__dict__["tower"] = tower  # a plain attribute: each parameter has one place in the model
        layer = next(module for module in projector.modules() if not isinstance(module, nn.Sequential))
        layer.add_module(PART, tower)
        self._prefix = next(name for name, module in projector.named_modules() if module is tower) + "."
        projector.register_load_state_dict_pre_hook(self._before_load)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ToveVisionTower:
        """Move CLIP and experts too; joined parts go with the projector."""
        super()._apply(fn, recurse)
        self.tower.frozen.apply(fn)
        return self

    def _tokens(self, images: torch.Tensor) -> torch.Tensor:
        if not self.is_loaded:
            raise CheckpointError(
                f"{self.vision_tower_name}: CLIP and the experts are not loaded; call load_model() of the vision tower"
            )
        features = self.tower.encode(images.to(device=self.device, dtype=self.dtype))
        # Weights that accelerate keeps elsewhere are on the meta device until they are used.
        device = self.device if self.tower.device.type == "meta" else self.tower.device
        output = self.tower.fuse(features.to(device, images.dtype))
        if self.tower.training and torch.is_grad_enabled():
            self._keep(output.gate_inputs, images)
        return output.last_hidden_state

    def _keep(self, inputs: GateInputs | None, images: torch.Tensor) -> None:
        """Keep a gate's inputs for the loss, without zeros for no image."""
        if self._gate_inputs is not None:
            logger.warning_once(
                "The balance loss of the tower's gate was not taken: nothing asked for it after a training pass. "
                "Call tove_llava.integrations.llava.register() before the model is built, or add "
                "model.get_vision_tower().balance_loss() to the loss after each forward pass."
            )
        if inputs is None:
            return
        real = images.flatten(1).any(dim=1).to(inputs.tokens.device)  # [B]
        self._gate_inputs = GateInputs(*(None if part is None else part[real] for part in inputs))

    # -- loading ------------------------------------------------------------------------------------------------------

    def _before_load(self, projector: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Note which tensors of the projector and the trained parts are loaded.

        ``mm_projector.load_state_dict(...)`` brings all at once; those of a whole model may come in several shards,
        followed by :meth:`load_model`.
        """
        self._seen |= {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        if not prefix:
            self._check_seen()

    def _check_seen(self) -> None:
        if not self._seen:
            return
        found = {name.removeprefix(self._prefix) for name in self._seen if name.startswith(self._prefix)}
        wrong = sorted(found ^ self.tower.state_dict().keys())
        self._seen.clear()
        if wrong:
            raise CheckpointError(
                f"what was loaded as LLaVA's projector (mm_projector.bin or non_lora_trainables.bin) does not hold the "
                f"trained parts of {self.vision_tower_name}: missing or unknown are {', '.join(wrong[:3])} and "
                f"{max(len(wrong) - 3, 0)} more. It was trained with another tower; train stage 1 with --vision_tower "
                f"{self.vision_tower_name}, or name the tower that it was trained with"
            )


def _check_options(args: Any, config: ToveVisionConfig) -> None:
    """Refuse options of LLaVA that a ToVE tower would have to ignore."""
    layer = getattr(args, "mm_vision_select_layer", config.clip_layer)
    layers = config.clip_config.num_hidden_layers + 1
    if layer % layers != config.clip_layer % layers:
        raise ConfigError(
            f"--mm_vision_select_layer {layer} is not the tower's clip_layer {config.clip_layer}; pass "
            f"--mm_vision_select_layer {config.clip_layer}, or set clip_layer in a preset of your own"
        )
    if getattr(args, "mm_vision_select_feature", "patch") != "patch":
        raise ConfigError("a ToVE tower returns only patch tokens; pass --mm_vision_select_feature patch")
    if getattr(args, "s2", False):
        raise ConfigError("S2 runs CLIP at several scales and cannot run a ToVE tower; leave s2 out")
    if getattr(args, "unfreeze_mm_vision_tower", False):
        raise ConfigError("CLIP and the experts of a ToVE tower are never trained; leave unfreeze_mm_vision_tower out")


def _device(device_map: Any, default: torch.device) -> torch.device:
    if isinstance(device_map, dict):
        found = [device_map[key] for key in ("", "vision_tower", "model.vision_tower") if key in device_map]
        if not found:
            raise ConfigError(f"device_map {device_map} does not name the vision tower; add 'model.vision_tower'")
        device_map = found[0]
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    device = default if device_map is None else torch.device(device_map)
    return torch.device("cpu") if device.type == "meta" else device
