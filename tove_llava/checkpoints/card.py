"""Model cards (README.md) of checkpoint folders and of exported ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

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

_AUTO = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER{})
processor = AutoProcessor.from_pretrained(FOLDER, backend="pil"{})
"""
STOCK_CODE = _AUTO.format("", "")  # code that opens a folder, by the owner of its classes
_TRUSTED = ", trust_remote_code=True"
REMOTE_CODE = _AUTO.format(_TRUSTED, _TRUSTED)  # the processor's classes are stock, but transformers asks all the same
OWN_CODE = f"import tove_llava  # registers the classes with transformers\n{STOCK_CODE}"
ADAPTED_CODE = """import tove_llava

model, processor = tove_llava.load_model(FOLDER)  # or "hf:owner/name"
"""
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
    """Write a checkpoint's card; one that somebody else wrote stays.

    It names the model's parts and licences, its training and its scores.

    Args:
        vision: the model's tower.
        manifest: names the language model and describes the training.
        scores: report of ``tove-llava eval`` on these very weights.
        tags: further tags for the hub.
    """
    file = folder / CARD
    if file.is_file() and not is_ours(file.read_text(encoding="utf-8", errors="replace")):
        return
    language = manifest.language["source"] if manifest is not None else None
    attached = ", ".join(vision.attached_experts) or "none"
    code = ADAPTED_CODE if manifest is not None and manifest.kind == "lora" else OWN_CODE
    images = []
    if manifest is not None:
        images = [f"Conversation template `{manifest.template}`; images: `{manifest.image_aspect_ratio}`."]
    card = compose_card(
        f"{manifest.preset} ({manifest.stage})" if manifest is not None else "ToVE-LLaVA",
        f"A LLaVA whose vision tower is ToVE (arXiv 2504.00691): CLIP's tokens, with the knowledge of frozen vision "
        f"experts by {described_fusion(vision)}. Experts attached: {attached}.",
        code,
        images,
        part_rows(vision, language),
        ["## Training", *_training(manifest), "## Scores", _scores(scores)],
        sources=[language, vision.clip_source],
        tags=tags,
    )
    card.save(file)


def described_fusion(vision: ToveVisionConfig) -> str:
    """Name the fusion, and its gate where it is the paper's."""
    gate = "a token-aware gate (fusion `tove`)"
    return gate if vision.fusion == "tove" else f"the fusion `{vision.fusion}`"


def compose_card(
    name: str,
    about: str,
    code: str,
    use: Sequence[str],
    parts: Iterable[Sequence[str]],
    more: Sequence[str],
    *,
    sources: Iterable[str | None],
    tags: Iterable[str] = (),
) -> ModelCard:
    """Compose a card.

    Args:
        code: opens the folder, which it calls FOLDER.
        use: further paragraphs about using the model.
        parts: rows of part, source and licence.
        more: paragraphs that end the card.
        sources: of the models that this one is made of; repositories among them are named in the card's metadata.
    """
    bases = [Source.parse(source).target for source in sources if source and _is_repository(source)]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys(["tove", "llava", *tags])),
        base_model=bases or None,
    )
    blocks = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        about,
        f"## Use\n\n```python\n{code}{_ASK}```",
        *use,
        "## Parts",
        markdown_table(("part", "source", "licence"), parts, left=3),
        "The licence of this model follows from those of its parts and of the data that it was trained on.",
        *more,
        f"{_MARK} {__version__}.",
    ]
    return ModelCard("\n\n".join(blocks) + "\n")


def part_rows(
    vision: ToveVisionConfig,
    language: str | None,
    *,
    experts: bool = True,
    trained: str = "gate, projections, projector, adapters",
) -> list[tuple[str, str, str]]:
    """List a model's parts: rows of part, source and licence."""
    rows = [("vision tower's CLIP", *_described(vision.clip_source))]
    for spec in vision.expert_specs if experts else ():
        state = ", detached" if spec.name in vision.detached_experts else ""
        origin = f"{display_source(spec.source)}, {spec.mode}, {spec.image_size} px{state}"
        rows.append((f"expert {spec.name}", origin, _expert_licence(vision, spec.name)))
    rows.append(("language model", *_described(language)))
    rows.append((trained, "trained", "the trainer's to choose"))
    return rows


def is_ours(card: str) -> bool:
    """Return whether this package wrote a card."""
    return _MARK in card


def read_scores(folder: Path) -> dict[str, Any] | None:
    """Read the evaluation report next to a model, if there is one."""
    try:
        report = read_json_object(folder / SCORES)
    except CheckpointError:
        return None
    return report if isinstance(report.get("benchmarks"), dict) else None


def _expert_licence(vision: ToveVisionConfig, name: str) -> str:
    from tove_llava.experts import build_expert  # imports every expert's library

    spec = next(spec for spec in vision.expert_specs if spec.name == name)
    if Source.parse(spec.source).is_random:
        return licence_of(spec.source)
    try:
        return build_expert(spec).meta_twin().licence()
    except (ToveError, OSError):  # its source is not on this machine
        return NOT_STATED


def _is_repository(source: str) -> bool:
    parsed = Source.parse(source)
    return isinstance(parsed, HubSource) and parsed.path is None


def _described(source: str | None) -> tuple[str, str]:
    return (display_source(source), licence_of(source)) if source else ("not recorded", NOT_STATED)


def _training(manifest: Manifest | None) -> list[str]:
    stages = manifest.history if manifest is not None else []
    if not stages:
        return ["Not recorded."]
    keys = list(dict.fromkeys(key for stage in stages for key in stage if key != "stage"))
    header = ("", *(str(stage.get("stage", "")) for stage in stages))
    return [
        markdown_table(header, [(key, *(_shown(stage.get(key)) for stage in stages)) for key in keys], left=len(header))
    ]


def _scores(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "Not evaluated, or changed since it was."
    rows = []
    for benchmark, conditions in report["benchmarks"].items():
        for condition, result in conditions.items():
            for measure, value in _leaves(result.get("scores", {})):
                rows.append((benchmark, condition, measure, _shown(value)))
    return markdown_table(("benchmark", "condition", "measure", "value"), rows, left=3)


def _leaves(scores: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in scores.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        found += _leaves(value, name) if isinstance(value, Mapping) else [(name, value)]
    return found


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
