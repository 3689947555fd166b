"""Check that a public data set's parts exist and downloads are intact."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tove_llava.core.errors import ConfigError
from tove_llava.data.sets import DataSet, Part

_DEPTH = 4  # folders below the root that are searched for a misplaced part
_BLOCK = 1 << 22  # bytes


@dataclass(frozen=True)
class Finding:
    """A fault of a data set.

    Attributes:
        kind: "missing", "misplaced", "download", "file", "ground truth", "record", "picture" or "count".
        message: the file, record or question, and what to do.
    """

    kind: str
    message: str


def present(data_set: DataSet, root: Path) -> list[bool]:
    """Tell for each part if it exists; nothing is read."""
    return [part.found(root) is not None for part in data_set.parts]


def check_parts(data_set: DataSet, root: Path) -> list[Finding]:
    """Find missing and misplaced parts, and downloads that differ from the publisher's."""
    if not root.is_dir():
        raise ConfigError(f"there is no data folder {root}; give --data-root, or make it ({data_set.root} in LLaVA)")
    findings = []
    for part in data_set.parts:
        found = part.found(root)
        if found is None:
            findings.append(_missing(part, root))
        download = _download(part, root, found)
        damage = "" if download is None else _damage(part, download)
        if damage:
            findings.append(Finding("download", damage))
    return findings


def _missing(part: Part, root: Path) -> Finding:
    archive = next(_archives(part, root), None)
    path = root / part.path
    if archive is not None:
        return Finding("missing", f"{path} is not there, but {archive} is: unpack it")
    elsewhere = _elsewhere(part, root)
    if elsewhere is not None:
        return Finding("misplaced", f"{path} is not there, but {elsewhere} is: move or link it, or change --data-root")
    empty = " (the folder is empty)" if path.is_dir() else ""
    source = f"{part.archive} from {part.url}" if part.archive else part.url
    how = "; ".join(text for text in (f"get {source}" if source else "", part.note) if text)
    return Finding("missing", f"{path} is not there{empty}: {how}")


def _archives(part: Part, root: Path) -> Iterator[Path]:
    """Find the part's archive in its folder or one above, inside root."""
    if not part.archive:
        return
    folder = root / part.path
    while folder != root:
        folder = folder.parent
        if (folder / part.archive).is_file():
            yield folder / part.archive


def _elsewhere(part: Part, root: Path) -> Path | None:
    """Find the part in another folder."""
    for above in (root.parent, root.parent.parent):
        if part.is_at(above / part.path):
            return above / part.path
    inside = Path(*Path(part.path).parts[1:])  # the root may be the set's own folder
    if inside.parts and part.is_at(root / inside):
        return root / inside
    wanted = Path(part.path).name
    # Names such as "images" and "test.jsonl" say nothing by themselves.
    if len(Path(wanted).stem) < 10 and not any(character.isdigit() for character in wanted):
        return None
    for folder, folders, files in os.walk(root):
        if wanted in (folders if part.is_folder else files) and part.is_at(Path(folder) / wanted):
            return Path(folder) / wanted
        if len(Path(folder).relative_to(root).parts) >= _DEPTH:
            folders.clear()
    return None


def _download(part: Part, root: Path, found: Path | None) -> Path | None:
    """Find the file that the part's size and digest describe."""
    if part.archive:
        return next(_archives(part, root), None)
    return None if part.is_folder else found


def _damage(part: Part, file: Path) -> str:
    """Describe a download's difference from the publisher's; empty if there is none."""
    size = file.stat().st_size
    if part.bytes is not None and size != part.bytes:
        return f"{file} has {size:,} bytes instead of {part.bytes:,}: download it again, {part.url}"
    if not part.digest:
        return ""
    algorithm, expected = part.digest.split(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() == expected:
        return ""
    return (
        f"{file} has the {algorithm} checksum {digest.hexdigest()} instead of {expected}: it is damaged or another "
        f"release; download it again, {part.url}"
    )
