"""All experts of a tower, built and run in order, frozen."""

import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tove_llava.core.errors import ConfigError, NonFiniteError
from tove_llava.core.licences import known, write_origin
from tove_llava.experts.base import Expert
from tove_llava.experts.from_spec import build_expert, check_names
from tove_llava.experts.spec import ExpertSpec


@dataclass
class HubOutput:
    """Output of the experts.

    Attributes:
        features: name -> [B,d_k,h_k,w_k], every value finite.
        valid: name -> [B] bool, False where an expert's output was not finite and has been zeroed: the gate has to mask
            that expert for that image.
    """

    features: dict[str, Tensor]
    valid: dict[str, Tensor]


class ExpertHub(nn.Module):
    """Runs the experts of a list of specs.

    Args:
        specs: ExpertSpecs or their dicts; recorded width and grid are trusted until the weights are loaded.
        base_dir: checkpoint folder of relative sources (``hf:./experts/depth``).

    Raises:
        ConfigError: an entry is wrong or two experts share a name.
    """

    def __init__(
        self, specs: Iterable[ExpertSpec | dict[str, Any]], base_dir: str | PathLike[str] | None = None
    ) -> None:
        super().__init__()
        parsed = [ExpertSpec.from_dict(spec) for spec in specs]
        check_names(parsed)
        self.experts = nn.ModuleDict({spec.name: build_expert(spec, base_dir) for spec in parsed})
        self._defers = False
        self._deferred: list[tuple[dict[str, Tensor], dict[str, torch.dtype]]] = []

    @property
    def names(self) -> list[str]:
        return list(self.experts)

    def __getitem__(self, name: str) -> Expert:
        if name not in self.experts:
            raise ConfigError(f"the tower has no expert {name!r}; it has: {', '.join(self.names) or 'none'}")
        expert = self.experts[name]
        assert isinstance(expert, Expert)
        return expert

    def _all(self, names: Iterable[str] | None = None) -> list[Expert]:
        return [self[name] for name in (self.names if names is None else names)]

    def is_loaded(self, names: Iterable[str] | None = None) -> bool:
        wanted = self.names if names is None else names
        return all(name in self.experts and self[name].is_loaded for name in wanted)

    def load(self, names: Iterable[str] | None = None) -> None:
        """Load weights of the named experts, or all, that are not loaded."""
        for expert in self._all(names):
            expert.load()

    def set_attention(self, implementation: str) -> None:
        """Set the attention implementation of loaded experts that know it."""
        for expert in self._all():
            if expert.is_loaded:
                expert.set_attention(implementation)

    def unload(self, names: Iterable[str] | None = None) -> None:
        """Free the weights of the named experts, or of all."""
        for expert in self._all(names):
            expert.unload()

    def run(self, pixels: Tensor, skip: Collection[str] = (), strict: bool = False) -> HubOutput:
        """Run every expert but those in ``skip``, in order.

        Args:
            pixels: [B,3,H,W] in 0..1.
            skip: detached experts, which are absent from the result.
            strict: raise on a non-finite output (training) instead of dropping the expert for that image (inference).

        Raises:
            NonFiniteError: ``strict``, and an expert returned NaN or infinity.
            CheckpointError: an expert that has to run is not loaded.
        """
        for name in skip:
            self[name]  # refuses a misspelt name
        names = [name for name in self.names if name not in skip]
        prepared = self.condition(pixels, names)
        return self.check({name: self[name](pixels, prepared=prepared[name]) for name in names}, strict)

    def condition(self, pixels: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Prepare pixels [B,3,H,W] in 0..1 for each expert, sharing equal results."""
        shared: dict[tuple[Any, ...], Tensor] = {}
        return {name: self[name].condition(pixels, shared) for name in names}

    def check(self, features: dict[str, Tensor], strict: bool = False) -> HubOutput:
        """Handle non-finite values as :meth:`run` says; wait for the device once, or in :meth:`check_deferred`."""
        valid = {}
        for name, x in features.items():
            low, high = x.flatten(1).aminmax(dim=1)  # NaN becomes both
            valid[name] = low.isfinite() & high.isfinite()  # [B]
        if torch.compiler.is_compiling():  # a graph cannot branch on values: it drops silently, in training too
            return HubOutput({name: _without(x, valid[name]) for name, x in features.items()}, valid)
        if strict and self._defers:
            self._deferred.append((valid, {name: x.dtype for name, x in features.items()}))
        elif valid and not bool(torch.stack(list(valid.values())).all()):
            bad = {name: images for name, ok in valid.items() if (images := _failed(ok))}
            if strict:
                raise _error(*next(iter(bad.items())), features[next(iter(bad))].dtype)
            for name, images in bad.items():
                what = f"{_failure(name, images)}; it is left out for these images"
                warnings.warn(what, RuntimeWarning, stacklevel=2)
            features = {name: _without(x, valid[name]) if name in bad else x for name, x in features.items()}
        return HubOutput(features, valid)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Leave strict checks in a ``with`` block to :meth:`check_deferred`: it waits for the device once for all."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = False

    def check_deferred(self) -> None:
        """Raise NonFiniteError for what :meth:`check` deferred; wait for the device once."""
        deferred, self._deferred = self._deferred, []
        flags = [ok.all() for valid, _ in deferred for ok in valid.values()]
        if flags and not bool(torch.stack(flags).all()):
            for valid, dtypes in deferred:
                for name, ok in valid.items():
                    if images := _failed(ok):
                        raise _error(name, images, dtypes[name])

    def save(self, folder: str | Path, prefix: str = "experts") -> list[ExpertSpec]:
        """Write each expert to ``folder/prefix/<name>``; return specs whose sources point there (``./...``)."""
        folder, specs = Path(folder), []
        for expert in self._all():
            target = folder / prefix / expert.name
            if target.exists():
                shutil.rmtree(target)  # two experts' files must not mix
            source = expert.save(target)
            licence = None if expert.is_random else known(expert.licence())
            write_origin(target, expert.spec.source, licence)
            path = source.require().relative_to(folder.absolute() if source.require().is_absolute() else folder)
            specs.append(expert.spec.replace(source=str(source.at(f"./{path.as_posix()}")), revision=None))
        return specs


def _failed(ok: Tensor) -> list[int]:
    return [index for index, fine in enumerate(ok.tolist()) if not fine]


def _failure(name: str, images: list[int]) -> str:
    return f"expert {name!r} returned non-finite values for image(s) {images} of the batch"


def _error(name: str, images: list[int], dtype: torch.dtype) -> NonFiniteError:
    return NonFiniteError(
        f"{_failure(name, images)}; check that image and the expert's dtype ({dtype}; fp16 overflows where bf16 does "
        "not), or detach the expert"
    )


def _without(x: Tensor, ok: Tensor) -> Tensor:
    """Zero the images [B] that are not ok."""
    return torch.where(ok.view(-1, 1, 1, 1), x, torch.zeros((), dtype=x.dtype, device=x.device))
