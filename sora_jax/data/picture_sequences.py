"""Tells files of pictures one straight after the other, which are bare video, from pictures with something behind them.

Cameras write such files of JPEG (Motion JPEG without a container), and FFmpeg's `image2pipe` of other formats, too.
Pillow would read the first picture alone.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable

_Data = bytes | mmap.mmap

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)  # neither stuffed, nor a restart, nor a fill byte
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of frame headers
# What announces pictures behind the first that are no moments: previews, gain maps, depth, a second eye.
_JPEG_PARTS = (b"MPF\0", b"http://ns.adobe.com/xap/1.0/\0")
_PNG_END = b"IEND\xae\x42\x60\x82"
_PNM_HEADER = re.compile(rb"P([56])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s")


def sequence_format(path: str) -> str | None:
    """Returns FFmpeg's name for a file of pictures of one kind straight after each other, None where it is none.

    A JPEG is followed by one of its size, and does not announce that as its part (MPF, or XMP's container directory): a
    photo with a preview, a gain map or a film behind it, and any picture with other bytes behind it, is none.

    Args:
        path: of a file that is not empty.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for mark, (form, goes_on) in _KINDS.items():
            if data[: len(mark)] == mark:
                return form if goes_on(data) else None
    return None


def _jpeg_goes_on(data: _Data) -> bool:
    first = _jpeg(data, 0)
    if first is None or data[first[0] : first[0] + 3] != b"\xff\xd8\xff":
        return False
    second = _jpeg(data, first[0])
    return second is not None and second[1] == first[1]


def _jpeg(data: _Data, start: int) -> tuple[int, bytes] | None:
    """Returns where a JPEG ends and its size (ITU-T T.81, B.1); None where it does not end or announces parts."""
    place, size = start + 2, b""
    while found := _JPEG_MARKER.search(data, place):
        place, code = found.end(), data[found.end() - 1]
        if code == 0xD9:
            return place, size
        length = int.from_bytes(data[place : place + 2], "big")
        if code == 0xD8 or length < 2:
            return None
        if code in _JPEG_SIZES:
            size = data[place + 3 : place + 7]
        body = data[place + 2 : place + length] if 0xE1 <= code <= 0xE2 else b""
        if body.startswith(_JPEG_PARTS) and (body.startswith(b"MPF") or b"Container:Directory" in body):
            return None
        place += length
    return None


def _png_goes_on(data: _Data) -> bool:
    end = data.find(_PNG_END)
    return end >= 0 and data[end + len(_PNG_END) : end + len(_PNG_END) + 8] == data[:8]


def _bmp_goes_on(data: _Data) -> bool:
    end = int.from_bytes(data[2:6], "little")
    return end > 26 and data[end : end + 2] == b"BM" and data[end + 6 : end + 26] == data[6:26]


def _webp_goes_on(data: _Data) -> bool:
    end = 8 + int.from_bytes(data[4:8], "little")
    return data[8:12] == b"WEBP" and data[end : end + 4] == b"RIFF" and data[end + 8 : end + 12] == b"WEBP"


def _pnm_goes_on(data: _Data) -> bool:
    header = _PNM_HEADER.match(data)
    if header is None:
        return False
    kind, width, height, most = map(int, header.groups())
    end = header.end() + width * height * (3 if kind == 6 else 1) * (2 if most > 255 else 1)
    following = _PNM_HEADER.match(data, end)
    return following is not None and following.groups() == header.groups()


_KINDS: dict[bytes, tuple[str, Callable[[_Data], bool]]] = {
    b"\xff\xd8\xff": ("mjpeg", _jpeg_goes_on),
    b"\x89PNG\r\n\x1a\n": ("png_pipe", _png_goes_on),
    b"BM": ("bmp_pipe", _bmp_goes_on),
    b"RIFF": ("webp_pipe", _webp_goes_on),
    b"P5": ("pgm_pipe", _pnm_goes_on),
    b"P6": ("ppm_pipe", _pnm_goes_on),
}
