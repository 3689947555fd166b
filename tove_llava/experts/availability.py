"""Tell if an expert's weights are available here, or why not."""

from huggingface_hub import constants

from tove_llava.core.hub_access import answer, silence
from tove_llava.experts.base import Expert


def availability(expert: Expert) -> tuple[bool, str]:
    """Tell if an expert's weights are available, and where; nothing is downloaded."""
    path = expert.source.path
    if expert.is_random:
        return True, "random weights"
    if path is not None:
        return (True, "local") if path.exists() else (False, f"no such path: {path}")
    if expert.is_cached():
        return True, "in the cache"
    file = expert.hub_file()
    if file is None:
        return False, "the library names no source of these weights"
    return downloadable(file[0])


def downloadable(repository: str) -> tuple[bool, str]:
    """Tell if an uncached repository could be fetched; nothing is downloaded."""
    if constants.HF_HUB_OFFLINE:
        return False, "not in the cache, and HF_HUB_OFFLINE is set"
    status = None if silence() else answer(repository)
    if status is None:
        return False, f"not in the cache, and {silence()}"
    if status in (401, 403):
        return False, f"{repository} needs a login (hf auth login) and its licence accepted"
    return (True, "by download") if status < 400 else (False, f"{repository}: the hub answers {status}")
