"""Reads files of pictures and animations with Pillow, with their alpha channel."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image, ImageOps

from sora_jax.data.decode import BROKEN_PICTURE, UnreadableClipError, constant_rate, flatten


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
    except BROKEN_PICTURE as error:
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
