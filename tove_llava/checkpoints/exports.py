"""Exported folders, which load a model without this package."""

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from tove_llava.checkpoints.base import LlavaFormat, Request
from tove_llava.checkpoints.card import CARD, compose_card
from tove_llava.checkpoints.loading import load_model, read_config
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.checkpoints.tensors import write_json
from tove_llava.checkpoints.tokenizer_files import PROBES
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.safe_loading import from_pretrained
from tove_llava.data import IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX, Turn, encode_prompt, get_template
from tove_llava.data.tokenization import end_ids
from tove_llava.data.tokenizer import text_encoder
from tove_llava.llava.processing import jinja_template
from tove_llava.tower.pixels import image_settings

# Differences between every exported folder and training.
_EXCEPTIONS = (
    'Images are resized by Pillow as in training where the processor is loaded with `backend="pil"`, and wherever '
    "torchvision is not installed; torchvision's resizing differs by a few levels of 255.",
    "Ids are those of training, which for LLaMA's vocabulary are SentencePiece's, in `tokenizer.json` and through the "
    "chat template. Mind one thing without the template: training encodes the text after an image as a text of its "
    "own, so with LLaMA's vocabulary a space stands between `<image>` and what follows; the template writes it.",
    "Text that itself says `<image>` is taken for an image here; in training it was ordinary text.",
    "Images go in front of their message's text, as in training, wherever the request has them.",
)


@dataclass
class ExportSource:
    """A loaded checkpoint to export.

    Attributes:
        model: a ``ToveLlavaForConditionalGeneration`` on the CPU, adapters merged, backbones loaded.
        manifest: describes its training.
        chat_begins: the chat template writes the tokens that begin a text; otherwise the tokenizer does.
        remarks: facts about this export for its user, beyond the documentation, one sentence each.
    """

    folder: Path
    model: Any
    processor: LlavaProcessor
    manifest: Manifest
    chat_begins: bool = True
    remarks: list[str] = dataclasses.field(default_factory=list)


class ExportFormat(LlavaFormat):
    """A format written from a loaded model, and never read as parts."""

    honours: ClassVar[tuple[str, ...]] = ("dtype", "bos")

    @abstractmethod
    def check(self, config: Any) -> None:
        """Look at a checkpoint's ``ToveLlavaConfig`` before any weight is loaded.

        Raises:
            ConfigError: this format cannot hold such a model; the message says what to do.
        """

    def open(self, folder: Path, request: Request) -> ExportSource:
        """Load the model of one of this package's folders, adapters merged."""
        manifest = Manifest.read(folder)
        self.check(read_config(folder))
        model, processor = load_model(folder, dtype=request.dtype, merge_lora=True)
        return ExportSource(folder, model, processor, manifest, chat_begins=request.bos == "template")


def write_processor(source: ExportSource, folder: Path, written: Any, *, class_token: bool) -> None:
    """Write a stock processor; check that it prepares inputs as in training.

    Args:
        written: the folder's vision configuration.
        class_token: its vision tower returns one, which the model drops.
    """
    vision, tokenizer = source.model.config.vision_config, source.processor.tokenizer
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            do_pad=source.manifest.image_aspect_ratio
            == "pad",  # pad to a square with the mean colour before anything else
            **image_settings(vision, written.image_size),
        ),
        tokenizer=tokenizer,
        patch_size=written.patch_size,
        vision_feature_select_strategy="default" if class_token else "full",
        num_additional_image_tokens=int(class_token),
        image_token=source.processor.image_token,
        chat_template=chat_template(source.manifest.template, tokenizer, source.chat_begins),
    )
    processor.save_pretrained(folder)
    # transformers 4 and servers read the image processor from its own file.
    processor.image_processor.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = read_json_object(file)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 know
    settings["padding_side"] = "left"  # for batches of prompts
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # else transformers 4 adds token_type_ids
    settings["additional_special_tokens"] = list(settings.pop("extra_special_tokens", []))
    for key in ("backend", "is_local", "local_files_only"):  # about this machine
        settings.pop(key, None)
    write_json(file, settings)
    _check_prompts(source, folder, (written.image_size // written.patch_size) ** 2)


def chat_template(template: str, tokenizer: PreTrainedTokenizerBase, begins: bool = True) -> str:
    """Return a conversation template in jinja that writes BOS itself.

    Servers encode a rendered chat without adding special tokens, so a template without BOS would lose it there.

    Args:
        begins: False leaves BOS to the tokenizer.
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
    # LLaMA's tokenizers begin a text with a space, but not after BOS: there it has to be written.
    return (
        "{%- set body -%}" + body + "{%- endset -%}"
        f"{{{{- {front!r} -}}}}{{%- if not body.startswith({IMAGE_PLACEHOLDER!r}) -%}}{{{{ {encoder.text_prefix!r} }}}}"
        "{%- endif -%}{{- body -}}"
    )


def generation_config(source: ExportSource) -> GenerationConfig:
    """Return greedy decoding that ends where the model was taught to end."""
    tokenizer = source.processor.tokenizer
    ends = end_ids(tokenizer, source.manifest.template, source.model.generation_config)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


def _check_prompts(source: ExportSource, folder: Path, num_image_tokens: int) -> None:
    own = source.processor.tokenizer
    tokenizer = from_pretrained(AutoTokenizer, folder, "the exported tokenizer")
    for text in PROBES:
        if tokenizer(text).input_ids != own(text).input_ids:
            raise CheckpointError(f"the exported tokenizer gives other ids than training for {text!r}")
    processor = from_pretrained(AutoProcessor, folder, "the exported processor", backend="pil")
    image_id = source.model.config.image_token_id
    for turns, messages in _conversations(source.manifest.template):
        expected: list[int] = []
        for token in encode_prompt(turns, own, source.manifest.template):
            expected += [image_id] * num_image_tokens if token == IMAGE_TOKEN_INDEX else [token]
        got = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        if list(got["input_ids"][0]) != expected:
            raise CheckpointError(
                f"the exported chat template does not give the prompt of {source.manifest.template!r} for {turns}"
            )


def _conversations(template: str) -> list[tuple[list[Turn], list[dict[str, Any]]]]:
    """Return the same conversations as this package's turns and as chat messages."""
    before, after = get_template(template).image_wrapper
    shown = {"type": "image", "image": Image.new("RGB", (40, 30), (200, 100, 50))}

    def user(text: str, image: bool = True) -> tuple[Turn, dict[str, Any]]:
        written = f"{before}{IMAGE_PLACEHOLDER}{after}\n{text}" if image else text
        return Turn("user", written), {"role": "user", "content": [shown] * image + [{"type": "text", "text": text}]}

    def answer(text: str) -> tuple[Turn, dict[str, Any]]:
        return Turn("assistant", text), {"role": "assistant", "content": [{"type": "text", "text": text}]}

    found = [[user("What is it?")], [user("Two  spaces, a\nline and 北京?")]]
    if not get_template(template).single_turn:
        found += [
            [user("What is it?"), answer("A red cone."), user("Where?", image=False)],
            [user("No image.", image=False)],
        ]
    return [([turn for turn, _ in pairs], [message for _, message in pairs]) for pairs in found]


def without_paths(config: Any) -> None:
    """Remove the source folder's name from a configuration and its parts."""
    for part in (config, *(getattr(config, name) for name in getattr(config, "sub_configs_defaults", {}))):
        part._name_or_path = ""


def write_export_card(
    source: ExportSource,
    folder: Path,
    about: str,
    code: str,
    parts: list[tuple[str, str, str]],
    remarks: Sequence[str] = (),
) -> None:
    """Write the folder's README.md.

    Args:
        about: first paragraph.
        code: opens the folder.
        parts: rows of part, source and licence.
        remarks: added to the export's own, one sentence each.
    """
    example = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = source.processor.apply_chat_template(
        example,
        chat_template=chat_template(source.manifest.template, source.processor.tokenizer, source.chat_begins),
        add_generation_prompt=True,
    )
    shown = "the shortest side resized, the middle cut out"
    if source.manifest.image_aspect_ratio == "pad":
        shown = "padded to a square with the mean colour, then resized"
    card = compose_card(
        f"{source.manifest.preset} ({source.manifest.stage})",
        about,
        code,
        [
            "## Prompt",
            f"Conversation template `{source.manifest.template}`, in `chat_template.jinja`. Images stand before the "
            f"text. A question becomes\n\n```\n{prompt}\n```",
            f"Images: RGB, {shown}; the image processor here does that.",
        ],
        parts,
        ["## Exceptions", "\n".join(f"- {remark}" for remark in (*source.remarks, *_EXCEPTIONS, *remarks))],
        sources=[source.manifest.language["source"], source.model.config.vision_config.clip_source],
    )
    card.save(folder / CARD)
