"""Generated tokens as text, piece by piece."""

from typing import Any

BROKEN = "\ufffd"  # what decoders write for bytes that are no character, or not yet one


class Pieces:
    """Gives out the text of tokens as they come, never a part of a character.

    A token's text depends on its neighbours (spaces, bytes of one character), so it is what the text of the last few
    tokens grows by. Joined, the pieces are the text of all tokens without white space in front.

    Args:
        tokenizer: special tokens are skipped.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # tokens whose text is given out, as context, and those that follow them
        self._given = 0  # of the window
        self._started = False

    def add(self, token: int) -> str:
        """The text that is now certain; often that of the token, empty within a character."""
        self._window.append(token)
        return self._grown(final=False)

    def end(self) -> str:
        """What is left: a character that was never finished."""
        return self._grown(final=True)

    def _grown(self, final: bool) -> str:
        before = self._text(self._window[: self._given])
        after = self._text(self._window)
        if len(after) <= len(before) or after.endswith(BROKEN) and not final:
            return ""
        self._window, self._given = self._window[self._given :], len(self._window) - self._given
        piece = after[len(before) :] if self._started else after[len(before) :].lstrip()
        self._started = self._started or bool(piece)
        return piece

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
