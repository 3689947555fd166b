"""A loaded model that answers conversations with images.

``B`` prompts in a batch, ``N`` vision tokens an image, ``D`` the language model's width.
"""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from tove_llava.checkpoints.loading import load_model
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import (
    IGNORE_INDEX,
    IMAGE_PLACEHOLDER,
    IMAGE_TOKEN_INDEX,
    ImageTransform,
    Turn,
    encode_prompt,
    encode_turns,
    get_template,
)
from tove_llava.data.images import AspectRatio
from tove_llava.data.tokenization import end_ids
from tove_llava.inference.reasoning import Spoken, spoken
from tove_llava.inference.sequences import as_images, pad_left
from tove_llava.presets import QuantizationPreset
from tove_llava.tower import ToveVisionModel
from tove_llava.tower.execution import execution_mode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | None = None) -> torch.device:
    """Return the named device; by default the first GPU, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; use cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but there is no CUDA device here; use --device cpu")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype called ``name``; an unknown one is a ConfigError.

    Without a name: bfloat16 on a GPU that has it (else float16), float32 on the CPU.
    """
    if name is not None:
        if name not in DTYPES:
            raise ConfigError(f"unknown dtype {name!r}; use one of {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _set_execution(model: PreTrainedModel, name: str) -> None:
    tower = model.base_model.vision_tower
    if isinstance(tower, ToveVisionModel):
        tower.set_execution(name)
    elif name != "eager":
        raise ConfigError(f"this model's tower is plain CLIP, which is run as it is; leave out the execution {name!r}")


class _EndOfLine(StoppingCriteria):
    """Ends an answer at its first line break, for models of captions."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = self.tokenizer.batch_decode(input_ids[:, -1:])
        return torch.tensor(["\n" in text for text in last], device=input_ids.device)


class Answerer:
    """A model and its processor, ready to answer. Not thread-safe: see :class:`~tove_llava.inference.engine.Engine`.

    Args:
        model: a LLaVA model (ours or stock), on its device.
        processor: its ``LlavaProcessor``.
        template: registered name of the model's conversation template; LLaVA-1.5's where its folder records none.
        aspect_ratio: "pad" or "square", as in training.

    Attributes:
        recorded_template: the template's name, if the model's folder records it.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, template: str | None = None, aspect_ratio: AspectRatio = "pad"
    ) -> None:
        self.model = model.eval()
        self.tokenizer = processor.tokenizer
        self.recorded_template = template
        self.template = get_template(template or "v1")
        images = processor.image_processor
        side = images.crop_size["height"]
        self.transform, self.upright_transform = (
            ImageTransform(side, aspect_ratio, mean=images.image_mean, std=images.image_std, exif_transpose=upright)
            for upright in (False, True)
        )
        self.image_token_id: int = model.config.image_token_id
        text_config = model.config.get_text_config()
        self.max_length: int = getattr(text_config, "max_position_embeddings", 2048)
        self.pad_id: int = self.tokenizer.pad_token_id or 0  # masked wherever it is
        self.end_ids = end_ids(self.tokenizer, self.template, model.generation_config)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | None = None,
        dtype: str | None = None,
        quantization: QuantizationPreset | None = None,
        tower_execution: str = "eager",
    ) -> "Answerer":
        """Load a model folder of this package, or a stock transformers LLaVA.

        A stock folder is read with the template and aspect ratio that its config.json records (exported ones do), else
        with LLaVA-1.5's.

        Args:
            quantization: hold the language model's linear layers in 4 or 8 bits. Adapters then stay separate; else
                they are merged.
            tower_execution: see :meth:`~tove_llava.tower.ToveVisionModel.set_execution`.

        Raises:
            CheckpointError: the folder holds no model.
            ConfigError: an unknown device, dtype or execution, or bitsandbytes is not installed.
        """
        execution_mode(tower_execution)
        where = choose_device(device)
        model, processor = load_model(
            folder,
            dtype=choose_dtype(dtype, where),
            device=where,
            merge_lora=quantization is None,
            quantization=quantization,
            keep_stock=True,
        )
        _set_execution(model, tower_execution)
        ratio: Any = getattr(model.config, "image_aspect_ratio", None) or "pad"
        return cls(model, processor, processor.conversation_template, ratio)

    def with_template(self, name: str) -> "Answerer":
        """Return the same model with another conversation template.

        Raises:
            ConfigError: there is no such template.
        """
        other = copy(self)
        other.template = get_template(name)
        other.end_ids = end_ids(self.tokenizer, other.template, self.model.generation_config)
        return other

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def num_image_tokens(self) -> int:
        """Return the number of tokens of an image with the attached experts."""
        config = self.model.config
        return getattr(config.vision_config, "num_image_tokens", config.image_seq_length)

    @property
    def tower(self) -> Any:
        """Return the vision tower inside the model."""
        return self.model.base_model.vision_tower

    def encode(self, turns: Sequence[Turn], num_images: int, image_tokens: int | None = None) -> list[int]:
        """Return the prompt ids of a conversation; each image takes ``num_image_tokens`` ids.

        Args:
            image_tokens: ``num_image_tokens``, for callers with many conversations: looking it up is slow.

        Raises:
            DataError: placeholders and images differ in number, the turns do not alternate, or the prompt leaves the
                model no room for an answer.
        """
        found = sum((turn.text or "").count(IMAGE_PLACEHOLDER) for turn in turns) if num_images else 0
        if found != num_images:
            raise DataError(f"{found} {IMAGE_PLACEHOLDER} placeholders for {num_images} images; they must be as many")
        characters, most = sum(len(turn.text or "") for turn in turns), self.max_length * self._longest_token
        if characters > most:  # encoding such a text takes long, and it cannot fit
            raise DataError(
                f"the conversation is {characters} characters long, and the model takes {self.max_length} tokens, at "
                f"most {most} characters; shorten it, or start a new one"
            )
        ids = encode_prompt(turns, self.tokenizer, self.template, images=num_images > 0)
        if self.image_token_id in ids:
            raise DataError("the text contains the image token itself; take it out")
        if num_images and image_tokens is None:
            image_tokens = self.num_image_tokens
        expanded: list[int] = []
        for token in ids:
            expanded += [self.image_token_id] * (image_tokens or 0) if token == IMAGE_TOKEN_INDEX else [token]
        if len(expanded) >= self.max_length:
            raise DataError(
                f"the conversation is {len(expanded)} tokens long, and the model takes {self.max_length}; "
                "shorten it, use fewer images, or start a new one"
            )
        return expanded

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    def pixels(self, image: Image.Image | str | Path | bytes, upright: bool = False) -> Tensor:
        """Return float32 [3, S, S] of an image, an image file or its content.

        Args:
            upright: turn the image as its EXIF orientation says. A chat does; benchmarks and LLaVA do not.

        Raises:
            DataError: the file is missing, damaged, not an image, or too large.
        """
        transform = self.upright_transform if upright else self.transform
        if isinstance(image, Image.Image):
            return transform(image)
        return transform.open(image, "the image" if isinstance(image, bytes) else None)

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> list[Tensor]:
        """Encode images, float [n, 3, S, S], as n tensors [N, D]."""
        pixels = pixels.to(self.device, self.model.dtype)
        return list(self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)

    def generate(self, *args: Any, **options: Any) -> list[str]:
        """Return the stripped answers of a batch; arguments as in :meth:`generate_ids`."""
        return [self.text(tokens) for tokens in self.generate_ids(*args, **options)]

    @torch.inference_mode()
    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        features: Sequence[Tensor],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        *,
        stop: StoppingCriteria | None = None,
        num_beams: int = 1,
        min_new_tokens: int = 0,
    ) -> list[list[int]]:
        """Answer a batch by the model's own ``generate``, greedy at temperature 0.

        Args:
            prompts: ids from :meth:`encode`.
            features: [N, D] of all images of the batch, in the order of their placeholders.

        Returns:
            the tokens of each answer; those that end before the longest are padded.
        """
        ids, mask = pad_left(prompts, self.pad_id, self.device)  # [B, L]
        config = GenerationConfig(
            max_new_tokens=max(1, min(max_new_tokens, self.max_length - ids.shape[1])),
            min_new_tokens=min_new_tokens or None,
            num_beams=num_beams,
            eos_token_id=self.end_ids,
            pad_token_id=self.pad_id,
            bos_token_id=self.tokenizer.bos_token_id,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_p": top_p} if temperature > 0 else {}),
        )
        stops = [] if stop is None else [stop]
        if self.template.single_turn:
            stops.append(_EndOfLine(self.tokenizer))
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(stops),
            **as_images(features),
        )
        tokens: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return tokens

    def answer_ids(self, words: str) -> list[int]:
        """Return the ids of these words as an answer, without its end.

        Raises:
            ConfigError: the template has no questions and answers.
        """
        if self.template.single_turn:
            raise ConfigError(
                f"the template {self.template.name!r} shows the model no question, so no option can be scored"
            )
        turns = [Turn("user", "?"), Turn("assistant", words)]
        encoded = encode_turns(turns, self.tokenizer, self.template, images=False)
        ids = [label for label in encoded.labels if label != IGNORE_INDEX]
        ends = [index for index, token in enumerate(ids) if token in self.end_ids]
        return ids[: ends[0]] if ends else ids

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of generated tokens, stripped, without special tokens and think block."""
        return self.spoken(tokens).answer

    def spoken(self, tokens: Sequence[int]) -> Spoken:
        """Return the text of generated tokens, and their think block by itself."""
        return spoken(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def ends(self, token: int) -> bool:
        """Tell if an answer ends with this token."""
        return token in self.end_ids or (self.template.single_turn and "\n" in self.tokenizer.decode([token]))
