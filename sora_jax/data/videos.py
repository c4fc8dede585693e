"""Reads video files with PyAV, frame by frame, as RGB pictures at a constant rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from PIL import Image

from sora_jax.array_types import NumpyArray
from sora_jax.data.decode import UnreadableClipError, flatten

_LEAST_SHARE = 0.9  # a video that ends before this share of what its header promises is truncated


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
