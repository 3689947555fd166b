"""Conversation templates: turns as text, and what the model learns of it.

Every module registers templates (and their aliases). A template knows its own structure, so it states the supervised
spans; nothing is searched for in the finished prompt.
"""

from tove_llava.data.templates.base import (
    Segment,
    Template,
    Turn,
    conversation,
    get_template,
    register_template,
    template_names,
)

__all__ = ["Segment", "Template", "Turn", "conversation", "get_template", "register_template", "template_names"]
