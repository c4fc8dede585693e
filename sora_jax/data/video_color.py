"""Decoded video frames as sRGB pictures: matrix, range, transfer, primaries and transparency as the file tags them.

Ordinary video is shown as players show it: its R'G'B' values are taken as sRGB's. Only what would look washed out is
converted, through linear light in which 1 is the white of an sRGB picture:

    PQ   (ITU-R BT.2100)  display light 10000 PQ^-1(E') cd/m2, of which 203 are white (ITU-R BT.2408)
    HLG  (ITU-R BT.2100)  display light 1000 Y_S^0.2 E_S cd/m2 with E_S = OETF^-1(E'), of which 203 are white
    else                  the sRGB curve, so that grey keeps its value

then a 3x3 matrix from the tagged primaries to BT.709's (Bradford adaptation of the white), clipped to [0, 1], and the
sRGB curve. What is brighter than white is clipped; no tone curve moves the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from sora_jax.array_types import NumpyArray
from sora_jax.data.decode import UnreadableClipError, flatten

REFERENCE_WHITE = 203.0
"""Luminance of white in HDR video, in cd/m2 (ITU-R BT.2408)."""

# Codes of ISO/IEC 23091-2 (H.273), which FFmpeg uses too.
_UNSPECIFIED = 2
_MATRICES = {0, 1, 2, 3, 4, 5, 6, 7, 9}  # those that swscale converts
_OTHER_MATRICES = {8: "YCgCo", 10: "BT.2020 constant luminance", 11: "SMPTE 2085", 12: "derived from the primaries"}
_OTHER_MATRICES |= {13: "derived from the primaries", 14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-R", 17: "YCgCo-R"}
_OTHER_TRANSFERS = {
    ColorTrc.LINEAR: "linear light",
    ColorTrc.LOG: "logarithmic",
    ColorTrc.LOG_SQRT: "logarithmic",
    ColorTrc.SMPTE428: "SMPTE 428 (digital cinema)",
}
_HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
_WHITES = {"D65": (0.3127, 0.3290), "C": (0.310, 0.316), "DCI": (0.314, 0.351)}
_BT709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), "D65")
# x, y of red, green and blue. The primaries of standard definition (codes 5 to 7 and 22) lie near BT.709's and are
# taken for them, as most players do.
_WIDE = {
    ColorPrimaries.BT470M: ("BT.470 M", ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), "C")),
    ColorPrimaries.FILM: ("film", ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), "C")),
    ColorPrimaries.BT2020: ("BT.2020", ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), "D65")),
    ColorPrimaries.SMPTE431: ("DCI-P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), "DCI")),
    ColorPrimaries.SMPTE432: ("Display P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), "D65")),
}
_LUMINANCE_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
_CODES = 65535  # of 16-bit values


def to_picture(frame: Any, note: Callable[[str], None]) -> Image.Image:
    """Returns a decoded frame as an RGB picture in sRGB, its transparent pixels laid over white.

    A frame that names no matrix has BT.2020's where its primaries are BT.2020's, BT.709's from 1280 pixels of width or
    more than 576 of height on, as players take it, and BT.601's below.

    Args:
        frame: of PyAV. Its alpha is straight, not premultiplied.
        note: called with what the colours were converted from, where they were.

    Raises:
        UnreadableClipError: its colours can be neither shown as they are nor converted.
    """
    matrix, transfer, primaries = frame.colorspace, frame.color_trc, frame.color_primaries
    if matrix in _OTHER_MATRICES:
        raise UnreadableClipError(f"has colours that are not converted: the matrix is {_OTHER_MATRICES[matrix]}")
    if transfer in _OTHER_TRANSFERS:
        raise UnreadableClipError(f"has colours that are not converted: the transfer is {_OTHER_TRANSFERS[transfer]}")
    # `frame.side_data` would make a cycle of references, in which dead frames pile up.
    if transfer not in _HDR and any(data.type.name == "DOVI_METADATA" for data in SideDataContainer(frame)):
        raise UnreadableClipError("has colours that are not converted: Dolby Vision without a base layer")
    options = {}
    if matrix not in _MATRICES or matrix == _UNSPECIFIED:
        wide = primaries == ColorPrimaries.BT2020
        high = frame.width >= 1280 or frame.height > 576
        options["src_colorspace"] = Colorspace.BT2020 if wide else Colorspace.ITU709 if high else Colorspace.ITU601
    if primaries == _UNSPECIFIED and transfer in _HDR:
        primaries = ColorPrimaries.BT2020
    # PyAV names no component of a palette alpha, although its colours have some.
    alpha = frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)
    if transfer not in _HDR and primaries not in _WIDE:
        return flatten(Image.fromarray(frame.to_ndarray(format="rgba" if alpha else "rgb24", **options)))
    kind = _HDR[transfer] if transfer in _HDR else _WIDE[primaries][0]
    note(f"converted from {kind} to sRGB")
    codes = frame.to_ndarray(format="rgba64le", **options)
    rgb, peak = np.empty((*codes.shape[:2], 3), np.uint8), _peak(frame)
    for row in range(0, len(codes), 64):  # in bands: a frame in floating point is large
        rgb[row : row + 64] = to_srgb(codes[row : row + 64, :, :3], transfer, primaries, peak)
    picture = Image.fromarray(rgb)
    if alpha:
        opaque = _full_scale(frame.format.components[-1].bits)
        picture.putalpha(Image.fromarray((np.minimum(codes[..., 3] / opaque, 1) * 255 + 0.5).astype(np.uint8)))
    return flatten(picture)


def _peak(frame: Any) -> int:
    """Returns the 16-bit code that swscale gives the value 1: it shifts the bits of most formats up."""
    bits = frame.format.components[0].bits
    if frame.format.is_rgb:
        return _CODES if bits > 8 else _full_scale(8)
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return _full_scale(bits if full else 8)


def _full_scale(bits: int) -> int:
    """Returns the largest value of so many bits, shifted up to 16."""
    return ((1 << bits) - 1) << (16 - bits)


def to_srgb(codes: NumpyArray, transfer: int, primaries: int, peak: int = 65535) -> NumpyArray:
    """Converts the colours of a video to sRGB; the module's docstring gives the equations.

    Args:
        codes: (..., 3) uint16, R'G'B' at full range.
        transfer: code of ISO/IEC 23091-2.
        primaries: code of ISO/IEC 23091-2.
        peak: the code that stands for 1.

    Returns:
        (..., 3) uint8.
    """
    light = _light(transfer, peak)[codes]
    if transfer == ColorTrc.ARIB_STD_B67:
        light *= np.maximum(light @ _LUMINANCE_2020, 1e-6)[..., None] ** np.float32(0.2)
        light *= np.float32(1000 / REFERENCE_WHITE)
    if primaries in _WIDE:
        light = light @ _to_bt709(primaries).T.astype(np.float32)
    return _srgb_codes()[(np.clip(light, 0, 1) * _CODES + 0.5).astype(np.uint16)]


@functools.lru_cache
def _light(transfer: int, peak: int) -> NumpyArray:
    """Returns the light of every 16-bit code, (65536,) float32: 1 is white (HLG: of the scene, 1 is the brightest)."""
    value = np.minimum(np.arange(_CODES + 1) / peak, 1)
    if transfer == ColorTrc.SMPTE2084:
        power = value ** (32 / 2523)
        light = (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (16384 / 2610)
        light *= 10000 / REFERENCE_WHITE
    elif transfer == ColorTrc.ARIB_STD_B67:
        upper = (np.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12
        light = np.where(value <= 0.5, value**2 / 3, upper)
    else:
        light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


@functools.lru_cache
def _srgb_codes() -> NumpyArray:
    """Returns the sRGB value of every 16-bit amount of light, (65536,) uint8."""
    light = np.arange(_CODES + 1) / _CODES
    value = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * value).astype(np.uint8)


@functools.lru_cache
def _to_bt709(primaries: int) -> NumpyArray:
    """Returns the (3, 3) float64 matrix from linear RGB of some primaries to BT.709's."""
    source, target = _WIDE[primaries][1], _BT709
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    cones = [bradford @ _xyz(_WHITES[white]) for *_, white in (source, target)]
    adapt = np.linalg.inv(bradford) @ np.diag(cones[1] / cones[0]) @ bradford
    return np.linalg.inv(_rgb_to_xyz(target)) @ adapt @ _rgb_to_xyz(source)


def _rgb_to_xyz(primaries: Any) -> NumpyArray:
    """Returns the (3, 3) matrix from linear RGB to XYZ, white having Y = 1."""
    columns = np.stack([_xyz(point) for point in primaries[:3]], 1)
    return columns * np.linalg.solve(columns, _xyz(_WHITES[primaries[3]]))


def _xyz(point: tuple[float, float]) -> NumpyArray:
    """Returns XYZ with Y = 1 of a chromaticity x, y."""
    x, y = point
    return np.array([x / y, 1, (1 - x - y) / y])
