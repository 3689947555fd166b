"""The weights that ship inside the package."""

from pathlib import Path

from tove_llava.core.json_text import JsonError, loads
from tove_llava.core.sources import BundledSource
from tove_llava.doctor.finding import Finding


def bundled_weights(root: Path | None = None) -> list[Finding]:
    """Check that the weights inside the package are whole.

    The header of every safetensors file must agree with the file's size: a truncated file, or a pointer of Git LFS,
    does not.
    """
    root = BundledSource.root if root is None else root
    parts = sorted(path for path in root.glob("*") if path.is_dir() and not path.name.startswith("_"))
    findings = []
    if not parts:
        remedy = "git checkout -- tove_llava/bundled"
        findings.append(Finding("bundled weights", "all", f"none in {root}", remedy, required=True))
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
    """Describe the fault of a safetensors file; empty where it is whole."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > size - 8:
            return "not a safetensors file, or cut off in its header"
        try:
            header = loads(handle.read(length))
        except JsonError:
            return "not a safetensors file"
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return "" if 8 + length + end == size else f"{size} bytes where its header says {8 + length + end}"
