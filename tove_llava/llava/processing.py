"""The processor, a stock LlavaProcessor that saves an ordinary LLaVA folder."""

import json
from pathlib import Path

from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase

from tove_llava.data import IMAGE_PLACEHOLDER, get_template
from tove_llava.data.templates.chat_format import chat_format
from tove_llava.data.tokenizer import text_encoder
from tove_llava.tower import ToveVisionConfig
from tove_llava.tower.pixels import image_processor, image_settings

_TEMPLATES = Path(__file__).parent / "chat_templates"


def build_image_processor(vision: ToveVisionConfig) -> CLIPImageProcessorPil:
    """Build CLIP's image processor at the tower's size and normalisation."""
    return CLIPImageProcessorPil(**image_settings(vision))


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    vision: ToveVisionConfig,
    *,
    image_token: str,
    template: str,
    image_aspect_ratio: str = "square",
) -> LlavaProcessor:
    """Bundle tokenizer, image processor and the conversation template's jinja form.

    Batches of prompts are padded on the left, as generation needs it.

    Args:
        tokenizer: gets ``image_token`` where it has none.
        vision: gives image size, normalisation and patch size, by which placeholders are counted.
        template: registered name of the conversation template the model is trained with; the processor's
            ``conversation_template``.
        image_aspect_ratio: how the model is shown images in training: ``"pad"`` or ``"square"``.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the latter are saved
    processor = LlavaProcessor(
        image_processor=image_processor(vision, image_aspect_ratio),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=vision.num_image_tokens - vision.num_patches,
        image_token=image_token,
        chat_template=jinja_template(template, tokenizer),
    )
    processor.conversation_template = template
    return processor


def jinja_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a conversation template in jinja; None if it has none.

    It begins with ``messages.jinja``, which makes text of typed parts and refuses what training refuses: a tool's and
    unknown roles, and those that do not take turns.
    """
    if template == "chat_template" and not tokenizer.chat_template:
        return None
    found = get_template(template)
    # In training the text after an image is encoded on its own, and LLaMA's tokenizer begins it with a space.
    # transformers encodes it as the continuation of a special token, so the space has to be written.
    before, after = found.image_wrapper
    image = before + IMAGE_PLACEHOLDER + text_encoder(tokenizer).text_prefix + after
    messages = (_TEMPLATES / "messages.jinja").read_text().replace(IMAGE_PLACEHOLDER, image)
    if template == "chat_template":
        own = tokenizer.chat_template = chat_format(tokenizer).text
        return own if messages in own else messages + own  # a checkpoint's own template begins with it
    # A template that inherits how it renders differs only in its system text.
    renders = next(cls for cls in type(found).__mro__ if "render" in vars(cls))
    file = _TEMPLATES / f"{getattr(renders, 'name', '')}.jinja"
    if not file.is_file():
        return None
    body = file.read_text().rstrip("\n").replace(IMAGE_PLACEHOLDER, image).replace("</s>", tokenizer.eos_token)
    return messages + body.replace("SYSTEM", json.dumps(getattr(found, "system", ""), ensure_ascii=False))
