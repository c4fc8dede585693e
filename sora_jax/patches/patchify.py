"""Clips to spacetime patches and back.

A clip (T, H, W, C) is cut into a grid of (gt, gh, gw) patches of (pt, ph, pw) cells; patches run in the order
t, y, x, and the values of a patch in the order t, y, x, channel (the tubelets of arXiv:2103.15691, Fig. 3).
A clip whose frames do not fill its last patches is continued by repeating the last frame, so that a still is a
clip of one frame whatever the temporal patch; the way back drops what was repeated.
"""

from __future__ import annotations

import math

import numpy as np
from einops import rearrange

from sora_jax.array_types import Array, Shaped

PatchSize = tuple[int, int, int]


def grid_shape(num_frames: int, height: int, width: int, patch_size: PatchSize) -> tuple[int, int, int]:
    """Returns (gt, gh, gw), the patches a clip has along time, height and width.

    Raises:
        ValueError: no frames, or a height or width that is not a positive multiple of the patch's.
    """
    pt, ph, pw = patch_size
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}.")
    for name, value, patch in (("height", height, ph), ("width", width, pw)):
        if value < patch or value % patch:
            below, above = max(value // patch, 1) * patch, (max(value, 0) // patch + 1) * patch
            works = f"{below}" if below == above else f"{below} or {above}"
            raise ValueError(f"{name} must be a multiple of the patch's {patch}, got {value}; {works} would work.")
    return math.ceil(num_frames / pt), height // ph, width // pw


def num_tokens(num_frames: int, height: int, width: int, patch_size: PatchSize) -> int:
    """Returns the number of patches of a clip; raises like `grid_shape`."""
    return math.prod(grid_shape(num_frames, height, width, patch_size))


def patchify(
    clip: Shaped[Array, "frames height width channels"], patch_size: PatchSize
) -> Shaped[Array, "patches values"]:
    """Cuts a clip into patches.

    Args:
        clip: (T, H, W, C), of any dtype.
        patch_size: (pt, ph, pw).

    Returns:
        (gt * gh * gw, pt * ph * pw * C), of the clip's dtype.

    Raises:
        ValueError: like `grid_shape`.
    """
    pt, ph, pw = patch_size
    gt, _, _ = grid_shape(*clip.shape[:3], patch_size)
    frames = np.minimum(np.arange(gt * pt), clip.shape[0] - 1)
    return rearrange(clip[frames], "(gt pt) (gh ph) (gw pw) c -> (gt gh gw) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(
    patches: Shaped[Array, "patches values"],
    num_frames: int,
    height: int,
    width: int,
    patch_size: PatchSize,
    channels: int,
) -> Shaped[Array, "frames height width channels"]:
    """Puts patches together again: the inverse of `patchify`.

    Args:
        patches: (gt * gh * gw, pt * ph * pw * C).
        num_frames: T; frames that only fill the last patch are dropped.
        height: H, in cells.
        width: W, in cells.
        patch_size: (pt, ph, pw).
        channels: C.

    Returns:
        (T, H, W, C).

    Raises:
        ValueError: like `grid_shape`, or patches that do not make such a clip.
    """
    pt, ph, pw = patch_size
    gt, gh, gw = grid_shape(num_frames, height, width, patch_size)
    expected = (gt * gh * gw, pt * ph * pw * channels)
    if tuple(patches.shape) != expected:
        raise ValueError(f"patches must have shape {expected} for this clip, got {tuple(patches.shape)}.")
    clip = rearrange(
        patches,
        "(gt gh gw) (pt ph pw c) -> (gt pt) (gh ph) (gw pw) c",
        gt=gt, gh=gh, gw=gw, pt=pt, ph=ph, pw=pw,
    )  # fmt: skip
    return clip[:num_frames]
