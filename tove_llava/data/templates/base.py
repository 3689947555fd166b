"""The contract of a conversation template, and the registry of all."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import DataError
from tove_llava.core.registry import Registry
from tove_llava.core.text import short

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}  # type: ignore[dict-item]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; ``text`` is None for the turn to be generated."""

    role: Role
    text: str | None


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the prompt; the model learns it if ``supervised``."""

    text: str
    supervised: bool = False


class Template(ABC):
    """Turns a conversation into segments; their joined texts are the prompt.

    Attributes:
        name: its registered name.
        adds_bos: put the tokenizer's own prefix (LLaMA: BOS) in front. False where the text contains it.
        single_turn: take exactly one question and one answer, whatever their declared roles (``plain``).
        image_wrapper: text before and after each image placeholder.
    """

    name: str = ""
    adds_bos: bool = True
    single_turn: bool = False
    image_wrapper: tuple[str, str] = ("", "")

    @abstractmethod
    def render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        """Render a conversation.

        Args:
            turns: alternating user and assistant turns, a system turn possibly in front; the last may be open.
            tokenizer: gives the end-of-sequence string, and the chat template where that is used.

        Raises:
            DataError: the conversation does not suit the template.
        """

    def prepare(self, tokenizer: PreTrainedTokenizerBase, reasoning: str | None, date: str | None) -> None:  # noqa: B027
        """Make a language model's tokenizer fit for the template, with the preset's options for chat templates."""

    def check(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return a sentence about the template with this tokenizer, if there is something to say.

        Raises:
            ConfigError: conversations cannot be trained with the two.
        """
        return ""

    def end_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """List the tokens at which an answer ends."""
        return [tokenizer.eos_token] if tokenizer.eos_token else []

    def prompt(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
        """Render a conversation as one string."""
        return "".join(segment.text for segment in self.render(turns, tokenizer))


def conversation(messages: Iterable[tuple[Any, str | None]]) -> list[Turn]:
    """Make turns of role names and texts, as records, chats and requests give them.

    Raises:
        DataError: an unknown role, or as :func:`alternating`.
    """
    return alternating([Turn(role_of(name, f"message {n}"), text) for n, (name, text) in enumerate(messages, start=1)])


def role_of(name: Any, where: str) -> Role:
    """Return the role that a name means; DataError for a tool's and unknown names."""
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(
            f"{where} is from {short(name)}; a role is 'user' (or 'human'), 'assistant' (or 'gpt'), or 'system' (or "
            "'developer')"
        )
    return role


def alternating(turns: Sequence[Turn]) -> list[Turn]:
    """Join system turns at the front by an empty line; check that user and assistant take turns.

    Raises:
        DataError: two turns of the same role follow one another, or the first is not the user's.
    """
    count = next((n for n, turn in enumerate(turns) if turn.role != "system"), len(turns))
    front = [replace(turns[0], text="\n\n".join(turn.text or "" for turn in turns[:count]))] if count else []
    for index, turn in enumerate(turns[count:]):
        expected = "assistant" if index % 2 else "user"
        if turn.role != expected:
            raise DataError(f"turn {count + index + 1} is the {turn.role}'s where the {expected}'s was expected")
        if turn.text is None and index != len(turns) - count - 1:
            raise DataError(f"turn {count + index + 1} has no text; only the last turn of a prompt may be open")
    return [*front, *turns[count:]]


def split_system(turns: Sequence[Turn], default: str) -> tuple[str, Sequence[Turn]]:
    """Return the system text, or ``default``, and the other turns; DataError as :func:`alternating`."""
    turns = alternating(turns)
    if turns and turns[0].role == "system":
        return turns[0].text or "", turns[1:]
    return default, turns


TEMPLATES: Registry[Template] = Registry("conversation template", "tove_llava.data.templates")
T = TypeVar("T", bound=type[Template])


def register_template(name: str, *aliases: str) -> Callable[[T], T]:
    """Return a class decorator that registers a conversation template.

    Args:
        name: what ``template`` says in a stage of a preset.
        aliases: further names.

    Raises:
        ConfigError: another template has one of the names.

    Example:
        >>> from tove_llava.data import Turn, get_template
        >>> from tove_llava.data.templates import Segment, Template
        >>> @tove_llava.register_template("bare_lines")
        ... class BareLines(Template):
        ...     def render(self, turns, tokenizer):
        ...         return [Segment(f"{turn.text or ''}\\n", turn.role == "assistant") for turn in turns]
        >>> get_template("bare_lines").prompt([Turn("user", "How many?"), Turn("assistant", "Two.")], None)
        'How many?\\nTwo.\\n'
    """

    def add(cls: T) -> T:
        cls.name = name
        template = cls()
        for each in (name, *aliases):
            TEMPLATES.register(each)(template)
        return cls

    return add


def get_template(name: str | Template) -> Template:
    """Return a template by exact name; a template is returned as is."""
    return name if isinstance(name, Template) else TEMPLATES.get(name)


def template_names() -> list[str]:
    """List all names and aliases, sorted."""
    return TEMPLATES.names()
