"""The answer that a visitor waits for, and errors as messages."""

import html
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from tove_llava.core.errors import ToveError
from tove_llava.inference.engine import Reply


@contextmanager
def shown_errors() -> Iterator[None]:
    """Turn errors that users can mend into gradio's messages, as text."""
    try:
        yield
    except ToveError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


class Running:
    """The running answer of one visitor.

    Every answer gets a number; the rest of an older one is not shown. ``stopped``: the visitor has ended the answer.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._number = 0
        self._reply: Reply | None = None

    def begin(self) -> int:
        """End the previous answer and return the number of a new one."""
        self.leave()
        self.stopped = False
        return self._number

    def take(self, number: int, reply: Reply) -> None:
        """Keep an answer's reply; cancel it if the visitor was faster."""
        self._reply = reply
        if self.stopped or not self.is_current(number):
            reply.cancel()

    def is_current(self, number: int) -> bool:
        """Tell if the page still shows this answer."""
        return number == self._number

    def stop(self) -> None:
        """End the answer; its text so far stays on the page."""
        self.stopped = True
        if self._reply is not None:
            self._reply.cancel()
            self._reply = None

    def leave(self) -> None:
        """End the answer and show nothing more of it."""
        self._number += 1
        self.stop()
