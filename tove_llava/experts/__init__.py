"""Vision experts: one file each, one contract, run together by the hub."""

from tove_llava.experts.base import EXPERTS, Expert, register_expert
from tove_llava.experts.expert_hub import ExpertHub, HubOutput
from tove_llava.experts.from_spec import build_expert, complete_specs
from tove_llava.experts.spec import ExpertSpec

__all__ = [
    "EXPERTS",
    "Expert",
    "ExpertHub",
    "ExpertSpec",
    "HubOutput",
    "build_expert",
    "complete_specs",
    "register_expert",
]
