"""What a stage trains: registered freezing policies that report themselves.

Parameters are chosen by the module they belong to, never by a fragment of their names.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tove_llava.core.errors import ConfigError
from tove_llava.core.registry import Registry
from tove_llava.llava import ToveLlavaForConditionalGeneration
from tove_llava.llava.adapters import adapter_parameters
from tove_llava.llava.quantization import loaded_bits, parameter_count
from tove_llava.presets import StagePreset

Policy = Callable[[ToveLlavaForConditionalGeneration, StagePreset], "Trainable"]
POLICIES: Registry[Policy] = Registry("freezing policy")

PROJECTOR, TOWER, LANGUAGE, LORA, ENCODER = "projector", "tower", "language model", "lora", "encoder"


@dataclass
class Trainable:
    """The trainable parameters of a stage, by part: part -> {name in the model: parameter}."""

    parts: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)

    def names(self) -> list[str]:
        return [name for part in self.parts.values() for name in part]

    def parameters(self) -> Iterator[nn.Parameter]:
        for part in self.parts.values():
            yield from part.values()

    def report(self, model: nn.Module) -> str:
        """A few lines that say what trains and how many parameters that is."""
        counts = {part: sum(p.numel() for p in named.values()) for part, named in self.parts.items()}
        total = sum(parameter_count(p) for p in model.parameters())
        lines = [f"  {part:<15} {count:>14,} in {len(self.parts[part])} tensors" for part, count in counts.items()]
        trained = sum(counts.values())
        lines.append(f"  {'frozen':<15} {total - trained:>14,} (CLIP and the experts not counted)")
        return "trains\n" + "\n".join(lines)


def freeze(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Trainable:
    """Applies a stage's policy: what it names trains, all else is frozen.

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
    """Stage 1: the projector and the tower's own parts."""
    modules = {PROJECTOR: [model.model.multi_modal_projector], TOWER: [model.model.vision_tower.fusion]}
    return _select(model, modules)


@POLICIES.register("full")
def full(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Trainable:
    """Stage 2: as stage 1, and the whole language model with its embeddings and head."""
    trainable = alignment(model, stage)
    trainable.parts |= _language(model).parts
    return trainable


@POLICIES.register("lora")
def lora(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Trainable:
    """Stage 2: as stage 1, and low-rank adapters on every linear layer of the language model but its head."""
    if stage.lora is None:
        raise ConfigError("freezing policy 'lora' needs the stage's 'lora' settings: {r, alpha, dropout}")
    trainable = alignment(model, stage)
    trainable.parts |= _adapters(model, stage).parts
    return trainable


@POLICIES.register("merge")
def merge(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Trainable:
    """A copy of CLIP learns the tower's tokens (:mod:`tove_llava.train.merging`), with projector and language model.

    The language model's adapters are continued where the model has some, else made by the stage's ``lora`` settings; a
    stage without these trains the whole language model.
    """
    from tove_llava.train.merging import MergingTower

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
    """The language model's own weights.

    Raises:
        ConfigError: they are quantised.
    """
    if loaded_bits(model) != 16:
        raise ConfigError(
            f"this stage trains the language model's own weights, which cannot be in {loaded_bits(model)} bits; give "
            "--bits 16, or train adapters beside them (--stage finetune_qlora)"
        )
    return _select(model, {LANGUAGE: [model.model.language_model, model.lm_head]})


def _adapters(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Trainable:
    """The language model's adapters: those that it has, or new ones."""
    assert stage.lora is not None
    config = (getattr(model, "peft_config", None) or {}).get("default")
    if config is None:
        config = lora_config(model, stage)
        add_lora(model, config)
    adapters = {id(p) for p in adapter_parameters(model.model.language_model, config.bias)}
    return Trainable({LORA: {name: p for name, p in model.named_parameters() if id(p) in adapters}})


def lora_config(model: ToveLlavaForConditionalGeneration, stage: StagePreset) -> Any:
    """The peft configuration of a stage. The pattern names the language model's path, so no tower layer can match."""
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
    """Puts adapters into the model in place; its class and its module paths stay what they are."""
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
    """Optimiser groups by learning rate and decay, as LLaVA-1.5 makes them.

    Matrices decay; biases and the one-dimensional weights of normalisation layers do not. A part without a rate of its
    own shares the groups of the stage's rate. Parameters in ``muon`` are in groups with ``muon: True``
    (:mod:`tove_llava.train.optimizer`).
    """
    orthogonal = {id(p) for p in muon}
    own_rates = {PROJECTOR: projector_learning_rate, TOWER: tower_learning_rate, ENCODER: encoder_learning_rate}
    groups: dict[tuple[str, bool, bool], dict[str, Any]] = {}
    for part, named in trainable.parts.items():
        own = own_rates.get(part)
        for name, parameter in named.items():
            decays = parameter.ndim > 1 and name.rpartition(".")[2] != "bias"
            key = (part if own is not None else "", decays, id(parameter) in orthogonal)
            group = groups.setdefault(
                key,
                {
                    "params": [],
                    "weight_decay": weight_decay if decays else 0.0,
                    "lr": learning_rate if own is None else own,
                    **({"muon": True} if id(parameter) in orthogonal else {}),
                },
            )
            group["params"].append(parameter)
    return list(groups.values())
