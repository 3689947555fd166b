"""The machine: Python, devices, memory, disk, and programs that some features need."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tove_llava.core.text import GIB
from tove_llava.core.version import __version__
from tove_llava.doctor.finding import Finding

# Names that Chromium or Chrome is installed under.
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Machine:
    """The resources that a run can use.

    Attributes:
        devices: number of GPUs.
        device_bytes: free memory of the GPU with the least, or 0.
        host_bytes: memory that processes may still take, within the container's limit.
        disk_bytes: free space in the working directory.
        cores: cores that this process may run on.
        tf32: the GPUs compute in TF32 and bfloat16 (compute capability 8.0).
    """

    devices: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    cores: int
    tf32: bool


def this_machine() -> Machine:
    """Read the resources of this machine; needs torch."""
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(
        devices=devices,
        device_bytes=min((torch.cuda.mem_get_info(index)[0] for index in range(devices)), default=0),
        host_bytes=available_memory(),
        disk_bytes=shutil.disk_usage(Path.cwd()).free,
        cores=core_count(),
        tf32=all(torch.cuda.get_device_capability(index) >= (8, 0) for index in range(devices)) and devices > 0,
    )


def core_count() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory(root: Path = Path("/")) -> int:
    """Count the bytes that processes may take, within the cgroup's limit.

    Args:
        root: folder of ``proc`` and ``sys``.
    """
    lines = (root / "proc" / "meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = root / "sys" / "fs" / "cgroup"
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        # Cached files count as used, but are dropped when memory is needed.
        cached = int(dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"])
    except (OSError, KeyError, ValueError):
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - int(used) + cached))


def system() -> list[Finding]:
    """Report the versions of this package and of Python, and the platform."""
    remedy = "" if sys.version_info >= (3, 10) else "install Python 3.10 or newer"
    package = Path(__file__).resolve().parents[1]
    return [
        Finding("system", "tove-llava", f"{__version__} in {package}"),
        Finding("system", "Python", f"{platform.python_version()} in {sys.prefix}", remedy, required=True),
        Finding("system", "platform", f"{platform.platform()}, {core_count()} cores"),
    ]


def devices() -> list[Finding]:
    """Report processors, GPUs, free memory and free disk."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    findings = [Finding("devices", "CPU", f"{torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use fp16"
            free = torch.cuda.mem_get_info(index)[0]
            size = f"{free / GIB:.0f} of {properties.total_memory / GIB:.0f} GiB free"
            text = f"{properties.name}, {size}, CUDA {torch.version.cuda}, {bf16}"
            findings.append(Finding("devices", f"cuda:{index}", text, details={"free_bytes": free}))
    elif torch.backends.mps.is_available():
        findings.append(Finding("devices", "mps", "available"))
    else:
        findings.append(Finding("devices", "GPU", "none; presets tiny and small run on the CPU"))
    memory, disk = available_memory(), shutil.disk_usage(Path.cwd()).free
    return [
        *findings,
        Finding("devices", "memory", f"{memory / GIB:.1f} GiB free", details={"free_bytes": memory}),
        Finding("devices", "disk", f"{disk / GIB:.1f} GiB free in {Path.cwd()}", details={"free_bytes": disk}),
    ]


def programs() -> list[Finding]:
    """Report Java and Chromium."""
    return [_java(), _chromium()]


def _java() -> Finding:
    use = "for caption metrics (COCO Caption, NoCaps)"
    java = shutil.which("java")
    if java is None:
        return Finding("programs", "java", f"not found; {use}", "apt-get install default-jre-headless")
    # java prints its version to stderr
    done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60)
    lines = (done.stderr or done.stdout).strip().splitlines()
    if done.returncode or not lines:
        return Finding("programs", "java", f"{java} does not run; {use}", "apt-get install default-jre-headless")
    return Finding("programs", "java", f"{lines[0]}; {use}")


def _chromium() -> Finding:
    use = "for the browser tests of the demo"
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        return Finding("programs", "chromium", f"not found; {use}", "apt-get install chromium")
    if importlib.util.find_spec("playwright") is None:
        return Finding("programs", "chromium", f"{found}, but no playwright; {use}", "pip install playwright")
    return Finding("programs", "chromium", f"{found}; {use}")
