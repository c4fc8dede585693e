"""Opens files of pictures with Pillow: which they are, by their content, and which of their pictures is meant.

Their name decides nothing, except for TGA before version 2, which has no mark of its own. Formats that are documents
or drawings (EPS, PDF, SVG, WMF), cursors, and data without a range (FITS, HDF5, GRIB) are no pictures here; nothing is
run to read one. What a library calls a frame is a moment only in formats whose frames have times (`ANIMATED`). Of
all others one picture is read:

- TIFF: the largest page, the first of equals; pages marked as reduced copies or as masks are passed over;
- MPO (a JPEG with previews, a gain map or a second eye behind it): the first, which is the JPEG itself;
- ICO and ICNS: the largest; PSD: the whole without its layers; HEIC and AVIF: the primary one, its tiles put together,
  no thumbnails, depth or gain maps.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
import warnings
from typing import BinaryIO

import pi_heif
from PIL import ExifTags, Image

from sora_jax.data.errors import UnreadableClipError

ANIMATED = frozenset({"GIF", "PNG", "WEBP", "AVIF"})
"""Formats whose frames have times."""

MOST_PIXELS_A_SIDE = 65_535
"""As many as JPEG can store."""

# What Pillow raises on bad files; its GIF reader lets an IndexError out where the file ends inside a header.
BROKEN_PICTURE = (
    OSError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    ZeroDivisionError,
    struct.error,
    Image.DecompressionBombError,
)

_FORMATS = (
    *("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM", "ICO", "ICNS", "PSD", "DDS", "QOI", "PCX"),
    *("SGI", "SUN", "XBM", "XPM"),
)
_TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_KEYS = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})
_SIDEWAYS = (5, 6, 7, 8)
_TGA_FOOTER = b"TRUEVISION-XFILE.\0"
_TGA_SUFFIXES = (".tga", ".icb", ".vda", ".vst")
_COMMON = {b"\xff\xd8\xff": ["JPEG"], b"\x89PNG\r\n\x1a\n": ["PNG"]}  # of the records of data sets: asked first
_HEIF_BRANDS = frozenset(
    {b"avif", b"avis", b"mif1", b"mif2", b"msf1"}
    | {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
)

pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
# Pillow warns of large pictures, odd EXIF and the like, and logs; a picture that is not right ends in an error here.
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_picture(stream: BinaryIO, name: str = "") -> Image.Image:
    """Opens a picture or an animation at its first frame; nothing is decoded yet.

    Args:
        stream: of the file, at its beginning.
        name: of the file.

    Returns:
        Pillow's image. Its `info["cicp"]` holds the code points (primaries, transfer) of H.273 where the file gives
        some, for `colors.to_srgb`.

    Raises:
        UnidentifiedImageError: it is no picture.
        UnreadableClipError: it is, but of a kind that cannot be read, or has more than `MOST_PIXELS_A_SIDE`.
        OSError, ValueError: (and others of `BROKEN_PICTURE`) it is damaged.
    """
    formats = _formats(stream, name)
    try:
        image = Image.open(stream, formats=formats)
    except Image.UnidentifiedImageError as error:
        if len(formats) == 1:  # its mark says what it is; PyAV would show one tile of AVIF and HEIC
            raise UnreadableClipError(f"cannot be decoded: a damaged {formats[0]}") from error
        raise
    if max(image.size) > MOST_PIXELS_A_SIDE or min(image.size) < 1:
        raise UnreadableClipError(
            f"too large: {image.width} x {image.height} pixels; a side has 1 to {MOST_PIXELS_A_SIDE}"
        )
    if image.format == "TIFF":
        _seek_page(image)
    elif image.format == "PNG":
        _note_png(stream, image)
    elif image.format in ("AVIF", "HEIF"):
        _note_heif(stream, image)
    return image


def is_picture(stream: BinaryIO, name: str = "") -> bool:
    """Returns whether a file is a picture or an animation, perhaps a damaged one or one of a kind that is not read.

    Args:
        stream: of the file, at its beginning.
        name: of the file.
    """
    try:
        with open_picture(stream, name):
            return True
    except Image.UnidentifiedImageError:
        return False
    except BROKEN_PICTURE:
        return True


def upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    """Returns a picture turned as the EXIF of the loaded `image` that it was made from says."""
    method = _TURNS.get(_orientation(image))
    return picture if method is None else picture.transpose(method)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns the (width, height) that `upright` gives a picture; nothing is decoded."""
    return image.size[::-1] if _orientation(image) in _SIDEWAYS else image.size


def _orientation(image: Image.Image) -> int:
    """Returns EXIF's orientation, 1 where there is none or the EXIF is damaged, as viewers do."""
    if image.format == "TIFF" or _EXIF_KEYS.isdisjoint(image.info):  # Pillow turns TIFF itself, its size too
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except BROKEN_PICTURE:
        return 1


@functools.cache
def suffixes() -> frozenset[str]:
    """Returns the suffixes that pictures usually have, in lower case."""
    Image.init()
    formats = {*_FORMATS, "TGA", "MPO", "AVIF", "HEIF"}
    return frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in formats)


def _formats(stream: BinaryIO, name: str) -> list[str]:
    """Returns the formats that a file may have."""
    head = stream.read(64)
    for mark, formats in _COMMON.items():
        if head.startswith(mark):
            stream.seek(0)
            return formats
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        stream.seek(0)
        brands = head[8 : min(len(head), max(16, int.from_bytes(head[:4], "big")))]
        return ["AVIF"] if b"avif" in brands or b"avis" in brands else ["HEIF"]
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - len(_TGA_FOOTER)))
    is_tga = stream.read() == _TGA_FOOTER or name.lower().endswith(_TGA_SUFFIXES)
    stream.seek(0)
    return [*_FORMATS, "TGA"] if is_tga else list(_FORMATS)


def _seek_page(image: Image.Image) -> None:
    """Goes to the page of a TIFF that is meant."""
    pages = []
    for i in range(image.n_frames):
        image.seek(i)
        if 50706 in image.tag_v2:
            raise UnreadableClipError("raw photo: a camera's DNG; develop it to use it")
        # NewSubfileType's bits 0 (a reduced copy) and 2 (a mask), and SubfileType, which it replaced.
        if not int(image.tag_v2.get(254, 0)) & 0b101 and image.tag_v2.get(255) != 2:
            pages.append((-image.width * image.height, i))
    if not pages:
        raise UnreadableClipError("raw photo: a TIFF of nothing but reduced copies; develop it to use it")
    image.seek(min(pages)[1])


def _note_png(stream: BinaryIO, image: Image.Image) -> None:
    """Notes the `cICP` chunk, which Pillow leaves out, and brings the transparent colour of 48 bits to 24."""
    position = stream.tell()
    stream.seek(8)
    while len(head := stream.read(8)) == 8 and head[4:] != b"IDAT":
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"cICP":
            primaries, transfer = stream.read(4)[:2]
            image.info["cicp"] = (primaries, transfer)
            break
        stream.seek(length + 4, os.SEEK_CUR)
    stream.seek(position)
    color = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(color, tuple) and any(tile.args == "RGB;16B" for tile in image.tile):
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _note_heif(stream: BinaryIO, image: Image.Image) -> None:
    """Notes the `nclx` code points of the primary picture, which an ICC profile takes the place of."""
    if "icc_profile" in image.info:
        return
    if image.format == "AVIF":  # Pillow does not tell; libheif reads the header of AVIF too, though not its pictures
        stream.seek(0)
        points = pi_heif.open_heif(stream).info.get("nclx_profile")
    else:
        points = image.info.get("nclx_profile")
    if points:
        image.info["cicp"] = (int(points["color_primaries"]), int(points["transfer_characteristics"]))
