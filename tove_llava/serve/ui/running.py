"""The answer that a visitor waits for, so that another of the page's listeners can end it."""

from tove_llava.inference.engine import Reply


class Running:
    """One for each visitor. Every answer gets a number; what an older one still has to say is left unsaid.

    Attributes:
        stopped: whether the visitor has ended the answer.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._number = 0
        self._reply: Reply | None = None

    def begin(self) -> int:
        """A new answer's number."""
        self.leave()
        self.stopped = False
        return self._number

    def take(self, number: int, reply: Reply) -> None:
        """The reply of an answer. Where the visitor was faster, it ends at once."""
        self._reply = reply
        if self.stopped or not self.is_current(number):
            reply.cancel()

    def is_current(self, number: int) -> bool:
        """Whether the page still shows this answer."""
        return number == self._number

    def stop(self) -> None:
        """Ends the answer; its text so far stays on the page."""
        self.stopped = True
        if self._reply is not None:
            self._reply.cancel()
            self._reply = None

    def leave(self) -> None:
        """Ends the answer; nothing of it is shown any more."""
        self._number += 1
        self.stop()
