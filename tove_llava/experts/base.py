"""The contract of an expert, from image to feature map.

An expert owns its source, input size and normalisation. A new one is one file: a subclass of :class:`Expert` (or of a
library's base, such as ``TimmExpert``) under ``@register_expert``. The base resizes, normalises, freezes and checks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.finite import check_finite
from tove_llava.core.hub_access import asking
from tove_llava.core.licences import NOT_STATED
from tove_llava.core.plugins import defining_file
from tove_llava.core.registry import Registry
from tove_llava.core.safe_loading import loading
from tove_llava.core.sources import Source
from tove_llava.experts.preparation import normalise, resize
from tove_llava.experts.random_weights import random_weights
from tove_llava.experts.spec import ExpertSpec

_INTERPOLATIONS = ("bilinear", "bicubic")
_shapes: dict[tuple[Any, ...], tuple[int, int, int]] = {}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# name -> {source scheme -> class}: several libraries may provide one expert
EXPERTS: Registry[dict[str, type["Expert"]]] = Registry("expert", "tove_llava.experts")
_families: dict[str, dict[str, type["Expert"]]] = {}

E = TypeVar("E", bound="type[Expert]")


def register_expert(name: str, *schemes: str) -> Callable[[E], E]:
    """Return a class decorator that registers an :class:`Expert` under ``name``.

    Args:
        name: what ``expert`` or ``name`` says in a preset's ``vision.experts``.
        schemes: kinds of source that the class reads, such as ``"hf"``; that of ``default_source`` by default.

    Raises:
        ConfigError: another class has the name and scheme.

    Example:
        >>> @tove_llava.register_expert("blur", "bundled")
        ... class Blur(tove_llava.Expert):
        ...     def build(self, pretrained):
        ...         return torch.nn.AvgPool2d(16)
        ...     def features(self, pixels):
        ...         return self.network(pixels)  # [B,3,96,96] -> [B,3,6,6]
        >>> experts = "vision.experts=[{name: blur, source: 'bundled:clip', image_size: 96}]"
        >>> tove_llava.load_tower("tiny", overrides=[experts])(image, output_experts=True).experts["blur"].shape
        torch.Size([1, 3, 6, 6])
    """

    def add(cls: E) -> E:
        EXPERTS.complete_before(cls)
        if name not in _families:
            _families[name] = EXPERTS.register(name)({})
        for scheme in schemes or (cls.default_source.partition(":")[0],):  # checked when the source is used
            other = _families[name].get(scheme, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                both = f"in {defining_file(other)} and in {defining_file(cls)}"
                raise ConfigError(f"expert {name!r} is registered twice for {scheme}: sources, {both}")
            _families[name][scheme] = cls
        return cls

    return add


class Expert(nn.Module, ABC):
    """A frozen, pre-trained network that turns an image into a feature map.

    Until :meth:`load` there are no weights, but ``spec.width`` and ``spec.grid`` are known, from the spec or from the
    source's configuration. Once loaded, the expert stays in eval mode, and runs without autograd (``no_grad``: the
    trainable parts' backward pass could not save tensors made in inference mode).

    Subclasses set the class attributes and write :meth:`build` and :meth:`features`, and :meth:`configure` if the
    source states the normalisation or the input size.

    Args:
        spec: name, source, mode and options.
        base_dir: folder that a relative source lies in.

    Raises:
        ConfigError: an option, mode or source that the class does not know. CheckpointError: no such weights.

    Example:
        >>> expert = tove_llava.experts.build_expert({"name": "edge", "source": "bundled:edge", "mode": "map"})
        >>> expert.load()
        >>> expert(torch.rand(2, 3, 64, 80)).shape  # any size, values in 0..1 -> [B,width,*grid]
        torch.Size([2, 1, 24, 24])
    """

    default_source: ClassVar[str] = ""
    default_image_size: ClassVar[int | None] = None  # of the default source; any other has its own size
    further_sources: ClassVar[tuple[str, ...]] = ()  # listed next to the default
    remark: ClassVar[str] = ""  # note to users under the table of experts
    option_names: ClassVar[tuple[str, ...]] = ()  # keys of spec.options that the class understands
    modes: ClassVar[tuple[str, ...]] = ("features",)
    convolutional: ClassVar[bool] = False  # only convolutions, so its memory layout matters

    configuration: str | None = None  # of the network, if configure() reads one; equal ones have equal shapes
    mean: tuple[float, ...] = IMAGENET_MEAN  # of RGB in 0..1
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"

    def __init__(self, spec: ExpertSpec, base_dir: str | PathLike[str] | None = None) -> None:
        super().__init__()
        if not spec.source:
            spec = spec.replace(source=self.default_source)
        written = Source.parse(spec.source).resolve(base_dir)
        self.source, self.is_random = written.architecture, written.is_random
        if spec.image_size is None and str(self.source) == self.default_source:
            spec = spec.replace(image_size=self.default_image_size)
        for key in spec.options:
            if key not in self.option_names:
                raise ConfigError(
                    f"expert {spec.name!r}: unknown option {key!r}. "
                    f"{spec.expert!r} knows: {', '.join(self.option_names) or 'none'}"
                )
        if spec.mode not in self.modes:
            raise ConfigError(f"expert {spec.name!r}: {spec.expert!r} has no mode {spec.mode!r}, only {self.modes}")
        self.spec = spec
        self.backbone: nn.Module | None = None
        self.dtype, self.device = torch.get_default_dtype(), torch.device("cpu")
        if not spec.is_complete:
            self.spec = self.describe()

    # -- what a subclass writes -------------------------------------------------------------------------------------

    def configure(self) -> int | None:
        """Read mean, std and interpolation; return the source's image size, if any."""
        return None

    @abstractmethod
    def build(self, pretrained: bool) -> nn.Module:
        """Build the network for ``self.image_size``, pretrained or empty (meta device)."""

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Map pixels [B,3,S,S], which other experts may share, to features [B,width,*grid]."""

    def hub_file(self) -> tuple[str, str] | None:
        """Return repository and file of hub weights; None for a local source."""
        return None

    def is_cached(self) -> bool:
        """Tell if the weights of a hub source are on this machine."""
        file = self.hub_file()
        return file is not None and isinstance(try_to_load_from_cache(*file, revision=self.spec.revision), str)

    def licence(self) -> str:
        """Return the licence of the weights, if their source states it."""
        return self.source.stated_licence() or NOT_STATED

    def set_attention(self, implementation: str) -> None:  # noqa: B027 - a network may have only one
        """Use an attention implementation of transformers, if the network knows it."""

    def save_backbone(self, folder: Path) -> Source:
        """Write the network to ``folder`` (safetensors); return the source to read."""
        raise CheckpointError(f"expert {self.name!r} cannot be saved by value; keep it by reference")

    # -- what callers use -------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def image_size(self) -> int:
        if self.spec.image_size is None:
            raise ConfigError(f"expert {self.name!r}: the source names no input size; set image_size")
        return self.spec.image_size

    @property
    def network(self) -> Any:
        """Return the loaded network; CheckpointError if there is none yet."""
        if self.backbone is None:
            raise CheckpointError(f"expert {self.name!r} has no weights yet; call load() (source: {self.source})")
        return self.backbone

    @property
    def is_loaded(self) -> bool:
        return self.backbone is not None

    def describe(self) -> ExpertSpec:
        """Fill in the spec's sizes from the source's configuration (meta device)."""
        self._read_configuration()
        width, rows, columns = self.output_shape()
        return self.spec.replace(width=width, grid=(rows, columns))

    def output_shape(self) -> tuple[int, int, int]:
        """Return (channels, rows, columns), computed once for each configuration."""
        spec, is_local = self.spec, self.source.path is not None
        key = (type(self), self.configuration, is_local, spec.revision, spec.image_size, spec.mode, repr(spec.options))
        if self.configuration is None or key not in _shapes:
            with torch.no_grad():
                out = self.meta_twin().features(torch.empty(1, 3, self.image_size, self.image_size, device="meta"))
            _, width, rows, columns = out.shape
            _shapes[key] = width, rows, columns
        return _shapes[key]

    def meta_twin(self) -> "Expert":
        """Copy the expert with an empty network on the meta device."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._modules = {}
        twin._read_configuration()
        with torch.device("meta"):
            twin.backbone = twin.build(pretrained=False).to("meta").eval().requires_grad_(False)
        return twin

    def load(self) -> None:
        """Build the network and load its weights, unless it is loaded.

        Raises:
            CheckpointError: the weights are missing, incomplete or not plain tensors.
            ConfigError: the source's shape is not the recorded one.
        """
        if self.is_loaded:
            return
        if self.source.path is not None:
            self.source.require()
        file = None if self.is_random else self.hub_file()
        with loading(f"expert {self.name!r}: the weights", self.source), asking(file[0] if file else None):
            actual = self.describe()  # of the source itself; a checkpoint may have recorded other sizes in the spec
            self._check_shape((actual.width, *actual.grid))
            with random_weights(self.spec.source) if self.is_random else nullcontext():
                backbone = self.build(pretrained=not self.is_random)
        left = [n for n, t in (*backbone.named_parameters(), *backbone.named_buffers()) if t.is_meta]
        if left:
            raise CheckpointError(f"expert {self.name!r}: {self.source} has no weights for {', '.join(left[:5])}")
        check_finite(backbone.named_parameters(), self.source.path or str(self.source))
        self.backbone = backbone.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)

    def unload(self) -> None:
        """Free the weights; :meth:`load` restores them."""
        self.backbone = None

    def forward(
        self, pixels: Tensor, *, prepared: Tensor | None = None, encode: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Map [B,3,H,W] in 0..1 to [B,width,*grid], without autograd.

        Args:
            pixels: any float dtype and size; the result has the expert's dtype.
            prepared: the output of :meth:`condition`, if it exists already.
            encode: another form of :meth:`features`, such as its compiled one.

        Raises:
            CheckpointError: the expert is not loaded.
        """
        self.network  # noqa: B018 - refuses to run without weights
        with torch.no_grad():
            out = (encode or self.features)(self.condition(pixels) if prepared is None else prepared)
        self._check_shape(tuple(out.shape[1:]))
        return out

    def condition(self, pixels: Tensor, shared: dict[tuple[Any, ...], Tensor] | None = None) -> Tensor:
        """Resize and normalise pixels: [B,3,H,W] in 0..1 -> [B,3,S,S].

        Args:
            shared: results of other experts for the same pixels. One resize then serves all experts of a size, and one
                normalisation those that also share its constants.
        """
        shared = {} if shared is None else shared
        resized = (self.image_size, self.interpolation)
        if resized not in shared:
            shared[resized] = resize(pixels, *resized)
        ready = (*resized, tuple(self.mean), tuple(self.std), self.dtype)
        if ready not in shared:
            shared[ready] = normalise(shared[resized], self.mean, self.std).to(self.dtype)
        return shared[ready]

    def save(self, folder: str | Path) -> Source:
        """Write the weights to ``folder``; return the source to read."""
        if not self.is_loaded:
            raise CheckpointError(f"expert {self.name!r} is not loaded; call load() before saving it by value")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return self.save_backbone(folder)

    def train(self, mode: bool = True) -> "Expert":
        """Stay in eval mode; batch statistics and dropout never change."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "Expert":
        """Stay frozen."""
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Expert":
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))  # a later load() goes there too
        self.dtype, self.device = probe.dtype, probe.device
        return self

    def _check_shape(self, actual: tuple[int, ...]) -> None:
        recorded = (self.spec.width, *self.spec.grid)
        if actual != recorded:
            raise ConfigError(
                f"expert {self.name!r}: {self.source} gives {actual} (channels, rows, columns) where {recorded} is "
                "recorded; the source is another model than the one this tower was built for"
            )

    def _read_configuration(self) -> None:
        own_size = self.configure()
        if self.interpolation not in _INTERPOLATIONS:
            raise ConfigError(
                f"expert {self.name!r}: the source wants {self.interpolation!r} resizing; experts know "
                f"{' and '.join(_INTERPOLATIONS)}: change it in the source's preprocessing configuration"
            )
        if self.spec.image_size is None and own_size is not None:
            self.spec = self.spec.replace(image_size=own_size)

    def option(self, key: str, default: Any = None) -> Any:
        """Return the value of one of ``option_names`` in the spec."""
        return self.spec.options.get(key, default)


def choose(index: Any, count: int, option: str) -> int:
    """Turn a list index, maybe negative, into 0..count-1; ConfigError outside."""
    if not isinstance(index, int) or not -count <= index < count:
        raise ConfigError(f"{option}={index!r} must be from {-count} to {count - 1}")
    return index % count


@contextmanager
def library(source: Source, distribution: str) -> Iterator[None]:
    """Guard an optional import; ConfigError says what to install."""
    try:
        with torch.device("cpu"):  # the network may be wanted on the meta device; the library's own constants are not
            yield
    except ImportError as error:
        raise ConfigError(f"source {source} needs {distribution} (pip install {distribution}): {error}") from error
