"""Decodes stored frames, and what the readers of pictures and of videos share.

Transparent pixels are laid over white. A file that cannot be read whole raises `UnreadableClipError`, which says why;
nothing else escapes from a bad file.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sora_jax.array_types import NumpyArray

WHITE = (255, 255, 255)
STILL_FPS = 1.0
"""The frame rate that a still picture is stored with; its only frame lies at time 0 whatever the rate."""

# What Pillow raises on bad files; its GIF reader lets an IndexError out where the file ends inside a header.
BROKEN_PICTURE = (
    OSError,
    EOFError,
    IndexError,
    SyntaxError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)


class UnreadableClipError(ValueError):
    """A file that holds no whole clip: empty, truncated, or not a picture, an animation or a video."""


def decode_frames(encoded: Sequence[bytes], height: int, width: int) -> NumpyArray:
    """Decodes pictures and resizes each to one size with an antialiasing filter.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that still covers the asked size (libjpeg's scaled DCT),
    which costs a fraction of decoding it whole.

    Args:
        encoded: T encoded pictures, of any format that Pillow reads.
        height: of every frame returned, in pixels.
        width: of every frame returned, in pixels.

    Returns:
        (T, height, width, 3) uint8 RGB, transparent pixels laid over white.

    Raises:
        ValueError: `height` or `width` is not positive.
        UnreadableClipError: a picture cannot be decoded; the message gives its index.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be positive, got {height} x {width}.")
    frames = np.empty((len(encoded), height, width, 3), np.uint8)
    for i, data in enumerate(encoded):
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.draft("RGB", (width, height))  # only JPEG has drafts; a draft is never smaller than asked
                frame = flatten(image)
        except BROKEN_PICTURE as error:
            raise UnreadableClipError(f"frame {i} of {len(encoded)} cannot be decoded: {error}") from error
        if frame.size != (width, height):
            frame = frame.resize((width, height), Image.Resampling.BICUBIC)  # Pillow widens the filter to antialias
        frames[i] = np.asarray(frame)
    return frames


def flatten(image: Image.Image) -> Image.Image:
    """Returns any Pillow image as RGB, its transparent pixels laid over white, 16-bit grey brought to 8 bits."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("RGB", "L"):
        if "transparency" not in image.info:
            return image.convert("RGB")
    elif image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def constant_rate(durations: Sequence[float]) -> tuple[list[int], float]:
    """Lays an animation out at a constant rate, that of its median duration.

    Args:
        durations: how long each frame is shown, positive, in milliseconds.

    Returns:
        The index of the frame shown in the middle of each interval of 1 / fps, which is 0 ... T - 1 where every
        frame lasts the same, and fps, in frames a second (`STILL_FPS` for a single frame).
    """
    if len(durations) == 1:
        return [0], STILL_FPS
    ends = np.cumsum(np.asarray(durations, np.float64))
    step = float(np.median(durations))
    count = max(1, round(ends[-1] / step))
    # In the middle, rounding never decides between two neighbours of equal length.
    times = np.minimum((np.arange(count) + 0.5) * step, np.nextafter(ends[-1], 0))
    return np.searchsorted(ends, times, side="right").tolist(), 1000.0 / step
