"""Pictures that tests write, and TIFF and PNG files byte by byte, for what Pillow does not write."""

import pathlib
import struct
import zlib

import numpy as np
from PIL import Image

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
"""`grid.avif` and `grid_turned.heic` are two tiles side by side, of the quarters below (256 x 128, and 128 x 64 turned
a quarter clockwise by a property of its own and by EXIF; libheif's encoders made the tiles)."""

QUARTERS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (230, 230, 230))
"""Top left, top right, bottom left, bottom right."""


def quarters(height=64, width=96):
    """Returns (height, width, 3) uint8 of four colours."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for i, color in enumerate(QUARTERS):
        y, x = i // 2 * height // 2, i % 2 * width // 2
        pixels[y : y + height // 2, x : x + width // 2] = color
    return pixels


def centers(pixels):
    """Returns the colours in the middle of the four quarters, (4, 3) int."""
    height, width = pixels.shape[:2]
    return pixels[[height // 4, height // 4, -height // 4, -height // 4]][
        range(4), [width // 4, -width // 4, width // 4, -width // 4]
    ].astype(int)


def orientation(value):
    """Returns EXIF that asks for an orientation."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def tiff(pixels, photometric, bits=None, sample_format=1, extra=()):
    """Returns a TIFF (6.0, little-endian, one strip) of (H, W) or (H, W, C) values, or of packed rows of `bits`."""
    raw = pixels.tobytes()
    height, width = pixels.shape[:2]
    samples = 1 if pixels.ndim == 2 else pixels.shape[2]
    if bits is None:
        bits = pixels.itemsize * 8
    else:
        width = width * 8 * pixels.itemsize // bits
    depths = struct.pack(f"<{samples}H", *[bits] * samples) if samples > 1 else b""
    raw += bytes(len(raw) % 2)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, samples, 8 + len(raw) if depths else bits)]
    entries += [(259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, samples), (278, 4, 1, height)]
    entries += [(279, 4, 1, len(raw)), (339, 3, 1, sample_format), *extra]
    data = b"II*\0" + struct.pack("<I", 8 + len(raw) + len(depths)) + raw + depths + struct.pack("<H", len(entries))
    for tag, kind, count, value in sorted(entries):
        data += struct.pack("<HHII", tag, kind, count, value)
    return data + bytes(4)


def png(rows, color_type=2, chunks=()):
    """Returns a PNG of (H, W) or (H, W, C) values in big-endian order, with more chunks (name and content)."""
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], rows.itemsize * 8, color_type, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), *chunks, (b"IDAT", content), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data
