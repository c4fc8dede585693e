"""Decodes stored frames, and the files that data sets are prepared from, to 8-bit RGB.

PyAV reads videos and Pillow reads pictures and animations. Transparent pixels are laid over white. A file that
cannot be read whole raises `UnreadableClipError`, which says why; nothing else escapes from a bad file.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

from sora_jax.array_types import NumpyArray

WHITE = (255, 255, 255)
STILL_FPS = 1.0
"""The frame rate that a still picture is stored with; its only frame lies at time 0 whatever the rate."""

# What Pillow raises on bad files; its GIF reader lets an IndexError out where the file ends inside a header.
_BROKEN_PICTURE = (
    OSError,
    EOFError,
    IndexError,
    SyntaxError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)
_LEAST_SHARE = 0.9  # a video that ends before this share of what its header promises is truncated


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
        except _BROKEN_PICTURE as error:
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


def decode_video(path: str) -> tuple[NumpyArray, float]:
    """Decodes a whole video at its own size; see `iterate_video`.

    Returns:
        (T, H, W, 3) uint8 RGB frames and their rate in frames a second.
    """
    fps, frames = iterate_video(path)
    return np.stack([np.asarray(frame) for frame in frames]), fps


def iterate_video(path: str) -> tuple[float, Iterator[Image.Image]]:
    """Opens a video and decodes it frame by frame, so that its length does not bound the memory.

    Frames are laid out at a constant rate: at time i / fps stands the last frame shown by then, so a variable frame
    rate keeps its timing. Non-square pixels are made square by widening, and a rotation noted in the file is applied.

    Args:
        path: a file of any container and codec that PyAV reads.

    Returns:
        The rate in frames a second and an iterator over RGB pictures of one size.

    Raises:
        UnreadableClipError: at once where the file holds no video stream, later (from the iterator) where a frame
            cannot be decoded or the video ends before 90% of the length its header gives.
    """
    try:
        container = av.open(path)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UnreadableClipError(f"not a video that can be read: {error}") from error
    if not container.streams.video:
        container.close()
        raise UnreadableClipError("holds no video stream")
    stream = container.streams.video[0]
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        container.close()
        raise UnreadableClipError("gives no frame rate")
    return float(rate), _video_frames(container, stream, float(rate))


def _video_frames(container: Any, stream: Any, fps: float) -> Iterator[Image.Image]:
    """Yields the pictures of `iterate_video` and closes the container."""
    stream.thread_type = "AUTO"
    promised = _promised_seconds(stream)
    aspect = stream.sample_aspect_ratio
    start, shown, count, end = None, None, 0, 0.0
    try:
        for frame in container.decode(stream):
            # Containers without timestamps give None: such frames follow each other at the nominal rate.
            seconds = end if frame.time is None else float(frame.time)
            start = seconds if start is None else start
            end = seconds - start + 1 / fps
            # Instants before this frame belong to the one shown until now (half a frame's tolerance for rounding).
            while shown is not None and count < round((seconds - start) * fps):
                yield shown
                count += 1
            shown = _upright(frame, aspect)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UnreadableClipError(f"cannot be decoded after {count} frames: {error}") from error
    finally:
        container.close()
    if shown is None:
        raise UnreadableClipError("holds no frame")
    if promised and end < _LEAST_SHARE * promised:
        raise UnreadableClipError(f"is truncated: {end:.2f} of {promised:.2f} seconds can be decoded")
    yield shown


def _promised_seconds(stream: Any) -> float | None:
    """Returns the length that the header gives the video stream, None where it gives none."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "")  # Matroska and WebM: "00:00:05.000000000"
    parts = tag.split(":")
    if len(parts) != 3:
        return None
    hours, minutes, seconds = parts
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _upright(frame: Any, sample_aspect: Any) -> Image.Image:
    """Returns a decoded frame as RGB with square pixels, turned as the file asks."""
    kind = "rgba" if any(component.is_alpha for component in frame.format.components) else "rgb24"
    image = flatten(Image.fromarray(frame.to_ndarray(format=kind)))
    if sample_aspect and sample_aspect != 1:
        image = image.resize((max(1, round(image.width * float(sample_aspect))), image.height))
    turn = getattr(frame, "rotation", 0) % 360
    return image.rotate(turn, expand=True) if turn else image


def iterate_animation(path: str) -> Iterator[tuple[Image.Image, float]]:
    """Decodes a picture or an animation (WebP, GIF, APNG ...) frame by frame, with its alpha channel.

    Args:
        path: a file that Pillow reads.

    Yields:
        RGBA pictures of one size, and how long each is shown, in milliseconds.

    Raises:
        UnreadableClipError: the file is empty, truncated or not a picture.
    """
    try:
        with Image.open(path) as image:
            count = getattr(image, "n_frames", 1)
            for i in range(count):
                image.seek(i)
                image.load()
                duration = float(image.info.get("duration") or 0)
                # A still is turned as its camera noted. Browsers show frames of at most 10 ms for 100 ms.
                picture = ImageOps.exif_transpose(image) if count == 1 else image
                yield _with_alpha(picture), duration if duration > 10 else 100.0
    except _BROKEN_PICTURE as error:
        raise UnreadableClipError(f"cannot be decoded: {error}") from error


def decode_animation(path: str) -> tuple[list[Image.Image], float]:
    """Decodes a whole picture or animation with its alpha channel, at a constant rate; see `constant_rate`.

    Args:
        path: a file that Pillow reads.

    Returns:
        RGBA pictures of one size, and their rate in frames a second (`STILL_FPS` for a single picture).

    Raises:
        UnreadableClipError: the file is empty, truncated or not a picture.
    """
    frames, durations = zip(*iterate_animation(path), strict=True)
    indices, fps = constant_rate(durations)
    return [frames[i] for i in indices], fps


def _with_alpha(image: Image.Image) -> Image.Image:
    """Returns a new RGBA picture."""
    return flatten(image).convert("RGBA") if image.mode.startswith("I;16") else image.convert("RGBA").copy()


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
