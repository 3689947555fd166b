"""Download repositories of the Hugging Face hub, and upload folders to them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from tove_llava.checkpoints.card import CARD, is_ours
from tove_llava.core.errors import CheckpointError
from tove_llava.core.hub_access import asking, silence

_DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")
# Pickles, code, evaluations and interrupted runs are not downloaded.
_LEFT_THERE = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.py", "eval/*", "*checkpoint-*/*"]
_PREFIX = "hf:"


def download(repository: str, options: Mapping[str, Any], only: list[str] | None = None) -> Path | None:
    """Download a repository, or ``only`` some files, with ``from_pretrained``'s options; None if that fails."""
    wanted = {key: options[key] for key in _DOWNLOAD if options.get(key) is not None}
    try:
        with asking(repository):
            folder = Path(snapshot_download(repository, allow_patterns=only, ignore_patterns=_LEFT_THERE, **wanted))
    except (HFValidationError, HfHubHTTPError, OSError):
        return None
    return folder / (options.get("subfolder") or "")


def checkpoint_folder(place: str | os.PathLike[str]) -> Path:
    """Return a folder, or, for ``hf:owner/name``, the local copy of a repository."""
    text = os.fspath(place)
    if not text.startswith(_PREFIX):
        return Path(place)
    folder = download(text.removeprefix(_PREFIX), {})
    if folder is None:
        why = silence() or "there is no such model on the hub, or no way to it from here"
        raise CheckpointError(f"{text} cannot be fetched: {why}")
    if any(folder.glob("*.bin.index.json")) and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{text} holds pickled weights, which are not fetched; take a repository with safetensors, or download it "
            f"(hf download {text.removeprefix(_PREFIX)} --local-dir FOLDER) and convert it (tove-llava convert)"
        )
    return folder


def shown_name(folder: str | os.PathLike[str]) -> str:
    """Return a folder's path, or ``hf:owner/name`` for a repository's copy in the hub's cache."""
    parts = Path(folder).parts[-3:]
    if len(parts) < 3 or parts[1] != "snapshots" or not parts[0].startswith("models--"):
        return str(folder)
    return _PREFIX + parts[0].removeprefix("models--").replace("--", "/", 1)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> Any:
    """Upload a folder; keep a card that people wrote in the repository.

    Returns:
        huggingface_hub's ``CommitInfo``.
    """
    api = HfApi(token=token, library_name="tove_llava")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    theirs = _card_of(api, repo_id, revision)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        ignore_patterns=[CARD] if theirs is not None and not is_ours(theirs) else None,
    )


def _card_of(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    try:
        file = api.hf_hub_download(repo_id, CARD, revision=revision)
    except EntryNotFoundError:
        return None
    return Path(file).read_text(encoding="utf-8", errors="replace")
