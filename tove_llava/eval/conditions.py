"""Changes of the model or its input: columns of an ablation table."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tove_llava.core.errors import ConfigError

ALL = "all"
CLIP = "clip"


@dataclass(frozen=True)
class Condition:
    """One way of running the model.

    Attributes:
        name: a folder's name.
        title: the column's heading.
        blank_image: replace every image by the mean colour (zeros after normalisation).
        detach: experts to detach from the tower; ``("all",)`` for every one; ``clip`` zeroes CLIP's tokens, also for
            the gate.
    """

    name: str
    title: str
    blank_image: bool = False
    detach: tuple[str, ...] = ()

    def check(self, model: Any) -> None:
        """Raise ConfigError for a model without these experts."""
        with self.applied(model):
            pass

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Detach the experts for a ``with`` block.

        Raises:
            ConfigError: the model has no such expert, or no experts at all.
        """
        if not self.detach:
            yield
            return
        tower = model.base_model.vision_tower
        if not hasattr(tower, "detach_experts"):
            raise ConfigError("this model's vision tower has no experts to detach; leave out --detach")
        attached = list(tower.config.attached_experts)
        without_clip = CLIP in self.detach and CLIP not in tower.config.expert_names
        named = [name for name in self.detach if not (without_clip and name == CLIP)]
        names = attached if ALL in self.detach else named
        tower.detach_experts(names)
        hook = tower.fusion.register_forward_pre_hook(_zero_clip) if without_clip else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()
            tower.attach_experts([name for name in names if name in attached])


def _zero_clip(fusion: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    base, *others = inputs
    return (base.new_zeros(base.shape), *others)


BLANK = Condition("blank", "image blanked", blank_image=True)
DETACHED = Condition("detached", "experts detached", detach=(ALL,))
FULL = Condition("full", "ToVE")
CONDITIONS = {condition.name: condition for condition in (BLANK, DETACHED, FULL)}


def parse_conditions(names: str | None, blank_image: bool = False, detach: str | None = None) -> Sequence[Condition]:
    """Read conditions: comma-separated names, or flags that make one condition.

    Raises:
        ConfigError: an unknown name, or both forms at once.
    """
    if names is not None:
        if blank_image or detach:
            raise ConfigError("--conditions cannot be combined with --blank-image or --detach; give one or the other")
        chosen = [name.strip() for name in names.split(",") if name.strip()]
        unknown = [name for name in chosen if name not in CONDITIONS]
        if unknown or not chosen:
            raise ConfigError(f"unknown condition {(unknown or [''])[0]!r}. Available: {', '.join(CONDITIONS)}")
        return [CONDITIONS[name] for name in chosen]
    if not blank_image and not detach:
        return [FULL]
    experts = tuple(sorted({name.strip() for name in (detach or "").split(",") if name.strip()}))
    if ALL in experts:
        experts = (ALL, *(name for name in experts if name == CLIP))
    parts = (["blank"] if blank_image else []) + ([f"without-{'-'.join(experts)}"] if experts else [])
    titles = (["image blanked"] if blank_image else []) + ([f"without {', '.join(experts)}"] if experts else [])
    return [Condition("+".join(parts), ", ".join(titles), blank_image, experts)]
