"""Take fingerprints of files, to notice that a file has changed."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

Fingerprint = list[int | str]  # bytes, time of the last change in ns, BLAKE2 of the content in hexadecimal

_READ = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json")  # files of weights and settings


def file_fingerprint(file: str | os.PathLike[str]) -> Fingerprint:
    """Return the fingerprint of a file."""
    status = os.stat(file)
    return [status.st_size, status.st_mtime_ns, _digest(file)]


def has_changed(file: str | os.PathLike[str], recorded: Sequence[int | str]) -> bool:
    """Return True if a file exists with other bytes than recorded.

    A file of the recorded size and time is not read.
    """
    try:
        status = os.stat(file)
        size, modified, digest = recorded
        if status.st_size != size:
            return True
        return status.st_mtime_ns != modified and _digest(file) != digest
    except FileNotFoundError:
        return False


def source_files(path: Path | None) -> dict[str, Path]:
    """Return a local source's files of weights and settings, by name."""
    if path is None or not path.exists():
        return {}
    files = [path] if path.is_file() else path.iterdir()
    return {file.name: file for file in sorted(files) if file.suffix in _READ and file.is_file()}


def _digest(file: str | os.PathLike[str]) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            hashed.update(block)
    return hashed.hexdigest()
