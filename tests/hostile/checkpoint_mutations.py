"""Damage one thing in a checkpoint folder, the same for the same seed."""

import json
import math
import random
import struct

SWAPS = [None, True, False, "text", "", "1", -1, 0, 1, 1.5, math.nan, 10**9, 10**12, 10**400, [], [None], {}, {"a": {}},
         [[[[]]]], "../../x", "/etc/passwd", "\ud800", "(a+)+$"]  # fmt: skip
CODE = {"AutoConfig": "planted.Planted", "AutoModel": "planted.Planted", "AutoTokenizer": ["planted.Planted", None],
        "AutoProcessor": "planted.Planted"}  # fmt: skip


def mutate(folder, seed):
    """Damage one file of a folder; return what was done."""
    chance = random.Random(seed)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    texts = [file for file in files if file.suffix == ".json"]
    file = chance.choice(texts if chance.random() < 0.75 else files)
    name = file.relative_to(folder)
    if file.suffix == ".json" and chance.random() < 0.85:
        return f"{name}: {_key(file, chance, folder)}"
    if file.suffix == ".safetensors" and chance.random() < 0.7:
        return f"{name}: {_header(file, chance)}"
    return f"{name}: {_bytes(file, chance)}"


def _key(file, chance, folder):
    """Change, delete or add one value at any depth of a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if chance.random() < 0.04:
        (folder / "planted.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\nclass Planted: pass\n")
        content["auto_map"] = CODE
        _write(file, content)
        return "auto_map"
    node, path = content, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        path.append(chance.choice(keys))
        inner = node[path[-1]]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.3:
            break
        node = inner
    if not path:
        content["added"] = value = chance.choice(SWAPS)
    elif chance.random() < 0.15:
        del node[path[-1]]
        value = "deleted"
    else:
        old = node[path[-1]]
        number = isinstance(old, int | float) and not isinstance(old, bool)
        more = [old * 1000, -old, old + 1, str(old)] if number else [[old], {"x": old}]
        value = node[path[-1]] = chance.choice(more if chance.random() < 0.3 else SWAPS)
    _write(file, content)
    return f"{'.'.join(map(str, path))} = {value!r:.80}"


def _write(file, content):
    file.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")


def _header(file, chance):
    """Change the table of a safetensors file, or its values."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    table, values = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    name = chance.choice([name for name in table if name != "__metadata__"])
    kind = chance.choice(["shape", "dtype", "offsets", "name", "gone", "bits", "nan"])
    if kind == "shape":
        table[name]["shape"] = chance.choice(
            [[10**12], [-1], [*table[name]["shape"], 1], table[name]["shape"][::-1], []]
        )
    elif kind == "dtype":
        table[name]["dtype"] = chance.choice(["F16", "F64", "I32", "BOOL", "F8_E4M3", "X"])
    elif kind == "offsets":
        table[name]["data_offsets"] = chance.choice([[0, 10**12], [5, 1], [0, 0]])
    elif kind == "name":
        table[chance.choice(["x", "model." + name, "../" + name])] = table.pop(name)
    elif kind == "gone":
        del table[name]
    elif kind == "bits":
        for _ in range(2000):
            values[chance.randrange(len(values))] ^= 1 << chance.randrange(8)
    else:
        start = chance.randrange(max(1, len(values) - 64)) // 4 * 4
        values[start : start + 16] = struct.pack("<4f", *[math.nan] * 4)[: len(values) - start]
    head = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + values)
    return f"{kind} of {name}"


def _bytes(file, chance):
    """Truncate, flip, replace or remove a file."""
    data = bytearray(file.read_bytes())
    kind = chance.choice(["gone", "empty", "half", "flipped", "zeros", "folder", "noise", "more"])
    file.unlink()
    if kind == "flipped":
        for _ in range(20):
            data[chance.randrange(max(1, len(data)))] ^= 1 << chance.randrange(8)
    new = {"empty": b"", "half": data[: len(data) // 2], "flipped": data, "zeros": bytes(len(data)),
           "noise": chance.randbytes(200), "more": data + b"}{\x00"}  # fmt: skip
    if kind == "folder":
        file.mkdir()
    elif kind in new:
        file.write_bytes(new[kind])
    return kind
