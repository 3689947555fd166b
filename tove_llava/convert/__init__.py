"""Conversion: LLaVA-1.5 checkpoints of other codebases into this package's, and back.

A format is one file of :mod:`tove_llava.convert.formats` with one registered :class:`LlavaFormat`. Reading gives
:class:`~tove_llava.convert.parts.LlavaParts`, in no format's terms, with tensors that stay on the disk until they are
used; writing takes them. :func:`convert_checkpoint` puts a finished folder in place in one step.
"""

from tove_llava.convert.base import FORMATS, LlavaFormat, Request, find_format, foreign_format, register_format
from tove_llava.convert.parts import LlavaParts
from tove_llava.convert.run import convert_checkpoint, open_llava

__all__ = [
    "FORMATS",
    "LlavaFormat",
    "LlavaParts",
    "Request",
    "convert_checkpoint",
    "find_format",
    "foreign_format",
    "open_llava",
    "register_format",
]
