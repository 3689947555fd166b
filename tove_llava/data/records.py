"""Check records, with messages that name them, and arrange their turns."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.text import printable
from tove_llava.data.dialects import read_content
from tove_llava.data.images import ImageBytes, resolve_image
from tove_llava.data.templates.base import Template, Turn, alternating
from tove_llava.data.tokenizer import IMAGE_PLACEHOLDER

#: what becomes of a record with images and without a placeholder: it is refused, or the images go first
IMAGE_PLACEHOLDERS = ("written", "first")

# Tags of other libraries for an image, a video or a sound.
_TAG = re.compile(
    r"<\|?(image|img|picture|video|audio)(?:[ _-]?(?:placeholder|here|pad|token|\d+))*\|?>", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Record:
    """One checked record.

    Attributes:
        id: its ``id``, or an empty string.
        images: file names relative to the image folder, in the order of the placeholders.
        turns: all turns as written, until :func:`prepare_turns`.
        index: position in the file, counted from 0.
        file: its file, for messages.
        contents: bytes of each image that lies in the data file itself, None for the others; empty without any.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    index: int = 0
    file: str = ""
    contents: tuple[Any, ...] = ()

    @property
    def where(self) -> str:
        return record_name(self.file, self.index, self.id)

    @property
    def modality_length(self) -> int:
        """Count all turns' words, negated without images, as LLaVA's grouped sampling does."""
        words = sum(len((turn.text or "").split()) for turn in self.turns)
        return words if self.images else -words

    def file_names(self) -> tuple[str, ...]:
        """Return the images' file names; raise DataError for an image inside the data file."""
        if self.contents:
            raise DataError(f"{self.where} holds its images itself; only training and 'data check' read such images")
        return self.images

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Name this record in every :class:`DataError` that is raised inside."""
        try:
            yield
        except DataError as error:
            message = str(error)
            raise DataError(message if message.startswith(self.where) else f"{self.where}: {message}") from error


def record_name(file: str, index: int, record_id: str) -> str:
    """Name a record for a message."""
    name = f"record {index}" + (f" (id {record_id!r})" if record_id else "")
    return f"{file}: {name}" if file else name


def parse_record(raw: Any, index: int = 0, file: str = "") -> Record:
    """Check one raw record; raise DataError for a missing or wrong part.

    Args:
        raw: an object with a conversation in one of :mod:`tove_llava.data.dialects`, such as ``{"id", "image" (a name,
            a list of names, or absent), "conversations": [{"from", "value"}]}``.
        index, file: see :class:`Record`.
    """
    record_id = str(printable(raw.get("id", ""))) if isinstance(raw, dict) else ""
    where = record_name(file, index, record_id)
    if not isinstance(raw, dict):
        raise DataError(f"{where} is a {type(raw).__name__}; a record must be an object with 'conversations'")
    try:
        turns, images = read_content(raw)
    except DataError as error:
        joint = " has " if str(error).startswith("no ") else ": "
        raise DataError(f"{where}{joint}{error}") from None
    contents = tuple(image.content for image in images) if any(image.content is not None for image in images) else ()
    names = tuple(image.name or f"record {index}, image {k}" for k, image in enumerate(images))
    return Record(record_id, names, tuple(turns), index, file, contents)


def find_image(
    record: Record, number: int, folder: str | os.PathLike[str] | None, allow_links: bool = False
) -> tuple[Path | ImageBytes, str]:
    """Return an image's file or content, and its name for messages.

    Raises:
        DataError: see :func:`tove_llava.data.images.resolve_image`.
    """
    name = record.images[number]
    if record.contents and record.contents[number] is not None:
        return record.contents[number], name
    file = resolve_image(folder or "", name, allow_links)
    return file, str(file)


def place_images(record: Record) -> Record:
    """Put placeholders before the first user turn of a record that has images and no placeholder."""
    if not record.images or any(IMAGE_PLACEHOLDER in (turn.text or "") for turn in record.turns):
        return record
    turns = list(record.turns)
    for number, turn in enumerate(turns):
        if turn.role == "user":
            turns[number] = replace(turn, text=f"{IMAGE_PLACEHOLDER}\n" * len(record.images) + (turn.text or ""))
            break
    return replace(record, turns=tuple(turns))


def prepare_turns(record: Record, template: Template, check_images: bool = True) -> list[Turn]:
    """Arrange turns for the template, with one placeholder per image.

    LLaVA's rules: a first turn that is not the human's is dropped. In a record with one image, several placeholders in
    one turn become one, which moves to the front of its turn, followed by a newline. In a record with several images
    the only placeholder of a turn moves likewise; several in one turn stay where the author put them.

    In a record without images ``<image>`` is ordinary text, unless it stands where images do (at the start of a human
    turn or on a line of its own): then the ``image`` key was forgotten.

    Args:
        record: a checked record.
        template: template that will render them.
        check_images: refuse a record whose placeholders and images differ in number. LLaVA does not.

    Raises:
        DataError: roles do not alternate, nothing is left, or placeholders and images differ in number.
    """
    with record.errors():
        turns = list(record.turns)
        if template.single_turn:
            turns = [turn for turn in turns if turn.role != "system"]  # neither it nor the question is shown
            if len(turns) != 2:
                raise DataError(
                    f"the {template.name} template takes one question and one answer, not {len(turns)} turns; "
                    "use an instruction template such as v1 for this data"
                )
            turns = [Turn("user", turns[0].text), Turn("assistant", turns[1].text)]
            if IMAGE_PLACEHOLDER not in (turns[0].text or ""):
                raise DataError(
                    f"the {template.name} template needs {IMAGE_PLACEHOLDER} in the first turn; put it there, or use "
                    "an instruction template such as v1 for text"
                )
        elif turns[0].role == "assistant":
            turns = turns[1:]
        if not turns:
            raise DataError("no human turn; the conversation must start with one")
        turns = alternating(turns)
        for turn in turns if check_images else ():
            _refuse_other_tags(turn)
        turns = [_with_placeholders(turn, len(record.images), template) for turn in turns]
        if check_images:
            _check_placeholders(turns, record, template)
    return turns


def _with_placeholders(turn: Turn, num_images: int, template: Template) -> Turn:
    text = turn.text or ""
    count = text.count(IMAGE_PLACEHOLDER)
    if not num_images or not count:
        return turn
    if num_images == 1 or count == 1:
        text = f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()
    before, after = template.image_wrapper
    return replace(turn, text=text.replace(IMAGE_PLACEHOLDER, f"{before}{IMAGE_PLACEHOLDER}{after}"))


def _check_placeholders(turns: Sequence[Turn], record: Record, template: Template) -> None:
    if record.images or template.single_turn:
        found = sum((turn.text or "").count(IMAGE_PLACEHOLDER) for turn in turns)
    else:
        found = sum(_looks_like_an_image(turn) for turn in turns)
    if found != len(record.images):
        raise DataError(
            f"{found} {IMAGE_PLACEHOLDER} placeholder{'s' * (found != 1)} for {len(record.images)} "
            f"image{'s' * (len(record.images) != 1)}; give each image its own placeholder in 'conversations' and its "
            "own file name in 'image'"
            + ("" if found or not record.images else ", or let --image_placeholder first put them in front")
        )


def _refuse_other_tags(turn: Turn) -> None:
    """Refuse tags that begin a user turn or have their own line, unless they are closed as in HTML."""
    text = turn.text or ""
    if turn.role != "user" or "<" not in text:
        return
    for match in _TAG.finditer(text):
        tag, kind = match[0], match[1].lower()
        if tag == IMAGE_PLACEHOLDER:
            continue
        before, after = text[: match.start()], text[match.end() :]
        stands_apart = not before.strip() or not (before.rpartition("\n")[2] + after.partition("\n")[0]).strip()
        closed = f"</{kind}>" in after.lower()
        if (kind == "img" and closed) or (stands_apart and not closed):
            remedy = "take the record out" if kind in ("video", "audio") else f"write {IMAGE_PLACEHOLDER}"
            raise DataError(f"{tag} is not read, only {IMAGE_PLACEHOLDER} is; {remedy}")


def _looks_like_an_image(turn: Turn) -> int:
    text = turn.text or ""
    if turn.role != "user" or IMAGE_PLACEHOLDER not in text:
        return 0
    own_lines = sum(line.strip() == IMAGE_PLACEHOLDER for line in text.split("\n"))
    return max(own_lines, int(text.lstrip().startswith(IMAGE_PLACEHOLDER)))
