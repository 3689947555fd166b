"""Import nothing that a plain GPU image lacks: a pytest plugin, and a check for a subprocess."""

import sys

# A plain image has torch, timm, peft and accelerate; these come only with wheels.
ABSENT = ("bitsandbytes", "deepspeed", "gguf", "gradio", "gradio_client", "kornia", "liger_kernel", "open_clip")

for _name in ABSENT:
    sys.modules[_name] = None  # type: ignore[assignment]
