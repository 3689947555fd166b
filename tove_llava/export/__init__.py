"""Export: a trained model as a folder that needs nothing of this package.

A format is one file of this package with one registered :class:`ExportFormat`. :func:`export_model` loads a checkpoint
with its adapters merged, lets the format write beside the target, and puts the finished folder in place in one step:
the target is either complete or not there.
"""

from tove_llava.export.base import FORMATS, ExportFormat, ExportSource, format_names, register_format
from tove_llava.export.run import export_model

__all__ = ["FORMATS", "ExportFormat", "ExportSource", "export_model", "format_names", "register_format"]
