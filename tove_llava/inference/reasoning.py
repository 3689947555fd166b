"""Take the think block off an answer; scorers and readers see the rest."""

import re
from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"
_BLOCKS = [(re.compile(f"<{tag}>.*?</{tag}>", re.DOTALL), f"</{tag}>") for tag in ("think", "analysis")]


@dataclass(frozen=True)
class Spoken:
    """An answer in two parts.

    Attributes:
        answer: the text after the think block, stripped; empty if the block was never closed.
        reasoning: the block's text, stripped; None without a block.
        closed: False if the block was never closed.
    """

    answer: str
    reasoning: str | None = None
    closed: bool = True


def spoken(text: str) -> Spoken:
    """Split an answer that begins with a think block."""
    text = text.strip()
    if not text.startswith(OPEN):
        return Spoken(text)
    reasoning, close, answer = text.removeprefix(OPEN).partition(CLOSE)
    return Spoken(answer.strip(), reasoning.strip(), bool(close))


def cut_reasoning(text: str) -> str:
    """Cut every think and analysis block off an answer, as lmms-eval does.

    A block that is never opened begins with the text; one that is never closed stays.
    """
    for block, close in _BLOCKS:
        text = block.sub("", text).rpartition(close)[2]
    return text.strip()


@dataclass
class ReasoningFilter:
    """Holds back a think block at the start of a stream; ``whole`` keeps all of the text."""

    whole: str = ""
    _begun: bool = False  # the answer proper has begun

    def pass_on(self, piece: str, final: bool = False) -> str:
        """Return the part of a piece that belongs to the answer."""
        self.whole += piece
        if self._begun:
            return piece
        text = self.whole.lstrip()
        if OPEN.startswith(text[: len(OPEN)]) and not (final and len(text) < len(OPEN)):
            answer = text.partition(CLOSE)[2].lstrip()
        else:
            answer = text
        self._begun = bool(answer)
        return answer
