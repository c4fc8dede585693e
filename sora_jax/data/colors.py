"""Brings a picture of any kind that Pillow reads to 8 bits of sRGB.

A picture says what its numbers mean in one of four ways, of which the first that is there counts, as in browsers:

1. code points of ITU-T H.273 (PNG's `cICP`; `nclx` of AVIF and HEIC, where there is no profile beside it), which
   `picture_files` leaves in `info["cicp"]`;
2. an embedded ICC profile;
3. PNG's `sRGB`, or its `gAMA` and `cHRM`;
4. nothing: sRGB, and for CMYK the inverse without a profile.

Little CMS converts (in Pillow's `ImageCms`), by the profile's perceptual table where there is one; 2 and 3 become
profiles too. A profile that moves no colour by more than 2 of 255 is taken for sRGB, so that such pictures keep
their pixels. What has no known range or colour is refused.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageCms

from sora_jax.array_types import NumpyArray
from sora_jax.data.errors import UnreadableClipError

WHITE = (255, 255, 255)
D65 = (0.3127, 0.3290)
BT709 = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_PRIMARIES = {  # x, y of red, green, blue and white, by H.273's ColourPrimaries
    1: (*BT709, *D65),
    2: (*BT709, *D65),  # not said
    4: (0.67, 0.33, 0.21, 0.71, 0.14, 0.08, 0.310, 0.316),
    **dict.fromkeys((5, 6, 7), (*BT709, *D65)),  # standard definition's lie near them, and are taken for them
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *D65),
    11: (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.314, 0.351),
    12: (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, *D65),
}
# By H.273's TransferCharacteristics: exponents, and None for sRGB's curve, with which pictures of video's are shown.
_TRANSFERS = {1: None, 2: None, 4: 2.2, 5: 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # of profiles, and the mode of their pictures
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_SAME = 2  # of 255


def flatten(image: Image.Image) -> Image.Image:
    """Returns any loaded picture as RGB in sRGB (see `to_srgb`), its transparent pixels laid over white."""
    image = to_srgb(image)
    if image.mode == "RGB":
        return image
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def to_srgb(image: Image.Image, note: Callable[[str], None] = lambda kind: None) -> Image.Image:
    """Returns a loaded picture in 8 bits of sRGB: RGB, or RGBA where it has an alpha channel or a transparent colour.

    Args:
        image: of any mode. 16-bit grey, and the 32-bit integers of formats that state 16 bits (PNG, PPM), run to 65535;
            floating-point grey lies in [0, 1] and is encoded as 8-bit grey is.
        note: called with what the colours were converted from, where they were.

    Raises:
        UnreadableClipError: the range of its values is not known, its profile is damaged or of another kind of
            picture, or it is of high dynamic range (PQ, HLG).
    """
    info = image.info
    profile = _stated_profile(info)
    if image.mode == "P" and not image.getpalette():
        raise UnreadableClipError("damaged: a picture of a palette without one")
    if profile is None and image.mode == "RGB" and "transparency" not in info:
        return image
    if image.mode == "F" or image.mode[0] == "I":
        image = _eight_bits(image)
    alpha = None
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        grey = image.mode in ("L", "LA", "La", "1")
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.getchannel("R") if grey else image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    if profile is not None:
        image = _converted(image, profile, note)
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
    return image


def _stated_profile(info: dict) -> bytes | None:
    """Returns the ICC profile that a picture states in one way or another; None: sRGB."""
    if "cicp" in info:
        primaries, transfer = info["cicp"]
        if transfer in _HDR_TRANSFERS:
            raise UnreadableClipError(f"high dynamic range: {_HDR_TRANSFERS[transfer]}; convert it to sRGB to use it")
        if primaries not in _PRIMARIES or transfer not in _TRANSFERS:
            raise UnreadableClipError(f"unknown colours: code points {primaries}, {transfer} of H.273")
        return matrix_profile(_PRIMARIES[primaries], _TRANSFERS[transfer])
    if "icc_profile" in info:
        if not info["icc_profile"]:
            raise UnreadableClipError("damaged colour profile: it is not whole")
        return info["icc_profile"]
    if info.get("gamma") and "srgb" not in info:
        x_y = info.get("chromaticity", (*D65, *BT709))  # in a file, white comes first
        exponent = 1 / info["gamma"]
        # 2.2 means sRGB's curve, by a tolerance of libpng's.
        return matrix_profile((*x_y[2:], *x_y[:2]), None if abs(exponent - 2.2) < 0.05 * 2.2 else exponent)
    return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns grey of 16 or 32 bits as L, or as LA where it names a transparent value."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:  # false for NaN too
            raise UnreadableClipError(
                f"unknown range: floating-point grey of {low:.6g} ... {high:.6g}; only 0 ... 1 says where white is"
            )
        values = (1 - values if _is_white_zero(image) else values) * 65535.0
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise UnreadableClipError(
            f"unknown range: grey of 32-bit or signed integers, {values.min()} ... {values.max()}, does not say where "
            "white is; 16-bit grey does"
        )
    else:
        if image.format == "TIFF":  # Pillow unpacks 12 bits without widening them
            values = values * (65535 / (2 ** image.tag_v2.get(258, (16,))[0] - 1))
        if _is_white_zero(image):
            values = 65535.0 - values
    grey = Image.fromarray(np.rint(values / 257.0).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)))
    return grey


def _is_white_zero(image: Image.Image) -> bool:
    """Whether a TIFF says that 0 is white, which Pillow takes into account at 8 bits only."""
    return image.format == "TIFF" and image.tag_v2.get(262) == 0


def _converted(image: Image.Image, profile: bytes, note: Callable[[str], None]) -> Image.Image:
    """Returns a picture of mode L, RGB, CMYK or LAB in sRGB."""
    space = _space(profile)
    if space == "RGB" and image.mode == "L":
        image = image.convert("RGB")  # the greys of an RGB space
    if _SPACES.get(space) != image.mode:
        raise UnreadableClipError(f"damaged colour profile: it is of {space}, the picture of {image.mode}")
    transform = _transform(profile, image.mode)
    if transform is None:
        return image
    note(f"converted from {'another RGB' if space == 'RGB' else space} to sRGB")
    return ImageCms.applyTransform(image, transform)


@functools.lru_cache(maxsize=64)
def _space(profile: bytes) -> str:
    """Returns the colour space of a profile."""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except (OSError, ImageCms.PyCMSError) as error:
        raise UnreadableClipError(f"damaged colour profile: {error}") from error


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the way from a profile to sRGB, None where it changes nothing that can be seen."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ImageCms.PyCMSError) as error:
        raise UnreadableClipError(f"damaged colour profile: {error}") from error
    if mode not in ("L", "RGB"):
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, len(levels), 3)
    probe = Image.fromarray(grid if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    seen = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    return transform if np.abs(seen - np.asarray(probe.convert("RGB"))).max() > _SAME else None


@functools.lru_cache(maxsize=64)
def matrix_profile(primaries: Sequence[float], exponent: float | None) -> bytes:
    """Writes an ICC profile (ICC.1:2010) of an RGB space.

    Args:
        primaries: x and y of red, green, blue and white (CIE 1931).
        exponent: light is the number to this power; None: sRGB's curve.

    Returns:
        The profile, its colours adapted to D50 by Bradford's matrix, as ICC asks.

    Raises:
        UnreadableClipError: the primaries are no triangle with the white inside.
    """
    columns = [_xyz(x, y) for x, y in zip(primaries[::2], primaries[1::2], strict=True)]
    try:
        amounts = np.linalg.solve(np.stack(columns[:3], 1), columns[3])
    except np.linalg.LinAlgError:
        amounts = np.zeros(3)
    if not (np.isfinite(amounts).all() and (amounts > 0).all()):
        raise UnreadableClipError(f"unknown colours: its primaries and white are {primaries}")
    d50 = np.array([0.9642, 1.0, 0.8249])
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapt = np.linalg.inv(bradford) @ np.diag((bradford @ d50) / (bradford @ columns[3])) @ bradford
    colorants = adapt @ np.stack(columns[:3], 1) * amounts
    # Parametric curves of type 3 (a toe) and 0 (a power).
    curve = (3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045) if exponent is None else (0, exponent)
    curve_tag = b"para" + struct.pack(f">IHH{len(curve) - 1}i", 0, curve[0], 0, *map(_fixed, curve[1:]))
    tags = {b"wtpt": _xyz_tag(d50)}
    tags |= {name: _xyz_tag(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants.T, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve_tag)
    body, table = b"", struct.pack(">I", len(tags))
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    head = struct.pack(">I4sI4s4s4s", 0, bytes(4), 0x04300000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", *map(_fixed, d50))
    profile = head.ljust(128, b"\0") + table + body
    return struct.pack(">I", len(profile)) + profile[4:]


def _xyz(x: float, y: float) -> NumpyArray:
    """Returns the XYZ of luminance 1 of a chromaticity."""
    return np.array([x, y, 1 - x - y]) / (y or np.nan)


def _xyz_tag(value: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *map(_fixed, value))


def _fixed(value: float) -> int:
    """Returns ICC's s15Fixed16Number."""
    return round(float(value) * 65536)
