"""Tell if an expert's weights are available on this machine, and if not, why."""

import urllib.error
import urllib.request
from functools import cache

from huggingface_hub import constants, get_token

from tove_llava.experts.base import Expert

_TIMEOUT = 5  # seconds; a table should not wait longer for a missing network


def availability(expert: Expert) -> tuple[bool, str]:
    """Tell if :meth:`Expert.load` finds the weights, and where (or why not); nothing is downloaded."""
    path = expert.source.path
    if path is not None:
        return (True, "local") if path.exists() else (False, f"no such path: {path}")
    if expert.is_cached():
        return True, "in the cache"
    file = expert.hub_file()
    if file is None:
        return False, "the library names no source of these weights"
    return downloadable(file[0])


def downloadable(repository: str) -> tuple[bool, str]:
    """Tell if a repository of the hub that is not cached could be fetched, or why not; nothing is downloaded."""
    if constants.HF_HUB_OFFLINE:
        return False, "not in the cache, and HF_HUB_OFFLINE is set"
    unreachable = _hub_problem(constants.ENDPOINT)
    if unreachable:
        return False, f"not in the cache, and the hub cannot be reached ({unreachable})"
    return _repository(constants.ENDPOINT, repository)


@cache
def _hub_problem(endpoint: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_TIMEOUT).close()
    except urllib.error.HTTPError:
        return None  # the hub answers
    except (urllib.error.URLError, TimeoutError) as error:
        return str(getattr(error, "reason", error))
    return None


@cache
def _repository(endpoint: str, repository: str) -> tuple[bool, str]:
    token = get_token()
    request = urllib.request.Request(
        f"{endpoint}/{repository}/resolve/main/README.md",
        method="HEAD",
        headers={"Authorization": f"Bearer {token}"} if token else {},
    )
    try:
        urllib.request.urlopen(request, timeout=_TIMEOUT).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return False, f"{repository} needs a login (hf auth login) and its licence accepted"
        return False, f"{repository}: the hub answers {error.code}"
    except (urllib.error.URLError, TimeoutError) as error:
        return False, f"{repository}: {getattr(error, 'reason', error)}"
    return True, "by download"
