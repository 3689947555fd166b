"""``v1_mmtag``: ``v1`` with tags around each image."""

from tove_llava.data.templates.base import register_template
from tove_llava.data.templates.v1 import V1


@register_template("v1_mmtag")
class V1MmTag(V1):
    """As ``v1``, with another system text and ``<Image>`` tags."""

    # The missing space after "language." is LLaVA's.
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant is able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
        "The visual content will be provided with the following format: <Image>visual content</Image>."
    )
    image_wrapper = ("<Image>", "</Image>")
