"""Opens a file of a picture, an animation or a video, whichever it is by its content."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import av
from PIL import Image

from sora_jax.data.errors import UnreadableClipError
from sora_jax.data.picture_files import is_picture
from sora_jax.data.picture_sequences import sequence_format
from sora_jax.data.pictures import open_animation
from sora_jax.data.videos import iterate_video

# What FFmpeg reads although it is no video: text drawn as on a terminal, lists of other files, patterns of file names,
# and sounds that it turns into pictures.
_NO_VIDEOS = frozenset(
    {"tty", "concat", "ffmetadata", "image2", "image2pipe", "hls", "dash", "imf", "sdp", "vapoursynth"}
)


def open_media(
    path: str, note: Callable[[str], None] = lambda kind: None, **video_options: Any
) -> tuple[float, Iterator[Image.Image]]:
    """Opens a file as a clip.

    What Pillow knows by its content is a picture or an animation (`picture_files`), whatever the name, unless it is a
    video of pictures one straight after the other (`picture_sequences`); anything else is tried as a video.

    Args:
        path: of a local file.
        note: called with what was done to the pictures, such as a conversion of colours.
        video_options: further arguments of `iterate_video`.

    Returns:
        The rate in frames a second (`STILL_FPS` for a still) and an iterator over RGB pictures of one size.

    Raises:
        UnreadableClipError: at once or from the iterator: the file is empty, truncated, or none of these.
    """
    try:
        if os.path.getsize(path) == 0:
            raise UnreadableClipError("is empty")
        with open(path, "rb") as stream:
            picture = is_picture(stream, path)
        sequence = sequence_format(path) if picture else None
    except OSError as error:
        raise UnreadableClipError(f"cannot be opened: {error.strerror or error}") from error
    if sequence is not None:
        return iterate_video(path, note=note, container_format=sequence, **video_options)
    if picture:
        return open_animation(path, note)
    _check_container(path)
    return iterate_video(path, note=note, **video_options)


def _check_container(path: str) -> None:
    """Raises UnreadableClipError for what FFmpeg reads although it is no video."""
    try:
        with av.open(path, metadata_errors="replace") as container:
            kind = container.format.name
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnreadableClipError(f"not a video or a picture that can be read: {reason}") from error
    if kind.endswith("_pipe"):
        raise UnreadableClipError(f"a picture of a kind that is not read: {kind.removesuffix('_pipe')}, or damaged")
    if kind in _NO_VIDEOS:
        raise UnreadableClipError(f"not a video or a picture: FFmpeg takes it for {kind}")
