"""Errors as messages on the page."""

import html
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from tove_llava.core.errors import ToveError


@contextmanager
def told() -> Iterator[None]:
    """What a user can mend becomes gradio's message, as text and never as HTML."""
    try:
        yield
    except ToveError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error
