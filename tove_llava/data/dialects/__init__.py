"""Dialects of records; each registers itself in its own file."""

from tove_llava.data.dialects.base import DIALECTS, Content, Image, read_content, unread_keys

__all__ = ["DIALECTS", "Content", "Image", "read_content", "unread_keys"]
