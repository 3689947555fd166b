"""Imported by :mod:`docs_server` before it forks: the libraries, and what they only do at their first use."""

import importlib

for module in (
    "transformers.models.llava.modeling_llava",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "peft",
    "torch.utils.tensorboard",
    "tove_llava.train.run",
    "tove_llava.inference.engine",
    "tove_llava.analysis.plots",
):
    importlib.import_module(module)

from tove_llava import build_model  # noqa: E402

build_model("tiny")
