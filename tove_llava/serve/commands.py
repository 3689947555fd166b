"""The commands of the chat in a terminal: one small function each, found by its name."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from tove_llava.core.errors import ConfigError, DataError, ToveError
from tove_llava.core.registry import Registry
from tove_llava.inference.engine import Engine, Message, Reply, Sampling


@dataclass
class Talk:
    """A conversation and its settings.

    Attributes:
        attached: experts that read the pictures; all by default.
        pictures: files that go with the next question.
    """

    engine: Engine
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    attached: Collection[str] | None = None
    history: list[Message] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        wanted = self.engine.experts if self.attached is None else self.attached
        self.attached = ordered(self.engine, wanted)

    def ask(self, text: str) -> Reply:
        """Ask a question with the pictures that were added; errors as in :meth:`Engine.ask`."""
        messages = [*self.history, Message("user", text, tuple(self.pictures))]
        return self.engine.ask(messages, self.sampling, system=self.system, experts=self.attached)

    def said(self, text: str, answer: str) -> None:
        """Keep a question and its answer."""
        self.history += [Message("user", text, tuple(self.pictures)), Message("assistant", answer)]
        self.pictures = []


Command = Callable[[Talk, str], str]  # the talk and what stands behind the command -> what to print

COMMANDS: Registry[Command] = Registry("command")


def run_command(talk: Talk, line: str) -> str:
    """Carries out a line that begins with ``/``; returns what to print.

    Raises:
        ToveError: no such command, or it cannot be done; the talk is as it was.
    """
    name, _, rest = line.partition(" ")
    try:
        command = COMMANDS.get(name)
    except ConfigError as error:
        raise ConfigError(f"{error}. /help explains them") from error
    return command(talk, rest.strip())


def ordered(engine: Engine, names: Collection[str]) -> tuple[str, ...]:
    """Experts in the order of the gate's columns.

    Raises:
        ConfigError: the model has none of that name.
    """
    unknown = sorted(set(names) - set(engine.experts))
    if unknown:
        known = ", ".join(engine.experts) or "none: its vision tower is CLIP alone"
        raise ConfigError(f"unknown expert(s) {', '.join(unknown)}; this model has: {known}")
    return tuple(name for name in engine.experts if name in set(names))


@COMMANDS.register("/image")
def image(talk: Talk, rest: str) -> str:
    """/image FILE: add a picture to the next question"""
    if not rest:
        raise DataError("/image needs a file: /image photo.jpg")
    talk.engine.answerer.pixels(rest, upright=True)  # what cannot be read shows now
    talk.pictures.append(rest)
    return f"{len(talk.pictures)} picture(s) for the next question"


@COMMANDS.register("/detach")
def detach(talk: Talk, rest: str) -> str:
    """/detach NAME: read pictures without this expert from now on"""
    out = ordered(talk.engine, _names(rest, "/detach"))
    talk.attached = [name for name in talk.attached or () if name not in out]
    return experts(talk, "")


@COMMANDS.register("/attach")
def attach(talk: Talk, rest: str) -> str:
    """/attach NAME: read pictures with this expert again"""
    talk.attached = ordered(talk.engine, [*(talk.attached or ()), *_names(rest, "/attach")])
    return experts(talk, "")


@COMMANDS.register("/experts")
def experts(talk: Talk, rest: str) -> str:
    """/experts: which experts are attached"""
    if not talk.engine.experts:
        return "this model's vision tower is CLIP alone"
    shown = (f"{name} ({'attached' if name in (talk.attached or ()) else 'detached'})" for name in talk.engine.experts)
    return ", ".join(shown)


@COMMANDS.register("/routing")
def routing(talk: Talk, rest: str) -> str:
    """/routing OUT.png: draw which expert each part of the last picture listens to"""
    file = Path(rest)
    if file.suffix.lower() != ".png":
        raise DataError("/routing needs a file to write: /routing out.png")
    if file.exists():
        raise DataError(f"{file} exists; name another file")
    seen = [*(picture for message in talk.history for picture in message.images), *talk.pictures]
    if not seen:
        raise DataError("there is no picture yet; add one: /image photo.jpg")
    found = talk.engine.routing_map(seen[-1], talk.attached)
    if found is None:
        raise ToveError("nothing is routed: no expert is attached, or the model has no gate")
    from tove_llava.analysis.plots import plot_routing_argmax
    from tove_llava.analysis.routing_maps import seen_image

    answerer = talk.engine.answerer
    picture = seen_image(answerer.pixels(seen[-1], upright=True), answerer.tower.config)
    plot_routing_argmax(picture, found.argmax.numpy(), found.chosen, file)
    return "\n".join([*(f"{name} {mean:.3f}" for name, mean in found.means.items()), f"written: {file}"])


@COMMANDS.register("/system")
def system(talk: Talk, rest: str) -> str:
    """/system TEXT: another system prompt from now on; without a text, the model's own again"""
    talk.system = rest or None
    return "the model's own system prompt" if talk.system is None else "system prompt set"


@COMMANDS.register("/reset")
def reset(talk: Talk, rest: str) -> str:
    """/reset: start over, without what was said and the pictures"""
    talk.history, talk.pictures = [], []
    return "a new conversation"


COMMANDS.register("/new")(reset)


@COMMANDS.register("/help")
def help_(talk: Talk, rest: str) -> str:
    """/help: this list"""
    lines = dict.fromkeys(COMMANDS.get(name).__doc__ or name for name in COMMANDS)
    return "\n".join([*lines, "Ctrl-C stops an answer; an empty line or Ctrl-D ends."])


def _names(rest: str, command: str) -> list[str]:
    names = rest.replace(",", " ").split()
    if not names:
        raise DataError(f"{command} needs an expert's name; /experts lists them")
    return names
