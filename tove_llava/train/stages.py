"""Choose the parameters that a stage trains, and their optimizer.

Parameters are chosen by the module they belong to, never by a fragment of their names.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tove_llava.core.errors import ConfigError
from tove_llava.core.registry import Registry
from tove_llava.llava import ToveLlavaForConditionalGeneration
from tove_llava.llava.adapters import adapter_parameters
from tove_llava.llava.quantization import loaded_bits, parameter_count
from tove_llava.presets import StagePreset
from tove_llava.train.merging import MergingTower

Policy = Callable[[ToveLlavaForConditionalGeneration, StagePreset], "Trainable"]
POLICIES: Registry[Policy] = Registry("freezing policy")
MERGE_OPTIMIZERS: Registry[Callable[[MergingTower], list[nn.Parameter]]] = Registry("merge optimizer")

PROJECTOR, TOWER, LANGUAGE, LORA, ENCODER = "projector", "tower", "language model", "lora", "encoder"


@dataclass
class Trainable:
    """Trainable parameters: part -> {name in the model: parameter}."""

    parts: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)

    def names(self) -> list[str]:
        return [name for part in self.parts.values() for name in part]

    def parameters(self) -> Iterator[nn.Parameter]:
        for part in self.parts.values():
            yield from part.values()

    def report(self, model: nn.Module) -> str:
        """List the parts that train, with their numbers of parameters."""
        counts = {part: sum(p.numel() for p in named.values()) for part, named in self.parts.items()}
        total = sum(parameter_count(p) for p in model.parameters())
        lines = [f"  {part:<15} {count:>14,} in {len(self.parts[part])} tensors" for part, count in counts.items()]
        trained = sum(counts.values())
        lines.append(f"  {'frozen':<15} {total - trained:>14,} (CLIP and the experts not counted)")
        return "trains\n" + "\n".join(lines)


def freeze(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Trainable:
    """Freeze all parameters but those that the stage's policy chooses.

    Raises:
        ConfigError: no such policy.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trainable = POLICIES.get(stage.train)(model, stage)
    for parameter in trainable.parameters():
        parameter.requires_grad_(True)
    return trainable


@POLICIES.register("alignment")
def alignment(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Trainable:
    """Train the projector and the tower's own parts (stage 1)."""
    modules = {PROJECTOR: [model.model.multi_modal_projector], TOWER: [model.model.vision_tower.fusion]}
    return _select(model, modules)


@POLICIES.register("full")
def full(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Trainable:
    """Train the parts of stage 1 and the whole language model."""
    trainable = alignment(model, stage)
    trainable.parts |= _language(model).parts
    return trainable


@POLICIES.register("lora")
def lora(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Trainable:
    """Train the parts of stage 1 and adapters of the language model."""
    if stage.lora is None:
        raise ConfigError("freezing policy 'lora' needs the stage's 'lora' settings: {r, alpha, dropout}")
    trainable = alignment(model, stage)
    trainable.parts |= _adapters(model, stage).parts
    return trainable


@POLICIES.register("merge")
def merge(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Trainable:
    """Train a copy of CLIP, the projector, and the language model.

    With the stage's ``lora`` settings the language model trains through adapters: its own, or new ones.
    """
    if stage.merge is None:
        raise ConfigError("freezing policy 'merge' needs the stage's 'merge' settings: {loss, coefficient, ...}")
    tower = MergingTower(model.tower, stage.merge)
    model.model.vision_tower = tower
    model.config.vision_config = tower.config
    learning = {id(p) for p in tower.learning()}
    encoder = {name: p for name, p in model.named_parameters() if id(p) in learning}
    trainable = Trainable({ENCODER: encoder} | _select(model, {PROJECTOR: [model.model.multi_modal_projector]}).parts)
    if stage.lora is not None:
        trainable.parts |= _adapters(model, stage).parts
    else:
        trainable.parts |= _language(model).parts
    return trainable


def _language(model: ToveLlavaForConditionalGeneration) -> Trainable:
    if loaded_bits(model) != 16:
        raise ConfigError(
            f"this stage trains the language model's own weights, which cannot be in {loaded_bits(model)} bits; give "
            "--bits 16, or train adapters on top (--stage finetune_qlora)"
        )
    return _select(model, {LANGUAGE: [model.model.language_model, model.lm_head]})


def _adapters(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Trainable:
    """Select the language model's adapters; make them if it has none."""
    assert stage.lora is not None
    config = (getattr(model, "peft_config", None) or {}).get("default")
    if config is None:
        config = lora_config(model, stage)
        add_lora(model, config)
    adapters = {id(p) for p in adapter_parameters(model.model.language_model, config.bias)}
    return Trainable({LORA: {name: p for name, p in model.named_parameters() if id(p) in adapters}})


def lora_config(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Any:
    """Return a peft configuration that matches only the language model's layers."""
    from peft import LoraConfig

    assert stage.lora is not None
    language = model.model.language_model
    path = next(name for name, module in model.named_modules() if module is language)
    linear = sorted({name.rpartition(".")[2] for name, m in language.named_modules() if isinstance(m, nn.Linear)})
    escaped = path.replace(".", r"\.")
    return LoraConfig(
        r=stage.lora.r,
        lora_alpha=stage.lora.alpha,
        lora_dropout=stage.lora.dropout,
        bias=stage.lora.bias,
        target_modules=rf"{escaped}\.(?:.*\.)?(?:{'|'.join(linear)})",
        task_type="CAUSAL_LM",
    )


def add_lora(model: ToveLlavaForConditionalGeneration, config: Any) -> None:
    """Put adapters into the model; its class and module paths stay."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)


def _select(model: nn.Module, modules: dict[str, list[nn.Module]]) -> Trainable:
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for part, members in modules.items():
        ids = {id(p) for member in members for p in member.parameters()}
        named = {name: p for name, p in model.named_parameters() if id(p) in ids}
        if named:
            parts[part] = named
    return Trainable(parts)


def parameter_groups(
    trainable: Trainable,
    *,
    learning_rate: float,
    weight_decay: float,
    projector_learning_rate: float | None = None,
    tower_learning_rate: float | None = None,
    encoder_learning_rate: float | None = None,
    muon: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Group parameters by learning rate and decay, as LLaVA-1.5 does.

    Matrices decay; biases and the weights of normalisation layers do not. Groups of parameters in ``muon`` have
    ``muon: True`` (:func:`make_optimizer`).
    """
    orthogonal = {id(p) for p in muon}
    own_rates = {PROJECTOR: projector_learning_rate, TOWER: tower_learning_rate, ENCODER: encoder_learning_rate}
    groups: dict[tuple[str, bool, bool], dict[str, Any]] = {}
    for part, named in trainable.parts.items():
        own = own_rates.get(part)
        for name, parameter in named.items():
            decays = parameter.ndim > 1 and name.rpartition(".")[2] != "bias"
            by_muon = id(parameter) in orthogonal
            key = (part if own is not None else "", decays, by_muon)
            if key not in groups:
                rate = learning_rate if own is None else own
                groups[key] = {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr": rate}
                groups[key] |= {"muon": True} if by_muon else {}
            groups[key]["params"].append(parameter)
    return list(groups.values())


@MERGE_OPTIMIZERS.register("adamw")
def adamw(tower: MergingTower) -> list[nn.Parameter]:
    """Leave no parameter to Muon."""
    return []


@MERGE_OPTIMIZERS.register("muon")
def muon(tower: MergingTower) -> list[nn.Parameter]:
    """Give Muon the student's matrices; embeddings, norms and biases stay with AdamW."""
    return tower.matrices()


def make_optimizer(
    groups: list[dict[str, Any]], cls: type[torch.optim.Optimizer], options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Make the optimizer of a stage.

    Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal before the step. Its steps are scaled to AdamW's
    size (Liu et al. 2025, arXiv 2502.16982), so both take the same learning rates.

    Args:
        groups: from :func:`parameter_groups`.
        cls: optimizer of a stage that has no group for Muon. In one that has, the other groups get AdamW.
        options: of ``cls``.
    """
    if not any(group.get("muon") for group in groups):
        return cls(groups, **options)
    from timm.optim import Muon

    return Muon(
        [{**group, "use_fallback": not group.get("muon", False)} for group in groups],
        lr=options["lr"],
        betas=options.get("betas", (0.9, 0.999)),
        eps=options.get("eps", 1e-8),
        weight_decay=0.0,  # every group has its own
        adjust_lr_fn="match_rms_adamw",
    )
