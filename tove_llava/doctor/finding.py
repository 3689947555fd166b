"""One line of the doctor's report."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """What was found, and what to do about it.

    Attributes:
        group: heading that it stands under.
        name: what was looked at.
        state: what was found.
        remedy: what to do; empty when all is well.
        required: whether a remedy that is needed makes the command fail.
        details: figures for programs that read the report.
    """

    group: str
    name: str
    state: str
    remedy: str = ""
    required: bool = False
    details: dict[str, Any] = field(default_factory=dict)
