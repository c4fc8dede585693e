"""Matrices in few bits: symmetric integers in groups that share a scale, packed without gaps.

    (1)  w ~ scale (code - 2^(bits - 1)),   scale = max |w| of the group / (2^(bits - 1) - 1)
    (2)  eight codes of `bits` bits are `bits` bytes; code i starts at bit i * bits of that little-endian number

A quantised tensor called NAME is stored as `NAME.codes<bits>`, (..., groups, group * bits / 8) uint8, and
`NAME.scale`, (..., groups) float16, so that the two names and shapes say everything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from sora_jax.array_types import NumpyArray

MAX_BITS = 8


def pack_bits(codes: NumpyArray, bits: int) -> NumpyArray:
    """Packs codes of `bits` bits without gaps (equation 2).

    Args:
        codes: (..., n) uint8 below 2^bits; n is a multiple of 8.
        bits: 2 to 8.

    Returns:
        (..., n * bits / 8) uint8.

    Raises:
        ValueError: `bits` out of range, n not a multiple of 8, or a code that needs more bits.
    """
    _check_bits(bits)
    if codes.shape[-1] % 8:
        raise ValueError(f"the last axis of codes must be a multiple of 8, got shape {codes.shape}.")
    if codes.size and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes must be below 2^{bits}, got {codes.max()}.")
    eights = codes.reshape(-1, 8).astype("<u8")
    words = np.zeros(len(eights), "<u8")
    for i in range(8):
        words |= eights[:, i] << np.uint64(bits * i)
    packed = words.view(np.uint8).reshape(-1, 8)[:, :bits]
    return packed.reshape(*codes.shape[:-1], codes.shape[-1] * bits // 8)


def unpack_bits(packed: NumpyArray, bits: int) -> NumpyArray:
    """Undoes `pack_bits`.

    Args:
        packed: (..., m) uint8; m is a multiple of `bits`.
        bits: 2 to 8.

    Returns:
        (..., m * 8 / bits) uint8.

    Raises:
        ValueError: `bits` out of range, or m not a multiple of it.
    """
    _check_bits(bits)
    if packed.shape[-1] % bits:
        raise ValueError(f"the last axis of packed must be a multiple of bits = {bits}, got shape {packed.shape}.")
    padded = np.zeros((packed.size // bits, 8), np.uint8)
    padded[:, :bits] = packed.reshape(-1, bits)
    words = padded.view("<u8")[:, 0]
    codes = np.empty((len(words), 8), np.uint8)
    for i in range(8):
        codes[:, i] = (words >> np.uint64(bits * i)) & np.uint64(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] // bits * 8)


def quantize(weights: NumpyArray, bits: int, group: int) -> tuple[NumpyArray, NumpyArray]:
    """Quantises by equation 1, in groups along the last axis.

    Args:
        weights: (..., n) float; n is a multiple of `group`.
        bits: 2 to 8.
        group: values that share a scale, a multiple of 8.

    Returns:
        Packed codes (..., n / group, group * bits / 8) uint8 and scales (..., n / group) float16.

    Raises:
        ValueError: `bits` out of range, or sizes that do not divide.
    """
    _check_bits(bits)
    if group % 8 or weights.shape[-1] % group:
        raise ValueError(f"group must be a multiple of 8 that divides {weights.shape[-1]}, got {group}.")
    # C order, which files assume, whatever view `weights` is.
    groups = np.ascontiguousarray(weights, np.float32).reshape(*weights.shape[:-1], -1, group)
    top = 2 ** (bits - 1) - 1
    scale = (np.abs(groups).max(-1) / top).astype(np.float16)
    safe = np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
    codes = np.clip(np.round(groups / safe), -top - 1, top) + (top + 1)
    return pack_bits(codes.astype(np.uint8), bits), scale


def dequantize(packed: NumpyArray, scale: NumpyArray, bits: int) -> NumpyArray:
    """Undoes `quantize`, up to rounding.

    Args:
        packed: (..., groups, group * bits / 8) uint8.
        scale: (..., groups) float16.
        bits: 2 to 8.

    Returns:
        (..., groups * group) float32.

    Raises:
        ValueError: shapes that do not fit.
    """
    if packed.shape[:-1] != scale.shape:
        raise ValueError(f"codes of shape {packed.shape} need scales of shape {packed.shape[:-1]}, got {scale.shape}.")
    values = unpack_bits(packed, bits).astype(np.float32)
    values -= 2 ** (bits - 1)
    values *= scale.astype(np.float32)[..., None]
    return values.reshape(*scale.shape[:-1], -1)


def quantize_tensors(
    tensors: Mapping[str, NumpyArray], formats: Mapping[str, tuple[int, int]]
) -> dict[str, NumpyArray]:
    """Returns the stored form of named tensors: those in `formats` (bits, group) quantised, the others float32."""
    stored = {}
    for name, value in tensors.items():
        if name in formats:
            bits, group = formats[name]
            stored[f"{name}.codes{bits}"], stored[f"{name}.scale"] = quantize(value, bits, group)
        else:
            stored[name] = np.ascontiguousarray(value, np.float32)
    return stored


def dequantize_tensors(stored: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
    """Undoes `quantize_tensors`.

    Raises:
        ValueError: codes without their scale.
    """
    tensors = {}
    coded = {match[1]: int(match[2]) for match in (re.fullmatch(r"(.+)\.codes(\d)", name) for name in stored) if match}
    for name, bits in coded.items():
        if f"{name}.scale" not in stored:
            raise ValueError(f"{name}.codes{bits} has no {name}.scale.")
        tensors[name] = dequantize(stored[f"{name}.codes{bits}"], stored[f"{name}.scale"], bits)
    parts = {f"{name}.codes{bits}" for name, bits in coded.items()} | {f"{name}.scale" for name in coded}
    return tensors | {name: np.asarray(value, np.float32) for name, value in stored.items() if name not in parts}


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be between 2 and {MAX_BITS}, got {bits}.")
