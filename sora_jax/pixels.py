"""From what a model makes to pixels: clipped, rounded, and refused where it is not finite.

A cast to uint8 takes NaN for a number (0 on most machines), so a sample that diverged would be a black picture. Other
values are clipped: samplers overshoot, and the nearest pixel is what such a value means.
"""

from __future__ import annotations

import numpy as np

from sora_jax.array_types import Float, NumpyArray

RGB = 3
"""Channels of a pixel."""


def to_pixels(values: Float[np.ndarray, "*shape"], what: str = "the samples") -> NumpyArray:
    """Returns values in [-1, 1] as uint8 pixels; what lies outside is clipped.

    Args:
        values: of any shape.
        what: they are, for the message.

    Raises:
        FloatingPointError: a value that is NaN or infinite.
    """
    values = np.asarray(values)
    if not np.isfinite(values).all():
        share = 1 - np.isfinite(values).mean()
        raise FloatingPointError(f"{what} are not finite: {share:.0%} of their values are NaN or infinite.")
    return np.round((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)


def from_pixels(pixels: NumpyArray) -> Float[np.ndarray, "*shape"]:
    """Returns uint8 pixels as float32 values in [-1, 1].

    Raises:
        ValueError: pixels of another dtype.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, got {pixels.dtype}.")
    return pixels.astype(np.float32) / 127.5 - 1


def check_steps(first_bad: NumpyArray, names: list[str], num_steps: int, advice: str) -> None:
    """Raises where samples diverged on their way.

    Args:
        first_bad: (N,), of each sample the step, counted from 0, after which it had diverged; -1 for never (see
            `sora_jax.diffusion.samplers.State`).
        names: N, what messages call the samples.
        num_steps: of the sampler.
        advice: what to change.

    Raises:
        FloatingPointError: a sample that did; the message names the first of them, its step and their number.
    """
    bad = np.flatnonzero(first_bad >= 0)
    if len(bad):
        raise FloatingPointError(
            f"the samples are not finite: {names[bad[0]]} is NaN or beyond 1e19 from step "
            f"{first_bad[bad[0]] + 1} of {num_steps} on ({len(bad)} of {len(names)} samples are); {advice}."
        )
