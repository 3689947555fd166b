"""Tell if an expert's weights are available here, or why not."""

import urllib.error
import urllib.request
from functools import cache

from huggingface_hub import constants, get_token

from tove_llava.experts.base import Expert

_TIMEOUT = 5  # seconds; a table should not wait longer for a missing network


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
    status, reason = _head(constants.ENDPOINT)
    if status is None:
        return False, f"not in the cache, and the hub cannot be reached ({reason})"
    status, reason = _head(f"{constants.ENDPOINT}/{repository}/resolve/main/README.md", get_token())
    if status is None:
        return False, f"{repository}: {reason}"
    if status in (401, 403):
        return False, f"{repository} needs a login (hf auth login) and its licence accepted"
    return (True, "by download") if status < 400 else (False, f"{repository}: the hub answers {status}")


@cache
def _head(url: str, token: str | None = None) -> tuple[int | None, str]:
    """Request a page's status: a number, or None and the reason."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD", headers=headers), timeout=_TIMEOUT
        ) as page:
            return page.status, ""
    except urllib.error.HTTPError as error:
        return error.code, ""
    except (urllib.error.URLError, TimeoutError) as error:
        return None, str(getattr(error, "reason", error))
