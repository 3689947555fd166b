"""Removal of experts from a checkpoint.

The stored tensors are cut, not those of a loaded model: kept tensors keep their bits and dtype, and no expert's weights
are needed. The smaller tower computes exactly what the larger one does with these experts masked; this is checked
before anything is written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tove_llava.analysis.measure import check_fusion
from tove_llava.checkpoints.card import write_card
from tove_llava.checkpoints.loading import load_processor, read_config
from tove_llava.checkpoints.manifest import ADAPTER, TRAINED, Manifest, write_manifest
from tove_llava.checkpoints.plugin_records import save_plugins
from tove_llava.checkpoints.tensors import file_tensors
from tove_llava.checkpoints.weight_fingerprints import by_model_names, check_stored, exact_fingerprint
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import check_writable, read_json_object, staged, write_atomically
from tove_llava.core.locks import locked_target
from tove_llava.core.paths import check_tree
from tove_llava.core.sources import Source
from tove_llava.tower import ToveVisionConfig, ToveVisionModel, TowerFeatures

FUSION = "model.vision_tower.fusion."
_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Detached:
    """A smaller checkpoint.

    Attributes:
        kept, removed: names of experts; a tower that kept none is plain CLIP.
        parameters: of the tower's own parts, before and after.
    """

    folder: Path
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        left = f"left: {', '.join(self.kept)}" if self.kept else "left: none; this is plain CLIP (fusion 'none')"
        before, after = self.parameters
        return (
            f"{self.folder}: removed {', '.join(self.removed) or 'nothing'}; {left}; "
            f"tower parameters {before:,} -> {after:,}"
        )


def detach_checkpoint(model: str | os.PathLike[str], out: str | os.PathLike[str], experts: Iterable[str]) -> Detached:
    """Write a checkpoint without some experts and those that are masked.

    Args:
        model: a folder that training wrote.
        out: must not exist; it appears when it is complete.
        experts: names of those to remove.

    Raises:
        ConfigError: an unknown expert, a model without experts, a fusion that cannot be cut, or a ``top_k`` above the
            number of gate columns that are left.
        CheckpointError: ``model`` is incomplete or damaged, or ``out`` exists or cannot be written.
        BusyError: another process writes ``out``.
    """
    check_out(out)
    with locked_target(out):
        return _detach(Path(model), Path(out), experts)


def _detach(folder: Path, out: Path, experts: Iterable[str]) -> Detached:
    manifest = Manifest.read(folder)
    config = read_config(folder)
    large = config.vision_config
    small = reduced_config(large, experts)
    files = _weight_files(folder, manifest.kind)
    state: dict[str, Tensor] = {}
    for file in files:
        state |= {name: value for name, value in file_tensors(file).items() if name.startswith(FUSION)}
    cut = cut_state(large, small, {name.removeprefix(FUSION): value for name, value in state.items()}, folder)
    check_stored(folder, manifest)
    kept = {FUSION + name: value for name, value in cut.items()}

    with staged(out) as staging:
        tensors = _write_weights(files, staging, kept)
        _copy_parts(folder, staging, large, small)
        config.vision_config = small
        config.save_pretrained(staging)
        load_processor(folder).save_pretrained(staging)
        fingerprint = exact_fingerprint(by_model_names(folder, manifest, tensors))
        plugins = save_plugins(staging, small, manifest.template)
        final = dataclasses.replace(manifest, fingerprint=fingerprint, plugins=plugins)
        write_card(staging, small, final)
        write_manifest(staging, final)
    return Detached(
        folder=out,
        kept=tuple(small.expert_names),
        removed=tuple(name for name in large.expert_names if name not in small.expert_names),
        parameters=(sum(x.numel() for x in state.values()), sum(x.numel() for x in kept.values())),
    )


def check_out(out: str | os.PathLike[str]) -> None:
    """Raise CheckpointError when the folder to be written exists, or cannot be written."""
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists already; choose another --out, or move it away")
    check_writable(out)


def reduced_config(config: ToveVisionConfig, experts: Iterable[str]) -> ToveVisionConfig:
    """Return the configuration without these and the masked experts.

    Its fusion is ``none`` when no expert is left.

    Raises:
        ConfigError: an unknown expert, no experts at all, a fusion that cannot be cut, or too large a ``top_k``.
    """
    if config.fusion == "none" or not config.experts:
        raise ConfigError("this model has no experts: its vision tower is plain CLIP, and nothing can be removed")
    check_fusion(config)
    experts = list(experts)
    config.check_expert_names(experts)
    gone = {*experts, *config.detached_experts}
    keys = config.to_dict()
    keys |= {"experts": [entry for entry in keys["experts"] if entry["name"] not in gone], "detached_experts": []}
    left = len(keys["experts"])
    if not left:
        keys |= {"fusion": "none", "fusion_options": {}, "top_k": None, "null_slot": False}
    elif config.top_k is not None and config.top_k > left + config.null_slot:
        raise ConfigError(
            f"top_k={config.top_k}, but {left + config.null_slot} gate column(s) would be left; keep more experts, or "
            "remove all of them"
        )
    return ToveVisionConfig.from_dict(keys)


def cut_state(
    large: ToveVisionConfig, small: ToveVisionConfig, state: Mapping[str, Tensor], where: str | os.PathLike[str] = ""
) -> dict[str, Tensor]:
    """Cut the smaller fusion's tensors from the larger one's.

    Gate columns and embeddings of removed experts go; a null slot's column stays last.

    Raises:
        CheckpointError: ``state`` is not of ``large``.
        ConfigError: the smaller fusion does not compute exactly what the larger one does with the experts masked.
    """
    columns = [large.expert_names.index(name) for name in small.expert_names]
    columns += [len(large.experts)] if large.null_slot else []
    with torch.device("meta"):
        fusions = [ToveVisionModel(config).fusion for config in (large, small)]
    before, after = (fusion.state_dict() for fusion in fusions)
    gate_rows = {f"gate.{name}" for name in getattr(getattr(fusions[0], "gate", None), "rows", ())}
    odd = [name for name, x in before.items() if name not in state or state[name].shape != x.shape]
    if odd or state.keys() - before.keys():
        raise CheckpointError(f"{where}: weights and config.json do not belong together ({(odd or ['extra'])[:3]})")
    cut = {}
    for name, target in after.items():
        value = state[name][columns] if name in gate_rows else state[name]
        if value.shape != target.shape:
            raise ConfigError(f"fusion {large.fusion!r}: {name} cannot be cut to fewer experts")
        cut[name] = value.contiguous()
    _check_same_function(large, small, state, cut)
    return cut


@torch.inference_mode()
def _check_same_function(
    large: ToveVisionConfig, small: ToveVisionConfig, state: Mapping[str, Tensor], cut: Mapping[str, Tensor]
) -> None:
    masked = ToveVisionConfig.from_dict(large.to_dict())
    masked.detached_experts = [name for name in large.expert_names if name not in small.expert_names]
    generator = torch.Generator().manual_seed(0)
    features = TowerFeatures(
        base=torch.randn(1, large.num_patches, large.clip_width, generator=generator),
        experts={s.name: torch.randn(1, s.width, *s.grid, generator=generator) for s in large.expert_specs},
    )
    tokens = []
    for config, tensors in ((masked, state), (small, cut)):
        tower = ToveVisionModel(config).eval()
        tower.fusion.load_state_dict({name: value.float() for name, value in tensors.items()})
        tokens.append(tower.fuse(features).last_hidden_state)
    if not torch.equal(*tokens):
        raise ConfigError(
            f"fusion {large.fusion!r} without {', '.join(masked.detached_experts)} is not what it is with them masked, "
            "so these experts cannot be removed from the checkpoint; use detach_experts on the loaded model"
        )


def _weight_files(folder: Path, kind: str) -> list[Path]:
    """List the safetensors files that may hold tensors of the tower."""
    if kind != "full":
        return [folder / TRAINED]
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set(read_json_object(folder / _INDEX)["weight_map"].values()))
        except (KeyError, AttributeError) as error:
            raise CheckpointError(f"{folder / _INDEX} is damaged: {error!r}") from error
        return [folder / name for name in names]
    return [folder / _WHOLE]


def _write_weights(files: list[Path], staging: Path, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy files without the removed tensors; return the tensors kept."""
    left: dict[str, Tensor] = {}
    for file in files:
        before = file_tensors(file)
        after = {name: kept.get(name, value) for name, value in before.items() if _stays(name, kept)}
        left |= after
        if not any(name.startswith(FUSION) for name in before):
            shutil.copyfile(file, staging / file.name)
        elif after:
            save_file(after, staging / file.name, metadata=None if file.name == TRAINED else {"format": "pt"})
    index = files[0].with_name(_INDEX)
    if files[0].name != TRAINED and index.is_file():
        record = read_json_object(index)
        record["weight_map"] = {name: file for name, file in record["weight_map"].items() if _stays(name, kept)}
        record.setdefault("metadata", {})["total_size"] = sum(x.numel() * x.element_size() for x in left.values())
        write_atomically(staging / _INDEX, json.dumps(record, indent=2) + "\n")
    return left


def _stays(name: str, kept: Mapping[str, Tensor]) -> bool:
    return not name.startswith(FUSION) or name in kept


def _copy_parts(folder: Path, staging: Path, large: ToveVisionConfig, small: ToveVisionConfig) -> None:
    """Copy adapters, generation settings, and the kept parts of a self-contained folder."""
    for name in ("generation_config.json", "adapter_config.json", ADAPTER):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)
    if (folder / "language").is_dir():
        shutil.copytree(check_tree(folder, "language"), staging / "language")
    if (folder / "backbones").is_dir():
        used, every = _own_folders(folder, small), _own_folders(folder, large)
        shutil.copytree(check_tree(folder, "backbones"), staging / "backbones", ignore=_ignoring(every - used))


def _own_folders(folder: Path, config: ToveVisionConfig) -> set[Path]:
    """List the folders inside the checkpoint that experts are read from."""
    paths = [Source.parse(spec.source).resolve(folder).path for spec in config.expert_specs if spec.source]
    return {path.resolve() for path in paths if path is not None and folder.resolve() in path.resolve().parents}


def _ignoring(paths: set[Path]) -> Callable[[str, list[str]], set[str]]:
    return lambda where, names: {name for name in names if (Path(where) / name).resolve() in paths}
