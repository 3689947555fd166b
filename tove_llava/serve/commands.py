"""The terminal chat's commands: small functions, found by name."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from tove_llava.core.errors import ConfigError, DataError, ToveError
from tove_llava.core.registry import Registry
from tove_llava.inference.engine import Engine, Message, Reply, Sampling

KEPT = 32  # images that are kept as the model reads them


@dataclass
class Conversation:
    """A conversation and its settings.

    Attributes:
        attached: experts that read the images; all by default.
        images: files that go with the next question.
    """

    engine: Engine
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    attached: Collection[str] | None = None
    history: list[Message] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.attached = self.engine.choose(self.attached)
        self.read = lru_cache(KEPT)(self.engine.pixels)

    def ask(self, text: str) -> Reply:
        """Ask a question with the added images; errors as in :meth:`Engine.ask`."""
        messages = [*self.history, Message("user", text, tuple(self.images))]
        read = [replace(each, images=[self.read(image) for image in each.images]) for each in messages]
        return self.engine.ask(read, self.sampling, system=self.system, experts=self.attached)

    def keep(self, text: str, answer: str) -> None:
        """Add a question and its answer to the history."""
        self.history += [Message("user", text, tuple(self.images)), Message("assistant", answer)]
        self.images = []


Command = Callable[[Conversation, str], str]  # conversation, rest of the line -> text to print

COMMANDS: Registry[Command] = Registry("command")


def run_command(chat: Conversation, line: str) -> str:
    """Carry out a line that begins with ``/``; return text to print.

    Raises:
        ToveError: no such command, or it cannot be done; the conversation is as it was.
    """
    name, _, rest = line.partition(" ")
    try:
        command = COMMANDS.get(name)
    except ConfigError as error:
        raise ConfigError(f"{error}. /help explains them") from error
    return command(chat, rest.strip())


@COMMANDS.register("/image")
def image(chat: Conversation, rest: str) -> str:
    """/image FILE: add an image to the next question"""
    if not rest:
        raise DataError("/image needs a file: /image photo.jpg")
    chat.read(rest)  # reports a file that cannot be read now
    chat.images.append(rest)
    return f"{len(chat.images)} image(s) for the next question"


@COMMANDS.register("/detach")
def detach(chat: Conversation, rest: str) -> str:
    """/detach NAME: read images without this expert"""
    out = chat.engine.choose(_names(rest, "/detach"))
    chat.attached = [name for name in chat.attached or () if name not in out]
    return experts(chat, "")


@COMMANDS.register("/attach")
def attach(chat: Conversation, rest: str) -> str:
    """/attach NAME: read images with this expert again"""
    chat.attached = chat.engine.choose([*(chat.attached or ()), *_names(rest, "/attach")])
    return experts(chat, "")


@COMMANDS.register("/experts")
def experts(chat: Conversation, rest: str) -> str:
    """/experts: which experts are attached"""
    if not chat.engine.experts:
        return "this model's vision tower is only CLIP"
    shown = (f"{name} ({'attached' if name in (chat.attached or ()) else 'detached'})" for name in chat.engine.experts)
    return ", ".join(shown)


@COMMANDS.register("/routing")
def routing(chat: Conversation, rest: str) -> str:
    """/routing OUT.png: draw where the last image listens to which expert"""
    file = Path(rest)
    if file.suffix.lower() != ".png":
        raise DataError("/routing needs a file to write: /routing out.png")
    if file.exists():
        raise DataError(f"{file} exists; name another file")
    seen = [*(image for message in chat.history for image in message.images), *chat.images]
    if not seen:
        raise DataError("there is no image yet; add one: /image photo.jpg")
    pixels = chat.read(seen[-1])
    found = chat.engine.routing(pixels, chat.attached)
    if found is None:
        raise ToveError("nothing is routed: no expert is attached, or the model has no gate")
    from tove_llava.analysis.plots import plot_routing_argmax
    from tove_llava.analysis.routing_maps import seen_image

    shown = seen_image(pixels, chat.engine.answerer.tower.config)
    plot_routing_argmax(shown, found.argmax.numpy(), found.chosen, file)
    return "\n".join([*(f"{name} {mean:.3f}" for name, mean in found.means.items()), f"written: {file}"])


@COMMANDS.register("/system")
def system(chat: Conversation, rest: str) -> str:
    """/system TEXT: use another system prompt; without a text, the model's own"""
    chat.system = rest or None
    return "the model's own system prompt" if chat.system is None else "system prompt set"


@COMMANDS.register("/reset")
def reset(chat: Conversation, rest: str) -> str:
    """/reset: start over, without history and images"""
    chat.history, chat.images = [], []
    return "a new conversation"


COMMANDS.register("/new")(reset)


@COMMANDS.register("/help")
def help_(chat: Conversation, rest: str) -> str:
    """/help: this list"""
    lines = dict.fromkeys(COMMANDS.get(name).__doc__ or name for name in COMMANDS)
    return "\n".join([*lines, "Ctrl-C stops an answer; an empty line or Ctrl-D ends."])


def _names(rest: str, command: str) -> list[str]:
    names = rest.replace(",", " ").split()
    if not names:
        raise DataError(f"{command} needs an expert's name; /experts lists them")
    return names
