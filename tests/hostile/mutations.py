"""Seeded mutations of JSON values, texts and bytes."""

import copy
import json
import random

DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000

VALUES = [
    None, True, False, 0, -1, 1, 5, 2.5, 2**63, 1e300, float("nan"), float("inf"), -float("inf"), "", " ", "0", "null",
    "\x00", "\ud800", "\udfff tail", "\u2028", "\u202e", "\x1b[2J", "e\u0301", "\ufffd", "<image>", "<image><image>",
    "</s>", "<s>", "USER: ASSISTANT:", "../x", "/etc/passwd", "a/../../x", "~", "x" * 20_000, "a\nb", "\ttab\r",
    [], {}, [[]], [None], ["<image>"], {"value": "x"}, {"": None}, [1, "two", None], {"a": {"b": {"c": []}}},
]  # fmt: skip


def paths(value, at=()):
    """Yield the path of every node of a JSON value."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


def mutate_value(dice, value):
    """Change one node: another value, gone, doubled, wrapped, renamed or moved."""
    value = copy.deepcopy(value)
    at = dice.choice([path for path in paths(value) if path] or [()])
    if not at:
        return dice.choice(VALUES)
    holder = value
    for key in at[:-1]:
        holder = holder[key]
    key, kind = at[-1], dice.choice(["value", "value", "value", "gone", "double", "wrap", "rename", "swap", "more"])
    if kind == "value":
        holder[key] = copy.deepcopy(dice.choice(VALUES))
    elif kind == "gone":
        del holder[key]
    elif kind == "double" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == "wrap":
        holder[key] = dice.choice([[holder[key]], {"value": holder[key]}, json.dumps(holder[key]), str(holder[key])])
    elif kind == "rename" and isinstance(holder, dict):
        holder[dice.choice([key.upper(), f"{key}s", "", " " + key, "role", "content", "video"])] = holder.pop(key)
    elif kind == "swap":
        other = dice.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    elif isinstance(holder, dict):
        holder[dice.choice(["system", "video", "images", "id", "text", "\ud800", "unknown"])] = dice.choice(VALUES)
    else:
        holder.append(copy.deepcopy(dice.choice(VALUES)))
    return value


def mutate_bytes(dice, content):
    """Damage a file's bytes in one way."""
    start = dice.randrange(len(content) + 1)
    end = min(len(content), start + dice.choice([1, 1, 2, 8, 100]))
    return dice.choice(
        [
            lambda: content[:start],
            lambda: content[:start] + content[end:],
            lambda: content[:start] + dice.randbytes(end - start) + content[end:],
            lambda: content[:start] + dice.randbytes(dice.choice([1, 3, 50])) + content[start:],
            lambda: content[:end] + content[start:],
            lambda: content[:start] + bytes(end - start) + content[end:],
            lambda: flipped(dice, content),
            lambda: content + content,
            lambda: content + dice.choice([b"\x00", b"}", b"]", b",", b"null", b"\xff\xfe", b"\r"]),
            lambda: dice.choice([b"", b" ", b"\n", b"\x00" * 10, b"null", b"[]", b"{}", b"[{}]", b"\xff" * 9]),
        ]
    )()


def flipped(dice, content):
    """Flip a few bits."""
    changed = bytearray(content)
    for _ in range(dice.choice([1, 1, 3, 20]) if changed else 0):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def mutate_text(dice, content):
    """Damage a file of JSON text as editors and other programs do."""
    kind = dice.choice(["bytes", "bytes", "utf-16", "latin-1", "deep", "digits", "infinity", "pairs"])
    if kind == "utf-16":
        return content.decode("utf-8", "replace").encode(dice.choice(["utf-16", "utf-16-le", "utf-32"]))
    if kind == "latin-1":
        return content.replace(b"e", "é".encode("latin-1"), 1)
    if kind in ("deep", "digits", "infinity"):
        inner = {"deep": DEEP, "digits": DIGITS, "infinity": "1e999"}[kind].encode()
        at = dice.choice([i for i, byte in enumerate(content) if byte == ord(":")] or [0])
        return content[: at + 1] + inner + b"," + content[at + 1 :] if at else inner
    if kind == "pairs":
        return content.replace(b"{", b'{"id": 1, "id": [], ', 1)
    return mutate_bytes(dice, content)


def harmless_text(dice, content):
    """Write the same JSON as other programs write it."""
    kind = dice.choice(["bom", "crlf", "end", "same"])
    if kind == "bom":
        return b"\xef\xbb\xbf" + content
    if kind == "crlf":
        return content.replace(b"\n", b"\r\n")
    return content + b"\n\n" if kind == "end" else content


def written(dice, value, lines=False):
    """Write JSON, or a line for each of a list's values."""
    options = {"ensure_ascii": dice.random() < 0.5}
    rows = value if lines and isinstance(value, list) else [value]
    text = "\n".join(json.dumps(row, **options) for row in rows) + "\n"
    return text.encode("utf-8", "surrogatepass")


def dice_of(kind, seed):
    return random.Random(f"{kind} {seed}")
