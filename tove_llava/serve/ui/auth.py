"""Passwords of the page: ``user:password``, or ``@FILE`` with many."""

from tove_llava.core.errors import ConfigError
from tove_llava.core.files import read_text


def read_auth(given: str | None) -> list[tuple[str, str]] | None:
    """Return users and passwords; None for an open page.

    Args:
        given: ``user:password``, which other users of the machine see in the list of processes, or ``@FILE``.

    Raises:
        ConfigError: it has no colon, or an empty name or password, or the file cannot be read.
    """
    if given is None:
        return None
    if not given.startswith("@"):
        return [_pair(given, "--auth")]
    lines = read_text(given[1:], ConfigError, "check --auth").splitlines()
    pairs = [_pair(line, f"{given[1:]}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not pairs:
        raise ConfigError(f"--auth {given}: the file is empty; write one user:password a line")
    return pairs


def _pair(text: str, where: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise ConfigError(f"{where}: expected user:password")  # the text itself may be a password
    return user, password
