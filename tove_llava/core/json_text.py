"""Read JSON text, strictly: a value that every later step can take, or the reason and line of a fault.

Python's reader takes halves of surrogate pairs, which no file can hold, NaN, infinity, numbers that no float can hold,
keys that occur twice, and nesting that exhausts the stack later. All of these are faults here.
"""

import json
import re
from typing import Any

from tove_llava.core.text import has_encoding

DEPTH = 100  # lists and objects within one another
DIGITS = 300  # of an integer; a float has at most 309

_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[\[{\]}]|-?(?:NaN|Infinity)|-?\d[-+.\deE]*', re.DOTALL)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """A fault of a JSON text; ``line`` counts from 1."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


class _SuspectError(ValueError):
    """Raised while parsing; :func:`_fault` then finds reason and line."""


def loads(text: str | bytes, unique: bool = True, finite: bool = True) -> Any:
    """Parse JSON text, or UTF-8 bytes; a byte-order mark is skipped.

    Args:
        unique: refuse keys that occur twice in an object, which takes half as long again.
        finite: refuse NaN and infinity.

    Raises:
        JsonError: the text is not JSON, or has another of the faults above.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as cause:
            raise JsonError("not UTF-8 text", 1 + cause.object.count(b"\n", 0, cause.start)) from None
    text = text.removeprefix("\ufeff")
    try:
        value = _DECODERS[unique, finite].decode(text)
        sound = (
            (text.count("[") + text.count("{") <= DEPTH or _is_flat(value))
            and ("\\u" not in text or not _HALF.search(text) or has_encoding(json.dumps(value, ensure_ascii=False)))
        )  # fmt: skip
    except json.JSONDecodeError as cause:
        raise JsonError(cause.msg, cause.lineno) from None
    except (_SuspectError, RecursionError):
        sound = False
    if not sound:
        raise _fault(text)
    return value


def plain(value: Any) -> Any:
    """Return a value as a JSON file gives it back: tuples are lists, unknown objects text."""
    return json.loads(json.dumps(value, default=str))


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _SuspectError
    return value


def _short_int(text: str) -> int:
    if len(text) > DIGITS:
        raise _SuspectError
    return int(text)


def _no_constant(text: str) -> float:
    raise _SuspectError


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _SuspectError
    return found


_DECODERS = {
    (unique, finite): json.JSONDecoder(
        object_pairs_hook=_unique_keys if unique else None,
        parse_int=_short_int,
        parse_float=_finite_float if finite else None,
        parse_constant=_no_constant if finite else None,
    )
    for unique in (False, True)
    for finite in (False, True)
}


def _is_flat(value: Any) -> bool:
    """Tell if lists and objects are nested at most ``DEPTH`` deep."""
    level = [value]
    for _ in range(DEPTH):
        inner = (each.values() if type(each) is dict else each for each in level if type(each) in (dict, list))
        level = [child for children in inner for child in children if type(child) in (dict, list)]
        if not level:
            return True
    return False


def _fault(text: str) -> JsonError:
    """Find the first fault of a text that Python's reader takes."""
    keys: list[set[str]] = []  # of the lists and objects that are open
    for token in _TOKEN.finditer(text):
        word, reason = token[0], ""
        if token[1]:
            name = json.loads(token[1])
            if not has_encoding(name):
                reason = f"half of a surrogate pair in {name[:60]!r}"
            elif token[2] and keys:
                reason = f"the key {name[:60]!r} occurs twice" if name in keys[-1] else ""
                keys[-1].add(name)
        elif word in "[{":
            keys.append(set())
            reason = f"nested more than {DEPTH} deep" if len(keys) > DEPTH else ""
        elif word in "]}":
            keys = keys[:-1]
        elif len(word) > DIGITS:
            reason = f"a number of {len(word):,} digits"
        elif word[-1] in "Ny" or abs(float(word)) == float("inf"):
            reason = f"{word[:60]} is not a number that a file may hold"
        if reason:
            return JsonError(reason, 1 + text.count("\n", 0, token.start()))
    return JsonError("nested too deeply", 1)  # on a stack that was nearly full
