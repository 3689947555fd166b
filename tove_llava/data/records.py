"""Read and check LLaVA's data format, with messages that name the record."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.files import parse_json, parse_json_lines, read_text
from tove_llava.data.templates.base import Role, Template, Turn, split_system
from tove_llava.data.tokenizer import IMAGE_PLACEHOLDER

_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Record:
    """One checked record.

    Attributes:
        id: its ``id``, or an empty string.
        images: file names relative to the image folder, in the order of the placeholders.
        turns: all turns as written, until :func:`prepare_turns`.
        index: position in the file, counted from 0.
        file: its file, for messages.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    index: int = 0
    file: str = ""

    @property
    def where(self) -> str:
        return record_name(self.file, self.index, self.id)

    @property
    def modality_length(self) -> int:
        """Count all turns' words, negated without images, as LLaVA's grouped sampling does."""
        words = sum(len((turn.text or "").split()) for turn in self.turns)
        return words if self.images else -words

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


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read raw records of JSON (one list) or JSONL (object per line).

    Raises:
        DataError: the file is missing, empty, or not JSON; the message names the line.
    """
    hint = "--data_path must be one JSON list, or one JSON object a line (.jsonl)"
    text = read_text(path, hint=hint)
    if text.lstrip().startswith("["):
        records = parse_json(text, path, hint=hint)
    else:
        records = [record for _, record in parse_json_lines(text, path, hint=hint)]
    if not records:
        raise DataError(f"{path} holds no records")
    return records


def parse_record(raw: Any, index: int = 0, file: str = "") -> Record:
    """Check one raw record; raise DataError for a missing or wrong part.

    Args:
        raw: ``{"id", "image" (a name, a list of names, or absent), "conversations": [{"from", "value"}]}``.
        index, file: see :class:`Record`.
    """
    record_id = str(raw.get("id", "")) if isinstance(raw, dict) else ""
    where = record_name(file, index, record_id)
    if not isinstance(raw, dict):
        raise DataError(f"{where} is a {type(raw).__name__}; a record must be an object with 'conversations'")
    if "conversations" not in raw:
        raise DataError(f"{where} has no 'conversations' (keys: {', '.join(map(str, raw)) or 'none'})")
    conversations = raw["conversations"]
    if not isinstance(conversations, list) or not conversations:
        raise DataError(
            f"{where}: 'conversations' must be a list of at least one turn; add the turns or delete the record"
        )
    turns = []
    for number, message in enumerate(conversations, start=1):
        if not isinstance(message, dict) or "from" not in message or "value" not in message:
            raise DataError(f"{where}: turn {number} must be an object with 'from' and 'value', not {_short(message)}")
        role = message["from"]
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"{where}: turn {number} is from {_short(role)}; 'from' must be 'human' or 'gpt'")
        if not isinstance(message["value"], str):
            raise DataError(f"{where}: the value of turn {number} must be a string, not {_short(message['value'])}")
        if not _has_encoding(message["value"]):
            raise DataError(f"{where}: the value of turn {number} holds half of a surrogate pair; repair its encoding")
        turns.append(Turn(_ROLES[role], message["value"]))
    images = raw.get("image")
    if images is None:
        images = []
    elif isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(_is_file_name(name) for name in images):
        raise DataError(f"{where}: 'image' must be a file name or a list of file names, not {_short(raw['image'])}")
    return Record(record_id, tuple(images), tuple(turns), index, file)


def _has_encoding(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value and _has_encoding(value)


def load_records(path: str | Path) -> list[Record]:
    """Read and check a whole file; the first fault raises :class:`DataError`."""
    return [parse_record(raw, index, str(path)) for index, raw in enumerate(read_records(path))]


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
        elif turns[0].role != "user":
            turns = turns[1:]
        if not turns:
            raise DataError("no human turn; the conversation must start with one")
        split_system(turns, "")
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
        )


def _looks_like_an_image(turn: Turn) -> int:
    text = turn.text or ""
    if turn.role != "user" or IMAGE_PLACEHOLDER not in text:
        return 0
    own_lines = sum(line.strip() == IMAGE_PLACEHOLDER for line in text.split("\n"))
    return max(own_lines, int(text.lstrip().startswith(IMAGE_PLACEHOLDER)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
