"""What this machine has, what is missing, and what can run on it: the parts of ``tove-llava doctor``."""

from tove_llava.doctor.finding import Finding

__all__ = ["Finding"]
