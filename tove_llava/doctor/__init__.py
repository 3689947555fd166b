"""The checks of ``tove-llava doctor``: what this machine has, what is missing, and what can run on it."""

from tove_llava.doctor.finding import Finding

__all__ = ["Finding"]
