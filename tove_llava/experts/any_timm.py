"""Any model of timm, by its name."""

from tove_llava.experts.base import register_expert
from tove_llava.experts.timm_expert import TimmExpert


@register_expert("timm")
class AnyTimm(TimmExpert):
    """The expert of entries whose source is timm's and whose name is no registered expert's."""

    default_source = "timm:convnext_tiny.in12k_ft_in1k"
