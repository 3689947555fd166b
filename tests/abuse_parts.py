"""Files that somebody might upload who wants to see a server fall."""

import struct
import zlib


def png(width, height, data, extra=b"", depth=1):
    """A PNG of one channel with ``data`` as its compressed content."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(count):
    """``count`` zero bytes, compressed: a thousandth of it."""
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    parts = [packer.compress(block) for _ in range(count >> 20)]
    return b"".join([*parts, packer.compress(bytes(count & ((1 << 20) - 1))), packer.flush()])


def huge_png():
    """A valid 30,000 x 30,000 image of one-bit pixels, about 110 kB."""
    return png(30_000, 30_000, zeros(30_000 * (1 + 30_000 // 8)))


def bomb_png():
    """64 x 64 pixels whose data inflate to 200 MB."""
    return png(64, 64, zeros(200 << 20), depth=8)


def text_bomb_png():
    """64 x 64 pixels with a comment that inflates to 200 MB."""
    body = b"Comment\0\0" + zeros(200 << 20)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return png(64, 64, zeros(64 * 65), chunk, depth=8)


def bomb_gif():
    """A GIF that says it is 65,535 x 65,535."""
    size = struct.pack("<HH", 65_535, 65_535)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + size + b"\x80\x00\x00" + b"\0\0\0\xff\xff\xff" + frame + b";"


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>'
HTML = b"<html><script>document.title='broken'</script></html>"

#: file name, content, and what the message says; None: it is read, and an answer comes
FILES = {
    "thin": ("thin.png", lambda: png(200_000, 1, zeros(1 + 25_000)), "thin.png: 200000 x 1 pixels: too long and thin"),
    "huge": ("huge.png", huge_png, "too large to be decoded safely"),
    "gif": ("bomb.gif", bomb_gif, "too large to be decoded safely"),
    "text-bomb": ("comment.png", text_bomb_png, "is damaged"),
    "data-bomb": ("bomb.png", bomb_png, None),
    "svg": ("drawing.svg", lambda: SVG, "not an image"),
    "html": ("page.jpg", lambda: HTML, "not an image"),
}
