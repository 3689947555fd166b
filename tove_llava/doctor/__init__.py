"""The checks of ``tove-llava doctor``."""

from tove_llava.doctor.finding import Finding

__all__ = ["Finding"]
