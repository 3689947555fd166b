"""``llava_v1``: LLaVA's variant of ``v1`` in wording."""

from tove_llava.data.templates.base import register_template
from tove_llava.data.templates.v1 import V1


@register_template("llava_v1")
class LlavaV1(V1):
    """As ``v1``, about a *human* rather than a *user*."""

    system = (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    )
