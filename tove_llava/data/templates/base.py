"""What every conversation template offers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import DataError
from tove_llava.core.registry import Registry

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. ``text`` is None for the open turn that a generation prompt ends with."""

    role: Role
    text: str | None


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the prompt, and whether the model learns to produce it."""

    text: str
    supervised: bool = False


class Template(ABC):
    """Turns a conversation into segments; their texts joined are the prompt.

    Attributes:
        name: the name it is registered under.
        adds_bos: whether the tokenizer's own prefix (LLaMA: BOS) goes in front. False where the text contains it.
        single_turn: whether it takes exactly one question and one answer, whatever their declared roles (``plain``).
        image_wrapper: what stands before and after each image placeholder.
    """

    name: str = ""
    adds_bos: bool = True
    single_turn: bool = False
    image_wrapper: tuple[str, str] = ("", "")

    @abstractmethod
    def render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        """Segments of the prompt.

        Args:
            turns: alternating user and assistant turns, a system turn possibly in front; the last may be open.
            tokenizer: gives the end-of-sequence string, and the chat template where that is used.

        Raises:
            DataError: the conversation does not suit the template.
        """

    def prompt(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
        """The prompt as one string."""
        return "".join(segment.text for segment in self.render(turns, tokenizer))


def split_system(turns: Sequence[Turn], default: str) -> tuple[str, Sequence[Turn]]:
    """The system text (the conversation's own, or ``default``) and the other turns, checked to alternate.

    Raises:
        DataError: two turns of the same role follow one another, or the first is not the user's.
    """
    system = default
    if turns and turns[0].role == "system":
        system, turns = turns[0].text or "", turns[1:]
    for index, turn in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if turn.role != expected:
            raise DataError(f"turn {index + 1} is the {turn.role}'s where the {expected}'s was expected")
        if turn.text is None and index != len(turns) - 1:
            raise DataError(f"turn {index + 1} has no text; only the last turn of a prompt may be open")
    return system, turns


_templates: Registry[Template] = Registry("conversation template", "tove_llava.data.templates")
T = TypeVar("T", bound=type[Template])


def register_template(name: str, *aliases: str) -> Callable[[T], T]:
    """Class decorator that registers a template under its name and aliases."""

    def add(cls: T) -> T:
        cls.name = name
        template = cls()
        for each in (name, *aliases):
            _templates.register(each)(template)
        return cls

    return add


def get_template(name: str) -> Template:
    """The template called exactly ``name``.

    Raises:
        ConfigError: there is none; the message lists the names that exist.
    """
    return _templates.get(name)


def template_names() -> list[str]:
    """All names and aliases, sorted."""
    return _templates.names()
