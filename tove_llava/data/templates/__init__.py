"""Conversation templates: how a list of turns becomes text, and which parts of it the model is trained to say.

Every module of this package registers one template (and its aliases). A template knows its own structure, so the
supervised spans are its own statement; nothing is searched for in the finished prompt.
"""

from tove_llava.data.templates.base import Segment, Template, Turn, get_template, register_template, template_names

__all__ = ["Segment", "Template", "Turn", "get_template", "register_template", "template_names"]
