"""Readers of data files; each registers itself in its own file."""

from tove_llava.data.readers.base import READERS, Reader, open_reader

__all__ = ["READERS", "Reader", "open_reader"]
