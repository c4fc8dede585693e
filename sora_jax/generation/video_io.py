"""Clips to files: H.264 videos, PNG pictures and contact sheets. Every file is written whole or not at all."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from sora_jax.files import write_whole

VIEWING_SIZE = 256  # small clips are enlarged to a long side of at least this, in pixels
LONGEST_SIDE = 16_384  # that H.264's encoder takes, in pixels
SLOWEST, FASTEST = 0.01, 1000.0  # frames a second that stand in an mp4 to within a thousandth
MARGIN = 4
FONT_SIZE = 14


def viewing_scale(height: int, width: int, scale: int | None = None) -> int:
    """Returns the whole factor that a clip is enlarged by: `scale`, or what makes its long side `VIEWING_SIZE`.

    Raises:
        ValueError: a `scale` below 1, or one that makes the long side longer than `LONGEST_SIDE`.
    """
    long_side = max(height, width)
    if scale is None:
        return max(1, -(-VIEWING_SIZE // long_side))
    if scale < 1:
        raise ValueError(f"scale must be a whole number of at least 1, got {scale}.")
    if scale > 1 and scale * long_side > LONGEST_SIDE:
        most = max(1, LONGEST_SIDE // long_side)
        raise ValueError(f"scale must be at most {most} for {height} x {width} pixels, got {scale}.")
    return scale


def frame_rate(fps: float) -> Fraction:
    """Returns frames a second as a video stores them; ValueError outside `SLOWEST` to `FASTEST`."""
    if not SLOWEST <= fps <= FASTEST:
        raise ValueError(f"fps must be between {SLOWEST:g} and {FASTEST:g} in a video, got {fps:g}.")
    return Fraction(fps).limit_denominator(1001)


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """Returns (T, H, W, 3) frames with every pixel repeated `scale` times along height and width."""
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def write_video(path: str | epath.PathLike, frames: np.ndarray, fps: float, scale: int | None = None) -> epath.Path:
    """Writes an mp4 (H.264, 4:2:0, which every player reads; it names BT.709, which players would guess by its size).

    Args:
        path: ends in .mp4; its directory is made.
        frames: (T, H, W, 3) uint8. An odd height or width is filled up by repeating the last row or column, because
            4:2:0 halves the colours.
        fps: frames a second, `SLOWEST` to `FASTEST`.
        scale: factor by which pixels are repeated (None: so that the long side is at least `VIEWING_SIZE`).

    Returns:
        The path.

    Raises:
        ValueError: frames of another shape or dtype, none at all, a rate out of range, or a bad scale.
    """
    frames, rate = _check_frames(frames), frame_rate(fps)
    import av

    frames = enlarge(frames, viewing_scale(*frames.shape[1:3], scale))
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709 in all three (ISO/IEC 23091-2)
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
    return write_whole(path, buffer.getvalue())


def write_image(path: str | epath.PathLike, image: np.ndarray, scale: int | None = 1) -> epath.Path:
    """Writes a PNG; `image` is (H, W, 3) uint8, `scale` as in `write_video`. Returns the path."""
    frames = _check_frames(np.asarray(image)[None])
    buffer = io.BytesIO()
    Image.fromarray(enlarge(frames, viewing_scale(*frames.shape[1:3], scale))[0]).save(buffer, format="png")
    return write_whole(path, buffer.getvalue())


def contact_sheet(
    clips: Sequence[Sequence[np.ndarray]], captions: Sequence[str], columns: int = 8, cell: int = 96
) -> np.ndarray:
    """Draws clips as rows of frames, captions above; images alone, if their captions are short, stand side by side.

    Args:
        clips: (T, H, W, 3) uint8 each, or lists of (H, W, 3) frames; a clip of more frames than `columns` shows evenly
            spaced ones, the first and last included.
        captions: one a clip.
        columns: most frames across.
        cell: side of the square that a frame is enlarged or made smaller to fit in, in pixels; the aspect is kept.

    Returns:
        (height, width, 3) uint8: a white sheet of `rows * (cell + caption + margin)` by
        `columns used * (cell + margin)`, up to margins.

    Raises:
        ValueError: no clips, as many captions as clips not given, or columns or cell below 1.
    """
    if not len(clips) or len(clips) != len(captions):
        raise ValueError(f"a sheet needs clips and a caption for each, got {len(clips)} and {len(captions)}.")
    if columns < 1 or cell < 1:
        raise ValueError(f"columns and cell must be at least 1, got {columns} and {cell}.")
    font = ImageFont.load_default(FONT_SIZE)
    shown = []
    for clip in clips:
        indices = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        shown.append([_fit(clip[i], cell) for i in indices])
    line = FONT_SIZE + MARGIN
    captions = [" ".join(caption.split()) for caption in captions]
    images = max(map(len, shown)) == 1 < len(shown) and max(map(font.getlength, captions)) <= cell
    # One short clip must still leave room for its caption.
    across = 1 if images else max(max(map(len, shown)), min(columns, 2))
    side_by_side = min(columns, len(shown)) if images else 1
    step_x, step_y = across * (cell + MARGIN), line + cell + MARGIN
    size = (MARGIN + side_by_side * step_x, MARGIN + math.ceil(len(shown) / side_by_side) * step_y)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, (caption, frames) in enumerate(zip(captions, shown, strict=True)):
        left, top = MARGIN + index % side_by_side * step_x, MARGIN + index // side_by_side * step_y
        draw.text((left, top), _shorten(caption, draw, font, step_x - MARGIN), fill="black", font=font)
        for column, frame in enumerate(frames):
            sheet.paste(frame, (left + column * (cell + MARGIN), top + line))
    return np.asarray(sheet)


def _fit(frame: np.ndarray, cell: int) -> Image.Image:
    """Returns a frame whose long side is `cell`: pixels stay visible when enlarged, and are averaged otherwise."""
    image = Image.fromarray(frame)
    ratio = cell / max(image.size)
    size = tuple(max(1, round(n * ratio)) for n in image.size)
    return image.resize(size, Image.Resampling.NEAREST if ratio >= 1 else Image.Resampling.LANCZOS)


def _shorten(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont, width: int) -> str:
    """Returns `text`, one line, cut with dots where it is wider than `width` pixels."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def _check_frames(frames: np.ndarray) -> np.ndarray:
    """Returns `frames`, which must be (T, H, W, 3) uint8."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"frames must be a non-empty (T, H, W, 3) uint8 array, got {frames.shape} {frames.dtype}.")
    return frames
