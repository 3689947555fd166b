"""The model card (README.md) of a checkpoint folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tove_llava.core.errors import CheckpointError, ToveError
from tove_llava.core.files import read_json_object
from tove_llava.core.licences import NOT_STATED, licence_of
from tove_llava.core.sources import HubSource, Source, display_source
from tove_llava.core.text import markdown_table
from tove_llava.core.version import __version__

if TYPE_CHECKING:
    from tove_llava.checkpoints.manifest import Manifest
    from tove_llava.tower import ToveVisionConfig

CARD = "README.md"
SCORES = Path("eval") / "results.json"  # where `tove-llava eval` reports, inside a model's folder
_MARK = "Card written by tove_llava"


_LOAD = """import tove_llava  # registers the classes with transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER, backend="pil")"""
_LOAD_ADAPTED = """import tove_llava

model, processor = tove_llava.load_model(FOLDER)  # or "hf:owner/name\""""
_ASK = """content = [{"type": "image", "url": "picture.jpg"}, {"type": "text", "text": "What is it?"}]
chat = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def write_card(
    folder: Path,
    vision: ToveVisionConfig,
    manifest: Manifest | None = None,
    *,
    scores: Mapping[str, Any] | None = None,
    tags: Iterable[str] = (),
) -> None:
    """Writes ``folder/README.md``; one that somebody else wrote is left alone.

    Args:
        vision: the model's tower.
        manifest: names the language model and tells how the model was trained.
        scores: what ``tove-llava eval`` reported of these very weights.
        tags: further tags for the hub.
    """
    file = folder / CARD
    if file.is_file() and not is_ours(file.read_text(encoding="utf-8", errors="replace")):
        return
    file.write_text(model_card(vision, manifest, scores=scores, tags=tags), encoding="utf-8")


def is_ours(card: str) -> bool:
    """Whether a card is one of :func:`write_card`'s."""
    return _MARK in card


def read_scores(folder: Path) -> dict[str, Any] | None:
    """The evaluation report beside a model; None where there is none that can be read."""
    try:
        report = read_json_object(folder / SCORES)
    except CheckpointError:
        return None
    return report if isinstance(report.get("benchmarks"), dict) else None


def model_card(
    vision: ToveVisionConfig,
    manifest: Manifest | None = None,
    *,
    scores: Mapping[str, Any] | None = None,
    tags: Iterable[str] = (),
) -> str:
    """The card's text: what the model is made of and under which licences, how it was trained, how it scores."""
    language = manifest.language["source"] if manifest is not None else None
    bases = [source for source in (language, vision.clip_source) if source and _is_repository(source)]
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": list(dict.fromkeys(["tove", "llava", *tags])),
    }
    if bases:
        head["base_model"] = [Source.parse(source).target for source in bases]
    attached = ", ".join(vision.attached_experts) or "none"
    name = f"{manifest.preset} ({manifest.stage})" if manifest is not None else "ToVE-LLaVA"
    blocks = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        "A LLaVA whose vision tower is ToVE (arXiv 2504.00691): CLIP's tokens, to which a token-aware gate adds the "
        f"knowledge of frozen vision experts. Experts attached: {attached}; fusion `{vision.fusion}`.",
        _use(manifest),
        "## Parts",
        markdown_table(("part", "source", "licence"), _parts(vision, language)),
        "The licence of this model follows from those of its parts and of the data that it was trained on.",
        "## Training",
        *_training(manifest),
        "## Scores",
        _scores(scores),
        f"{_MARK} {__version__}.",
    ]
    return "\n\n".join(blocks) + "\n"


def expert_licence(vision: ToveVisionConfig, name: str) -> str:
    """Licence of one expert's weights, as its class knows it."""
    from tove_llava.experts import build_expert  # every expert's library

    spec = next(spec for spec in vision.expert_specs if spec.name == name)
    try:
        return build_expert(spec).meta_twin().licence()
    except (ToveError, OSError):  # its source is not on this machine
        return NOT_STATED


def _is_repository(source: str) -> bool:
    parsed = Source.parse(source)
    return isinstance(parsed, HubSource) and parsed.path is None


def _use(manifest: Manifest | None) -> str:
    adapted = manifest is not None and manifest.kind == "lora"
    load = _LOAD_ADAPTED if adapted else _LOAD
    text = f"## Use\n\n```python\n{load}\n{_ASK}```"
    if manifest is not None:
        text += f"\n\nConversation template `{manifest.template}`; pictures: `{manifest.image_aspect_ratio}`."
    return text


def _parts(vision: ToveVisionConfig, language: str | None) -> list[tuple[str, str, str]]:
    rows = [("vision tower's CLIP", *_described(vision.clip_source))]
    for spec in vision.expert_specs:
        state = ", detached" if spec.name in vision.detached_experts else ""
        origin = f"{display_source(spec.source)}, {spec.mode}, {spec.image_size} px{state}"
        rows.append((f"expert {spec.name}", origin, expert_licence(vision, spec.name)))
    rows.append(("language model", *_described(language)))
    rows.append(("gate, projections, projector, adapters", "trained", "the trainer's to choose"))
    return rows


def _described(source: str | None) -> tuple[str, str]:
    return (display_source(source), licence_of(source)) if source else ("not recorded", NOT_STATED)


def _training(manifest: Manifest | None) -> list[str]:
    stages = manifest.history if manifest is not None else []
    if not stages:
        return ["Not recorded."]
    keys = list(dict.fromkeys(key for stage in stages for key in stage if key != "stage"))
    header = ("", *(str(stage.get("stage", "")) for stage in stages))
    return [markdown_table(header, [(key, *(_shown(stage.get(key)) for stage in stages)) for key in keys])]


def _scores(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "Not evaluated, or changed since it was."
    rows = []
    for benchmark, conditions in report["benchmarks"].items():
        for condition, result in conditions.items():
            for measure, value in _leaves(result.get("scores", {})):
                rows.append((benchmark, condition, measure, _shown(value)))
    return markdown_table(("benchmark", "condition", "measure", "value"), rows)


def _leaves(scores: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in scores.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        found += _leaves(value, name) if isinstance(value, Mapping) else [(name, value)]
    return found


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
