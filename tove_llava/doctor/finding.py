"""One line of the doctor's report."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """A fact about this machine, and a remedy where something is wrong.

    Attributes:
        group: its heading.
        name: the thing that was checked.
        remedy: what to do; empty when all is well.
        required: a remedy makes the command fail.
        details: figures for programs that read the report.
    """

    group: str
    name: str
    state: str
    remedy: str = ""
    required: bool = False
    details: dict[str, Any] = field(default_factory=dict)
