"""Reads files of pictures and animations, upright and in sRGB (see `picture_files` and `colors`).

Every picture is turned and mirrored as its EXIF says, by each of the eight values, and so is each frame of an
animation, as browsers do. AVIF and HEIC say it once more, in properties of their own, which alone count there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from PIL import Image

from sora_jax.data.colors import flatten, to_srgb
from sora_jax.data.decode import constant_rate
from sora_jax.data.errors import UnreadableClipError
from sora_jax.data.picture_files import ANIMATED, BROKEN_PICTURE, open_picture, upright


def iterate_animation(
    path: str, note: Callable[[str], None] = lambda kind: None
) -> Iterator[tuple[Image.Image, float]]:
    """Decodes a picture or an animation frame by frame, with its alpha channel.

    Args:
        path: a file that `open_picture` knows.
        note: called for each frame whose colours are converted, with what from.

    Yields:
        RGB or RGBA pictures of one size, and how long each is shown, in milliseconds. Frames of at most 10 ms are
        shown for 100, as in browsers. A default picture of an APNG that is not part of its animation is passed over.

    Raises:
        UnreadableClipError: the file is empty, truncated, not a picture, or of a kind or colours that are not read.
    """
    with _named(), open(path, "rb") as stream, open_picture(stream, path) as image:
        size = None
        for i in _moments(image):
            if image.tell() != i:
                image.seek(i)
            image.load()
            duration = float(image.info.get("duration") or 0)
            picture = upright(to_srgb(image, note), image)
            size = size or picture.size
            if picture.size != size:
                raise UnreadableClipError(
                    f"changes its size: frame {i} is {picture.width}x{picture.height} pixels, the clip is "
                    f"{size[0]}x{size[1]}"
                )
            # Never the image itself, whose pixels change with the next frame.
            yield picture.copy() if picture is image else picture, duration if duration > 10 else 100.0


def open_animation(path: str, note: Callable[[str], None] = lambda kind: None) -> tuple[float, Iterator[Image.Image]]:
    """Opens a picture or an animation as a clip at a constant rate; it is decoded twice, so that memory holds a frame.

    Args:
        path: a file that `open_picture` knows.
        note: as of `iterate_animation`.

    Returns:
        The rate in frames a second (`STILL_FPS` for a single picture) and an iterator over RGB pictures of one size,
        transparent pixels laid over white. A picture that stands for several frames comes as the same object again.

    Raises:
        UnreadableClipError: as of `iterate_animation` and `constant_rate`.
    """
    indices, fps = constant_rate([duration for _, duration in iterate_animation(path)])

    def pictures() -> Iterator[Image.Image]:
        frames = enumerate(flatten(picture) for picture, _ in iterate_animation(path, note))
        at, picture = next(frames)
        for index in indices:
            while at < index:
                at, picture = next(frames)
            yield picture

    return fps, pictures()


def decode_animation(path: str) -> tuple[list[Image.Image], float]:
    """Decodes a whole picture or animation with its alpha channel, at a constant rate; see `constant_rate`.

    Args:
        path: a file that `open_picture` knows.

    Returns:
        RGBA pictures of one size, and their rate in frames a second (`STILL_FPS` for a single picture).

    Raises:
        UnreadableClipError: as of `iterate_animation` and `constant_rate`.
    """
    frames, durations = zip(*iterate_animation(path), strict=True)
    indices, fps = constant_rate(durations)
    frames = [frame.convert("RGBA") for frame in frames]
    return [frames[i] for i in indices], fps


def read_picture(stream: BinaryIO, name: str = "") -> Image.Image:
    """Reads a still as RGB, transparent pixels laid over white.

    Args:
        stream: of the file, at its beginning.
        name: of the file.

    Raises:
        UnreadableClipError: as of `iterate_animation`, or it is an animation.
    """
    with _named(), open_picture(stream, name) as image:
        moments = _moments(image)
        if len(moments) > 1:
            raise UnreadableClipError(f"is an animation of {len(moments)} frames, not a picture")
        image.seek(moments[0])
        image.load()
        return upright(flatten(image), image)


def _moments(image: Image.Image) -> range:
    """Returns the numbers of the frames that are moments of a clip."""
    if image.format not in ANIMATED:
        return range(image.tell(), image.tell() + 1)
    return range(bool(getattr(image, "default_image", False)), getattr(image, "n_frames", 1))


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Raises what Pillow raises on bad files as `UnreadableClipError`."""
    try:
        yield
    except UnreadableClipError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableClipError("not a picture that can be read") from error
    except Image.DecompressionBombError as error:
        raise UnreadableClipError(f"too large: {error}") from error
    except BROKEN_PICTURE as error:
        raise UnreadableClipError(f"cannot be decoded: {error}") from error
