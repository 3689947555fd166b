"""Turn a conversation into token ids and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import DataError
from tove_llava.data.records import Record, prepare_turns
from tove_llava.data.templates import Segment, Template, Turn, get_template
from tove_llava.data.templates.chat_template import without_reasoning
from tove_llava.data.tokenizer import IMAGE_PLACEHOLDER, text_encoder

IMAGE_TOKEN_INDEX = -200  # stands for one image until the collator expands it; LLaVA's number
IGNORE_INDEX = -100  # torch's cross-entropy skips it


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of one conversation, equally long.

    An image is one -200. Its label is -100, or -200 within an answer (as in LLaVA); the collator ignores both.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def num_images(self) -> int:
        return self.input_ids.count(IMAGE_TOKEN_INDEX)

    @property
    def num_supervised(self) -> int:
        """Count the tokens that are learned, without images in answers."""
        return sum(label not in (IGNORE_INDEX, IMAGE_TOKEN_INDEX) for label in self.labels)


def encode_record(
    record: Record, tokenizer: PreTrainedTokenizerBase, template: Template | str, check_images: bool = True
) -> Encoded:
    """Encode a record for training.

    Args:
        record: from :func:`tove_llava.data.records.parse_record`.
        tokenizer: with a fast backend, best from :func:`tove_llava.data.load_tokenizer`.
        template: a template or its registered name.
        check_images: see :func:`tove_llava.data.records.prepare_turns`.
    """
    template = get_template(template)
    turns = prepare_turns(record, template, check_images)
    with record.errors():
        return encode_turns(turns, tokenizer, template, images=bool(record.images) or template.single_turn)


def encode_prompt(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: Template | str, images: bool = True
) -> list[int]:
    """Return the ids of a generation prompt.

    Args:
        turns: the conversation so far. Image placeholders stay where they are; an open assistant turn is added after a
            user's.
        images: True if ``<image>`` stands for an image; otherwise it is ordinary text.
    """
    if not turns or turns[-1].role != "assistant":
        turns = [*turns, Turn("assistant", None)]
    return encode_turns(turns, tokenizer, template, images=images).input_ids


def encode_turns(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: Template | str, images: bool
) -> Encoded:
    """Render turns and encode the segments.

    The text between two images is encoded as a text of its own (LLaVA's rule). Within it, each change between
    supervised and unsupervised text is a token boundary, as it is when the model generates.

    Raises:
        DataError: the template refuses the turns, or renders something else than they say.
    """
    template, encoder = get_template(template), text_encoder(tokenizer)
    rendered = template.render(turns, tokenizer)
    _compare(turns, rendered, template, images)
    ids: list[int] = list(encoder.prefix_ids) if template.adds_bos else []
    labels: list[int] = [IGNORE_INDEX] * len(ids)
    starts_text = True
    for supervised, segments in groupby(rendered, key=lambda segment: segment.supervised):
        joined = "".join(segment.text for segment in segments)
        for index, text in enumerate(joined.split(IMAGE_PLACEHOLDER) if images else [joined]):
            if index:
                ids.append(IMAGE_TOKEN_INDEX)
                labels.append(IMAGE_TOKEN_INDEX if supervised else IGNORE_INDEX)
                starts_text = True
            if not text:
                continue
            new = encoder.encode(text) if starts_text else encoder.continuation(text)
            starts_text = False
            ids += new
            labels += new if supervised else [IGNORE_INDEX] * len(new)
    return Encoded(ids, labels)


def _compare(turns: Sequence[Turn], rendered: Sequence[Segment], template: Template, images: bool) -> None:
    """Refuse a rendering that lacks an image or a turn's text, or does not learn a reply."""
    whole = "".join(segment.text for segment in rendered)
    learned = "".join(segment.text for segment in rendered if segment.supervised)
    meant = sum((turn.text or "").count(IMAGE_PLACEHOLDER) for turn in turns)
    if images and whole.count(IMAGE_PLACEHOLDER) != meant:
        raise DataError(f"the template makes {whole.count(IMAGE_PLACEHOLDER)} image placeholders of {meant}")
    read = read_learned = 0
    for number, turn in enumerate(turns, start=1):
        words = (turn.text or "").strip()
        if turn.role != "assistant":
            read = read if template.single_turn else _end_of(words, whole, read, number)
        else:
            words = words if words in learned else without_reasoning(words).strip()
            read_learned = _end_of(words, learned, read_learned, number)


def _end_of(words: str, text: str, start: int, number: int) -> int:
    found = text.find(words, start)
    if found < 0:
        raise DataError(
            f"turn {number}: the template changes the text {words[:60]!r}, or leaves it out; choose another "
            "conversation template"
        )
    return found + len(words)


def end_ids(tokenizer: PreTrainedTokenizerBase, template: Template | str, generation_config: Any = None) -> list[int]:
    """List the ids at which an answer ends: the template's, the tokenizer's, and those that the model names."""
    named = getattr(generation_config, "eos_token_id", None)
    named = list(named) if isinstance(named, (list, tuple)) else [named]
    own = tokenizer.convert_tokens_to_ids(get_template(template).end_tokens(tokenizer))
    return sorted({token for token in (*named, *own, tokenizer.eos_token_id) if token is not None})
