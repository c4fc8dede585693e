"""Decodes stored frames, and what the readers of pictures and of videos share: above all the time of a clip.

A file that cannot be read whole raises `UnreadableClipError`, which says why; nothing else escapes from a bad file.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sora_jax.array_types import NumpyArray
from sora_jax.data.colors import WHITE, flatten
from sora_jax.data.errors import UnreadableClipError
from sora_jax.data.picture_files import BROKEN_PICTURE, open_picture, upright, upright_size

__all__ = [
    "BROKEN_PICTURE",
    "LEAST_FRAMES",
    "MOST_COPIES",
    "STILL_FPS",
    "WHITE",
    "UnreadableClipError",
    "constant_rate",
    "decode_frames",
    "flatten",
]

STILL_FPS = 1.0
"""The frame rate that a still picture is stored with; its only frame lies at time 0 whatever the rate."""

MOST_COPIES = 64
LEAST_FRAMES = 4096
"""A clip of T pictures is stored as 64 T frames at most, or 4096 where that is more (see `constant_rate`)."""


def decode_frames(
    encoded: Sequence[bytes], height: int, width: int, box: tuple[float, float, float, float] | None = None
) -> NumpyArray:
    """Decodes pictures and resizes each, or the same part of each, to one size with an antialiasing filter.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that still covers the asked size (libjpeg's scaled DCT),
    which costs a fraction of decoding it whole.

    Args:
        encoded: T encoded pictures, of any format that `open_picture` knows; each is turned as its EXIF says, and its
            colours become sRGB, as when a data set is prepared.
        height: of every frame returned, in pixels.
        width: of every frame returned, in pixels.
        box: (top, left, bottom, right) of the part, as shares of the picture's sides, upright (None: all of it).

    Returns:
        (T, height, width, 3) uint8 RGB, transparent pixels laid over white.

    Raises:
        ValueError: `height` or `width` is not positive.
        UnreadableClipError: a picture cannot be decoded; the message gives its index.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be positive, got {height} x {width}.")
    frames = np.empty((len(encoded), height, width, 3), np.uint8)
    top, left, bottom, right = box or (0.0, 0.0, 1.0, 1.0)
    least = math.ceil(height / (bottom - top)), math.ceil(width / (right - left))  # of the whole picture
    for i, data in enumerate(encoded):
        try:
            with open_picture(io.BytesIO(data)) as image:
                turned = upright_size(image) != image.size
                # Only JPEG has drafts; a draft is never smaller than asked.
                image.draft("RGB", least if turned else least[::-1])
                image.load()
                frame = upright(flatten(image), image)
        except BROKEN_PICTURE as error:
            raise UnreadableClipError(f"frame {i} of {len(encoded)} cannot be decoded: {error}") from error
        if box is not None:
            w, h = frame.size
            part = (left * w, top * h, right * w, bottom * h)
            frame = frame.resize((width, height), Image.Resampling.BICUBIC, box=part)
        elif frame.size != (width, height):
            frame = frame.resize((width, height), Image.Resampling.BICUBIC)  # Pillow widens the filter to antialias
        frames[i] = np.asarray(frame)
    return frames


def constant_rate(durations: Sequence[float]) -> tuple[list[int], float]:
    """Lays pictures that each stand for a time of their own out at one constant rate.

    Candidates for its interval are the mean duration, and low quantiles of the durations with the means of what is not
    much longer: so a pause costs no picture of a fast run beside it. Durations that no screen shows (under 1/240 s,
    where the mean is much longer) make none. At an interval, each picture has the nearest instant to its time that is
    free, and is lost where it would have been replaced by then; one that stands for an interval never is. Of the
    candidates that lose at most a hundredth of the pictures, the one with the least sum of two is taken: the share of
    its own length (or of the median one, where that is more) that a picture's length is off on average, beyond a
    rounding to hundredths of a second; and 0.1 for every frame stored a picture. Where there is none, the shortest is
    taken.

    Args:
        durations: how long each picture is shown, at least 0, in milliseconds.

    Returns:
        The index of the picture shown at each i / fps: it begins with 0, never decreases, is 0 ... T - 1 where every
        picture lasts the same, and lasts as long as the durations together, within one interval. And fps, in frames a
        second (`STILL_FPS` for a single picture).

    Raises:
        UnreadableClipError: the durations are no times, or so uneven that more than `MOST_COPIES` frames a picture (and
            more than `LEAST_FRAMES`) would be stored, as a corrupt time asks for.
    """
    times = np.asarray(durations, np.float64)
    if bad := [float(d) for d in times if not 0 <= d < np.inf]:
        raise UnreadableClipError(f"gives a picture a duration of {bad[0]} ms")
    if len(times) == 1:
        return [0], STILL_FPS
    if not times.any():
        raise UnreadableClipError("gives its pictures no time to stand")
    _, step = min((_cost(times, step), step) for step in _intervals(times))
    kept, instants, count = _lay_out(times, step)
    most = max(LEAST_FRAMES, MOST_COPIES * len(times))
    if count > most:
        raise UnreadableClipError(
            f"shows {len(times)} pictures in {times.sum() / 1000:.6g} seconds: at {1000 / step:.4g} a second these are "
            f"{count} frames, and at most {most} are stored; is one of its times damaged?"
        )
    shown = np.searchsorted(instants, np.arange(count), side="right") - 1
    return [kept[i] for i in shown], 1000.0 / step


def _intervals(times: NumpyArray) -> set[float]:
    """Returns the intervals that `constant_rate` tries, in milliseconds."""
    shown = times[times >= min(1000 / 240, times.mean() / 2)]
    short = [float(d) for d in np.quantile(shown, (0.01, 0.05, 0.1, 0.25, 0.5), method="lower")]
    return {float(times.mean()), *short, *(float(shown[shown <= 1.5 * d].mean()) for d in short)}


def _cost(times: NumpyArray, step: float) -> float:
    """Returns what `constant_rate` makes least."""
    kept, instants, count = _lay_out(times, step)
    if len(times) - len(kept) > len(times) // 100:
        return 1e9 + step  # the shortest, where every candidate loses pictures
    lengths = np.zeros(len(times))
    lengths[kept] = np.diff([*instants, count]) * step
    off = np.maximum(np.abs(lengths - times) - 5.0, 0.0)
    return float((off / np.maximum(times, np.median(times[times > 0]))).mean() + 0.1 * count / len(times))


def _lay_out(times: NumpyArray, step: float) -> tuple[list[int], list[int], int]:
    """Returns which pictures are not lost at an interval, their first instants, and how many instants there are."""
    kept, instants, begin = [0], [0], float(times[0]) / step
    for i, duration in enumerate((times[1:] / step).tolist(), 1):
        instant = max(instants[-1] + 1, int(begin + 0.5))
        begin += duration
        if instant < begin:
            kept.append(i)
            instants.append(instant)
    return kept, instants, max(instants[-1] + 1, int(begin + 0.5))
