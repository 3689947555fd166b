"""What every exported folder shares: the processor, the tokenizer's files, the prompt, the model card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from tove_llava.checkpoints.export_format import ExportSource
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.text import markdown_table
from tove_llava.core.version import __version__
from tove_llava.data import IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX, Turn, encode_prompt, get_template
from tove_llava.data.tokenizer import text_encoder
from tove_llava.llava.processing import jinja_template

# Strings on which conversions of SentencePiece models have been seen to differ.
PROBES = (
    "a plain sentence, with a comma.",
    " begins with a space",
    "  begins with two",
    "runs   of    spaces     here  ",
    "a line\nand another\n\n  indented\ttab",
    "naïve café, 北京, 😀🏽, ﷽, e\u0301, \u00a0, \u200b",
    "USER: What is it? ASSISTANT: two  cones</s>USER: And? ASSISTANT:",
    "</s> behind a special token",
    "",
    " ",
    "\n",
)

# What every exported folder does otherwise than training.
EXCEPTIONS = (
    'Pictures are resized by Pillow as in training where the processor is loaded with `backend="pil"`, and wherever '
    "torchvision is not installed; torchvision's resizing differs by a few levels of 255.",
    "Ids are those of training, which for LLaMA's vocabulary are SentencePiece's, in `tokenizer.json` and through the "
    "chat template. Without the template one thing has to be minded: training encodes the text behind a picture as a "
    "text of its own, so with LLaMA's vocabulary a space stands between `<image>` and what follows; the template "
    "writes it.",
    "Text that itself says `<image>` is taken for a picture here; in training it was ordinary text.",
    "Pictures go in front of their message's text, as in training, wherever the request has them.",
)


def export_processor(
    source: ExportSource, *, image_size: int, patch_size: int, strategy: str, additional_tokens: int
) -> LlavaProcessor:
    """A stock processor that prepares pictures and prompts as training did.

    Args:
        image_size: pixels per side of the model's ``pixel_values``.
        patch_size: pixels per token and side, by which placeholders are counted.
        strategy: the model's ``vision_feature_select_strategy``.
        additional_tokens: 1 where the vision tower has a class token.
    """
    vision, tokenizer = source.model.config.vision_config, source.processor.tokenizer
    images = LlavaImageProcessorPil(
        do_pad=source.image_aspect_ratio == "pad",  # to a square, with the mean colour, before anything else
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(vision.image_mean),
        image_std=list(vision.image_std),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=additional_tokens,
        image_token=source.processor.image_token,
        chat_template=chat_template(source.template, tokenizer, source.chat_begins),
    )


def chat_template(template: str, tokenizer: PreTrainedTokenizerBase, begins: bool = True) -> str:
    """The jinja form of a conversation template, with the tokens that the tokenizer puts in front written out.

    Servers encode a rendered chat without adding special tokens, so a template that leaves BOS to the tokenizer would
    lose it there.

    Args:
        begins: False leaves BOS to the tokenizer.

    Raises:
        ConfigError: the conversation template has no jinja form.
    """
    body = jinja_template(template, tokenizer)
    if body is None:
        raise ConfigError(
            f"conversation template {template!r} has no jinja form, which an exported folder needs: add "
            f"tove_llava/llava/chat_templates/{template}.jinja"
        )
    encoder = text_encoder(tokenizer)
    front = "".join(tokenizer.convert_ids_to_tokens(encoder.prefix_ids))
    if not begins or not front or not get_template(template).adds_bos:
        return body
    # A text of its own begins with a space in LLaMA's tokenizers, but not after BOS: there it has to be written.
    return (
        "{%- set body -%}" + body + "{%- endset -%}"
        f"{{{{- {front!r} -}}}}{{%- if not body.startswith({IMAGE_PLACEHOLDER!r}) -%}}{{{{ {encoder.text_prefix!r} }}}}"
        "{%- endif -%}{{- body -}}"
    )


def save_processor(processor: LlavaProcessor, folder: Path) -> None:
    """Writes the processor's files so that transformers 4 and 5, and the servers on either, read them."""
    processor.save_pretrained(folder)
    # transformers 4 and servers look for the image processor in a file of its own.
    processor.image_processor.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = read_json_object(file)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that both know
    settings["padding_side"] = "left"  # for batches of prompts
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # else transformers 4 adds token_type_ids
    settings["additional_special_tokens"] = list(settings.pop("extra_special_tokens", []))
    for key in ("backend", "is_local", "local_files_only"):  # of this machine
        settings.pop(key, None)
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def generation_config(source: ExportSource) -> GenerationConfig:
    """Greedy decoding that ends where the model was taught to end."""
    named = getattr(source.model.generation_config, "eos_token_id", None)
    tokenizer = source.processor.tokenizer
    ends = sorted(
        {
            token
            for token in (*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id)
            if token is not None
        }
    )
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


def check_prompts(source: ExportSource, folder: Path, num_image_tokens: int) -> None:
    """Compares what stock classes read from the folder with what training feeds the model.

    Raises:
        CheckpointError: a token id differs.
    """
    own = source.processor.tokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in PROBES:
        if tokenizer(text).input_ids != own(text).input_ids:
            raise CheckpointError(f"the exported tokenizer gives other ids than training for {text!r}")
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    image_id = source.model.config.image_token_id
    for turns, messages in _conversations(source.template):
        expected: list[int] = []
        for token in encode_prompt(turns, own, source.template):
            expected += [image_id] * num_image_tokens if token == IMAGE_TOKEN_INDEX else [token]
        got = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        if list(got["input_ids"][0]) != expected:
            raise CheckpointError(
                f"the exported chat template does not give the prompt of {source.template!r} for {turns}"
            )


def _conversations(template: str) -> list[tuple[list[Turn], list[dict[str, Any]]]]:
    """The same conversations as this package's turns and as chat messages."""
    before, after = get_template(template).image_wrapper
    single = get_template(template).single_turn
    picture = {"type": "image", "image": Image.new("RGB", (40, 30), (200, 100, 50))}

    def user(text: str, image: bool = True) -> tuple[Turn, dict[str, Any]]:
        said = f"{before}{IMAGE_PLACEHOLDER}{after}\n{text}" if image else text
        return Turn("user", said), {"role": "user", "content": [picture] * image + [{"type": "text", "text": text}]}

    def answer(text: str) -> tuple[Turn, dict[str, Any]]:
        return Turn("assistant", text), {"role": "assistant", "content": [{"type": "text", "text": text}]}

    talks = [[user("What is it?")], [user("Two  spaces, a\nline and 北京?")]]
    if not single:
        talks += [
            [user("What is it?"), answer("A red cone."), user("Where?", image=False)],
            [user("No picture.", image=False)],
        ]
    return [([turn for turn, _ in talk], [message for _, message in talk]) for talk in talks]


def usage(trust_remote_code: bool = False) -> str:
    """Code that loads an exported folder ``DIR`` and asks it one question, for its card."""
    trust = ", trust_remote_code=True" if trust_remote_code else ""
    return f"""from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(DIR{trust})
processor = AutoProcessor.from_pretrained(DIR, backend="pil")
content = [{{"type": "image", "url": "picture.jpg"}}, {{"type": "text", "text": "What is it?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


def without_paths(config: Any) -> None:
    """Takes the folder that a configuration was read from out of it and of its parts."""
    for part in (config, *(getattr(config, name) for name in getattr(config, "sub_configs_defaults", {}))):
        part._name_or_path = ""


def model_card(
    source: ExportSource, *, what: str, how: str, parts: Sequence[tuple[str, str, str]], remarks: Sequence[str]
) -> str:
    """The folder's README.md.

    Args:
        what: first paragraph.
        how: code that loads it.
        parts: (part, source, licence).
        remarks: what a user has to know, one sentence each.
    """
    example = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = source.processor.apply_chat_template(
        example,
        chat_template=chat_template(source.template, source.processor.tokenizer, source.chat_begins),
        add_generation_prompt=True,
    )
    table = markdown_table(("part", "source", "licence"), parts, left=3)
    listed = "\n".join(f"- {remark}" for remark in remarks)
    return f"""---
pipeline_tag: image-text-to-text
library_name: transformers
---

# {source.preset} ({source.stage})

{what}

```python
{how}
```

## Prompt

Conversation template `{source.template}`, in `chat_template.jinja`. Pictures stand in front of the text. A question
becomes

```
{prompt}
```

Pictures: RGB, {
        "padded to a square with the mean colour, then resized"
        if source.image_aspect_ratio == "pad"
        else "the shortest side resized, the middle cut out"
    }; the image processor here does that.

## Parts

{table}

The licence of this model follows from those of its parts and of the data that it was trained on.

## Exceptions

{listed}

Written by tove_llava {__version__}.
"""
