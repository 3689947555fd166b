"""The vision tower, a transformers model: frozen backbones and a trainable fusion."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlavaImageProcessorPil, PreTrainedModel

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.licences import known, licence_of, write_origin
from tove_llava.core.sources import Source
from tove_llava.tower.balance_loss import BalanceStatistics, balance_loss
from tove_llava.tower.frozen import FrozenBackbones, TowerFeatures
from tove_llava.tower.fusion import Fusion, GateInputs
from tove_llava.tower.pixels import image_processor, pixels_of
from tove_llava.tower.tower_config import FUSIONS, ToveVisionConfig
from tove_llava.tower.tower_output import ToveVisionOutput


class ToveVisionModel(PreTrainedModel):
    """Maps images to tokens that carry the experts' knowledge.

    CLIP-normalised [B,3,S,S] become [B,N,d]. ``fusion``, the only registered submodule, holds everything trainable and
    nothing else. ``frozen`` holds CLIP and the experts; until :meth:`load_backbones` the tower refuses to run.
    ``processor`` is the image processor.

    Args:
        config: CLIP, experts and fusion. :func:`tove_llava.load_tower` also loads the weights.

    Example:
        >>> tower = tove_llava.ToveVisionModel.from_pretrained(folder)
        >>> tower(pixel_values=tower.processor(image, return_tensors="pt")["pixel_values"]).last_hidden_state.shape
        torch.Size([1, 36, 192])
    """

    config: ToveVisionConfig
    config_class = ToveVisionConfig
    base_model_prefix = "tove_vision"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ToveVisionModel"]  # CLIP and the experts run on the device of the tower's own parts
    # These tell about CLIP; the fusion has no attention.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The module that knows other folders than the tower's own. A name, not an import, as in llava/modeling.py.
    folders: ClassVar[str | None] = None

    def __init__(self, config: ToveVisionConfig) -> None:
        super().__init__(config)
        self.fusion: Fusion = FUSIONS.get(config.fusion)(config)
        # Follows moves and casts even if the fusion has no parameters: backbones that are loaded later need it.
        self.register_buffer("_placement", torch.zeros(0), persistent=False)
        self.frozen = FrozenBackbones(config)
        self.processor: LlavaImageProcessorPil = image_processor(config)
        self.post_init()

    @property
    def device(self) -> torch.device:
        return self._placement.device

    @property
    def dtype(self) -> torch.dtype:
        return self._placement.dtype

    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ToveVisionModel:
        super()._apply(fn, recurse)
        self.frozen.apply(fn)
        return self

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Set the attention implementation, for CLIP and experts from the next image."""
        with clip_follows(self.config, attn_implementation):
            super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        load_backbones: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load the tower of a folder or repository: its trainable part, then CLIP and the experts.

        It opens a folder that :meth:`save_pretrained` wrote, every kind of checkpoint that training writes, and a
        LLaVA-1.5 of another format, whose tower is only CLIP. No language model is loaded.

        Args:
            load_backbones: False leaves them out; the tower then refuses to run until :meth:`load_backbones`.
            kwargs: those of transformers' ``from_pretrained``.

        Raises:
            CheckpointError: the folder holds no tower, is damaged, or names a source that is not there.
        """
        own = super().from_pretrained

        def read(place: Any, **options: Any) -> Any:
            return own(place, *args, **options)

        if cls.folders is not None:
            folders = importlib.import_module(cls.folders)
            return folders.open_tower(read, pretrained_model_name_or_path, kwargs, load_backbones)
        loaded = read(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True returns a pair
        if load_backbones:
            model.load_backbones(base_dir=local_folder(pretrained_model_name_or_path))
        return loaded

    @classmethod
    def from_preset(cls, preset: Any, **options: Any) -> ToveVisionModel:
        """Build a preset's tower, untrained; see :func:`tove_llava.checkpoints.tower_loading.build_tower`."""
        if cls.folders is None:
            raise ConfigError("presets come with the package tove_llava; install it, or load a folder")
        return importlib.import_module(cls.folders).build_tower(preset, **options)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, self_contained: bool = False, **kwargs: Any
    ) -> None:
        """Save the trainable part, configuration and image processor; see :meth:`save_parts` for the backbones."""
        own, state = self.config, dict(kwargs.pop("state_dict", None) or self.state_dict())
        self.config, state = self.save_parts(save_directory, state, "", self_contained)
        try:
            super().save_pretrained(save_directory, state_dict=state, **kwargs)
            self.processor.save_pretrained(save_directory)
        finally:
            self.config = own

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload the tower, which names its backbones by their sources."""
        if not self.config.is_portable:
            raise CheckpointError(
                "the tower's backbones are folders of this machine, which others lack. Push its LLaVA, which includes "
                "them, or upload a folder written by save_pretrained(self_contained=True)"
            )
        return super().push_to_hub(repo_id, **kwargs)

    # -- backbones ----------------------------------------------------------------------------------------------------

    @property
    def active_experts(self) -> list[str]:
        """List the experts that a forward pass runs."""
        return self.config.attached_experts if self.fusion.uses_experts else []

    @property
    def is_loaded(self) -> bool:
        """Tell if CLIP and every active expert are in memory."""
        return self.frozen.is_loaded(self.active_experts)

    def load_backbones(
        self, names: Iterable[str] | None = None, *, base_dir: str | os.PathLike[str] | None = None
    ) -> ToveVisionModel:
        """Load CLIP and experts to this module's device and dtype.

        Args:
            names: experts to load; all active ones by default. Loaded ones stay as they are.
            base_dir: checkpoint folder of sources such as ``hf:./backbones/clip``.

        Raises:
            CheckpointError: weights are missing, incomplete or of another model.
            ConfigError: a source or an expert's name is wrong.
        """
        names = self.active_experts if names is None else list(names)
        self.config.check_expert_names(names)
        if self._placement.is_meta:
            raise CheckpointError("the tower is on the meta device; give it memory (from_pretrained or to_empty) first")
        self.frozen.load(names, base_dir=base_dir, device=self._placement.device, dtype=self._placement.dtype)
        return self

    def save_backbones(self, folder: str | os.PathLike[str]) -> ToveVisionConfig:
        """Write CLIP and every expert to ``folder/backbones/<name>``.

        Returns:
            A copy of the configuration whose sources point there, relative to ``folder``. The caller saves it.

        Raises:
            CheckpointError: an expert, attached or not, is not in memory or cannot be saved by value.
        """
        if self.frozen.clip is None or self.frozen.hub.names != self.config.expert_names:
            raise CheckpointError("the tower's backbones are not loaded; call load_backbones() before saving them")
        target = Path(folder) / "backbones"
        config = ToveVisionConfig.from_dict(self.config.to_dict())
        self.frozen.clip.save_pretrained(target / "clip")
        write_origin(target / "clip", self.config.clip_source, known(licence_of(self.config.clip_source)))
        config.clip_source, config.clip_revision = str(Source.parse("hf:./backbones/clip")), None
        config.experts = [spec.to_dict() for spec in self.frozen.hub.save(Path(folder), prefix="backbones/experts")]
        return config

    def save_parts(
        self, folder: str | os.PathLike[str], trained: Mapping[str, Tensor], prefix: str, self_contained: bool
    ) -> tuple[ToveVisionConfig, dict[str, Tensor]]:
        """Write the tower's part of a checkpoint, except its trained tensors.

        Args:
            trained: trained tensors of the whole model by name.
            prefix: start of this tower's names among them.
            self_contained: write the backbones. They are always written if they came with the checkpoint that this
                tower was loaded from: its configuration names them by paths inside a folder.

        Returns:
            The configuration and the tensors that the caller has to save.

        Raises:
            CheckpointError: backbones have to be written that are not in memory.
        """
        by_value = self_contained or self.config.lies_in_checkpoint
        return self.save_backbones(folder) if by_value else self.config, dict(trained)

    def blank_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Return ``forward``'s arguments for one blank image; no encoder runs."""
        config = self.config
        specs = [spec for spec in config.expert_specs if spec.name in self.active_experts]
        features = TowerFeatures(
            base=torch.zeros(1, config.num_patches, config.clip_width, device=device, dtype=dtype),
            experts={s.name: torch.zeros(1, s.width, *s.grid, device=device, dtype=dtype) for s in specs},
        )
        return {"vision_features": features}

    def detach_experts(self, names: str | Iterable[str], *, free: bool = False) -> None:
        """Take experts out; the gate renormalises over the rest.

        Args:
            names: one name or several, detached already or not.
            free: also free their memory; ``load_backbones`` restores them.
        """
        names = [names] if isinstance(names, str) else list(names)
        self.config.check_expert_names(names)
        detached = {*self.config.detached_experts, *names}
        self.config.detached_experts = [name for name in self.config.expert_names if name in detached]
        if free:
            self.frozen.unload(names)

    def attach_experts(self, names: str | Iterable[str]) -> None:
        """Undo :meth:`detach_experts`; CheckpointError if CLIP is loaded and an expert is not."""
        names = [names] if isinstance(names, str) else list(names)
        self.config.check_expert_names(names)
        if self.frozen.clip is not None and self.fusion.uses_experts and not self.frozen.is_loaded(names):
            raise CheckpointError(
                f"experts {names} are not in memory; call load_backbones({names}) before attaching them"
            )
        self.config.detached_experts = [name for name in self.config.detached_experts if name not in names]

    @property
    def execution(self) -> str:
        """Return the name of the execution; see :meth:`set_execution`."""
        return self.frozen.execution.name

    def set_execution(self, name: str) -> ToveVisionModel:
        """Choose how the encoders run; results are equal up to rounding.

        Args:
            name: ``"eager"``, one after another (default). ``"concurrent"``: on a GPU side by side, as a CUDA graph,
                with the gate's weighted sum as one kernel; on the CPU like eager. ``"compiled"``: like concurrent on a
                GPU, and in threads that share the cores on the CPU; ``torch.compile`` compiles each encoder at the
                first image.

        A graph or compiled encoder serves one batch size; the tower pads smaller batches. Both are made again after
        moves, casts and changes of weights through the tower's own methods. After writing into the frozen weights by
        hand call this again.

        Raises:
            ConfigError: an unknown name.
        """
        self.frozen.set_execution(name)
        self.fusion.fused = self.frozen.execution.mode.concurrent
        return self

    # -- forward ------------------------------------------------------------------------------------------------------

    def encode(self, pixel_values: Any) -> TowerFeatures:
        """Run CLIP and the active experts without autograd.

        Args:
            pixel_values: ``[B,3,S,S]`` CLIP-normalised, S the configuration's ``image_size``; or PIL images.

        Raises:
            CheckpointError: backbones are not loaded.
            ConfigError: the pixels are integers, or of another shape.
            NonFiniteError: in training mode, an expert returned NaN or infinity. In eval mode that expert is dropped
                for that image, with a warning.
        """
        if not self.is_loaded:
            raise CheckpointError(
                "the tower's CLIP and experts are not loaded. Load the model with tove_llava.load_model or "
                "ToveLlavaForConditionalGeneration.from_pretrained; within a stock LlavaForConditionalGeneration call "
                "model.model.vision_tower.load_backbones() once"
            )
        if not isinstance(pixel_values, Tensor):
            pixel_values = pixels_of(pixel_values, self.processor).to(self.device, self.dtype)
        return self.frozen.encode(pixel_values, self.active_experts, strict=self.training)

    def fuse(self, features: TowerFeatures, gate_noise: Tensor | None = None) -> ToveVisionOutput:
        """Run the trainable part.

        Args:
            features: output of :meth:`encode`, which may hold more experts than are attached.
            gate_noise: ``[B,N,S]`` standard normal noise of the gate instead of a fresh draw, e.g. this rank's share of
                a draw for the global batch. Used in training mode only.
        """
        missing = [name for name in self.active_experts if name not in features.experts]
        if missing:
            raise ConfigError(f"the features lack the attached expert(s) {missing}; encode the images again")
        fused = self.fusion(features.base, features.experts, noise=gate_noise, usable=features.usable)
        return ToveVisionOutput(
            last_hidden_state=fused.tokens,
            hidden_states=(fused.tokens,),
            routing=fused.routing,
            gate_logits=fused.gate_logits,
            gate_inputs=fused.gate_inputs if self.training else None,
        )

    def forward(
        self,
        pixel_values: Any = None,
        *,
        features: TowerFeatures | None = None,
        gate_noise: Tensor | None = None,
        output_experts: bool = False,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ToveVisionOutput:
        """Encode and fuse images.

        Args:
            pixel_values: ``[B,3,S,S]`` from :attr:`processor`; or one PIL image, or a list of them; or None when
                ``features`` are given.
            features: output of :meth:`encode`, instead of ``pixel_values``.
            gate_noise: see :meth:`fuse`.
            output_experts: also return each active expert's features and gate weights by name.
            output_hidden_states: a flag, or the layer or layers that LLaVA will index. There is one hidden state, so
                the index must be -1 (or 0).

        Raises:
            ConfigError: another layer is asked for; the pixels are integers or of another shape; or not exactly one of
                ``pixel_values`` and ``features`` is given.
        """
        layers = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states or []
        if any(layer not in (-1, 0) for layer in layers if not isinstance(layer, bool)):
            raise ConfigError(
                f"vision_feature_layer={output_hidden_states} does not exist in a ToVE tower, which returns one hidden "
                "state (the tower's clip_layer chooses CLIP's layer). Set vision_feature_layer=-1, "
                "vision_feature_select_strategy='full'."
            )
        if (pixel_values is None) == (features is None):
            raise ConfigError("give exactly one of pixel_values and features to the tower")
        features = self.encode(pixel_values) if features is None else features
        output = self.fuse(features, gate_noise)
        if output_experts:
            output.experts = {name: features.experts[name] for name in self.active_experts}
            if output.routing is not None:
                columns = {name: k for k, name in enumerate(self.config.expert_names) if name in output.experts}
                output.expert_weights = {name: output.routing[..., k] for name, k in columns.items()}
        return output if return_dict is not False else output.to_tuple()

    def balance_loss(self, batch: ToveVisionOutput | GateInputs | None) -> Tensor | None:
        """Compute the unweighted balance loss of one batch, a float32 scalar; None without a gate.

        Args:
            batch: the tower's output in training mode, or its ``gate_inputs``.

        For gradient accumulation or several ranks add statistics instead: :mod:`tove_llava.tower.balance_loss`.
        """
        inputs = batch.gate_inputs if isinstance(batch, ToveVisionOutput) else batch
        statistics: BalanceStatistics | None = self.fusion.balance_statistics(inputs)
        return None if statistics is None else balance_loss(statistics)


@contextmanager
def clip_follows(config: ToveVisionConfig, attn_implementation: str | dict[str, Any]) -> Iterator[None]:
    """Give CLIP's configuration an attention implementation before transformers sets it.

    Otherwise transformers would look for CLIP among the submodules, and warn that it finds none.
    """
    clip = config.clip_config
    before = clip._attn_implementation
    if isinstance(attn_implementation, str):
        clip._attn_implementation = attn_implementation
    try:
        yield
    except (ImportError, ValueError):  # refused
        clip._attn_implementation = before
        raise


def local_folder(name: str | os.PathLike[str] | None) -> str | None:
    """Return the argument of ``from_pretrained`` if it is a folder, else None."""
    return None if name is None or not os.path.isdir(name) else os.fspath(name)
