"""Reads video files with PyAV, frame by frame, as upright sRGB pictures at a constant rate."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.stream import Disposition
from PIL import Image

from sora_jax.array_types import NumpyArray
from sora_jax.data.decode import UnreadableClipError
from sora_jax.data.video_color import to_picture
from sora_jax.data.video_time import Packets, Schedule, lay_out, plan, shown_in_turn, tag

Interlaced = Literal["deinterlace", "keep", "skip"]
"""What is done with interlaced video."""

MOST_PIXELS = 1 << 26
"""Pixels of the largest frame that is read (8192 x 8192)."""

_BOUNDS = {"max_pixels": str(MOST_PIXELS)}  # of FFmpeg's decoders
_WIDEST_PIXEL = 10.0  # times as wide as high, or the other way round; beyond that the file is damaged
_NOT_THE_VIDEO = (
    Disposition.attached_pic
    | Disposition.timed_thumbnails
    | Disposition.still_image
    | Disposition.metadata
    | Disposition.dependent
)
_DECODERS_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own drop the alpha of WebM


def decode_video(path: str, interlaced: Interlaced = "deinterlace") -> tuple[NumpyArray, float]:
    """Decodes a whole video at its own size; see `iterate_video`.

    Returns:
        (T, H, W, 3) uint8 RGB frames and their rate in frames a second.
    """
    fps, frames = iterate_video(path, interlaced)
    return np.stack([np.asarray(frame) for frame in frames]), fps


def iterate_video(
    path: str,
    interlaced: Interlaced = "deinterlace",
    note: Callable[[str], None] = lambda kind: None,
    container_format: str | None = None,
) -> tuple[float, Iterator[Image.Image]]:
    """Opens a video and decodes it frame by frame, so that its length does not bound the memory.

    The video is the stream that is neither a cover, nor thumbnails or metadata, by its disposition. Among several it is
    one of more than a single picture and of at least a tenth as many as any other (covers and thumbnails are not always
    marked), then one marked as default, then the largest, then the first.

    Frames are laid out at a constant rate, that of the video's motion: pauses keep their length, the first frame is the
    first picture, and the last picture stands as long as the file says (`video_time`). A video of a single picture is
    a still. Colours become sRGB, and transparent pixels white (`video_color`). Non-square pixels are made square by
    widening, and then the quarter turns and mirrors of the file's display matrix are applied.

    Args:
        path: a file of any container and codec that PyAV reads.
        interlaced: interlaced frames become whole pictures at the same rate (by FFmpeg's bwdif), stay as they are, or
            have the file refused.
        note: called, perhaps more than once, with what was done to the pictures: a conversion of colours,
            "deinterlaced" or "interlaced, kept so".
        container_format: FFmpeg's name of the file's format, None to find it by content and name.

    Returns:
        The rate in frames a second and an iterator over RGB pictures of one size.

    Raises:
        ValueError: `interlaced` is none of its values.
        UnreadableClipError: at once where the file holds no video stream, is truncated or has absurd timestamps or
            sizes; later (from the iterator) where a frame cannot be decoded or only with its damage concealed, is of
            another size, is turned by another angle, or has colours that are not converted.
    """
    if interlaced not in get_args(Interlaced):
        raise ValueError(f"interlaced must be one of {', '.join(get_args(Interlaced))}, got {interlaced!r}.")
    with _open(path, container_format) as container, _named("cannot be read"):
        index, packets = _choose(container, os.path.getsize(path))
        stream = container.streams[index]
        _check_size(stream.codec_context.width, stream.codec_context.height)
        schedule = plan(path, container, stream, packets)
    return schedule.fps, _pictures(path, container_format, index, schedule, interlaced, note)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Raises what PyAV and Pillow raise on bad files as `UnreadableClipError`."""
    try:
        yield
    except UnreadableClipError:
        raise
    except (av.error.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise UnreadableClipError(f"{what}: {error}") from error


def _open(path: str, container_format: str | None) -> Any:
    """Opens a file with PyAV."""
    with _named("not a video that can be read"):
        return av.open(path, format=container_format, metadata_errors="replace", options=_BOUNDS)


def _choose(container: Any, num_bytes: int) -> tuple[int, Packets]:
    """Reads all packets and returns the index of the video's stream and what its packets say."""
    streams = [s for s in container.streams.video if not s.disposition & _NOT_THE_VIDEO]
    if not streams:
        raise UnreadableClipError("holds no video stream")
    packets = {stream.index: Packets(shown_in_turn(container)) for stream in streams}
    damaged, count = set(), 0
    for packet in container.demux(streams):
        count += 1
        if count > num_bytes:
            raise UnreadableClipError("is damaged: its header names more frames than it has bytes")
        if packet.size or packet.pts is not None or packet.dts is not None:  # the end of a stream has none of these
            packets[packet.stream_index].add(packet)
        if packet.is_corrupt:
            damaged.add(packet.stream_index)

    most = max(len(each.shown) for each in packets.values())

    def rank(stream: Any) -> tuple[bool, bool, int, int]:
        area = stream.codec_context.width * stream.codec_context.height if stream.codec_context else 0
        moves = len(packets[stream.index].shown) >= max(2, most / 10)
        return moves, bool(stream.disposition & Disposition.default), area, -stream.index

    best = max(streams, key=rank)
    if best.codec_context is None:
        raise UnreadableClipError("holds a video of a codec that cannot be decoded")
    if best.index in damaged:
        raise UnreadableClipError("is truncated or damaged: a frame is not all there")
    return best.index, packets[best.index]


def _check_size(width: int, height: int) -> None:
    """Raises UnreadableClipError for frames that would not fit in memory."""
    if width * height > MOST_PIXELS:
        raise UnreadableClipError(f"has damaged or too large frames: {width} x {height} pixels")


def _pictures(
    path: str,
    container_format: str | None,
    index: int,
    schedule: Schedule,
    interlaced: Interlaced,
    note: Callable[[str], None],
) -> Iterator[Image.Image]:
    """Yields the pictures of `iterate_video`."""
    with _open(path, container_format) as container:
        stream = container.streams[index]
        frames = _deinterlaced(_frames(container, stream, schedule.in_file_order), interlaced, note)
        yield from lay_out(_upright_frames(frames, stream.sample_aspect_ratio, note), schedule)


def _upright_frames(
    frames: Iterator[Any], aspect: Any, note: Callable[[str], None]
) -> Iterator[tuple[float | None, float, Image.Image]]:
    """Yields the time and the duration (0: unknown) of each frame in seconds, and its picture."""
    size = None
    for count in itertools.count():
        with _named(f"cannot be decoded: frame {count}"):
            frame = next(frames, None)
            if frame is None:
                return
            picture = upright(to_picture(frame, note), display_matrix(frame), aspect)
        size = size or picture.size
        if picture.size != size:
            old, new = (" x ".join(map(str, each)) for each in (size, picture.size))
            raise UnreadableClipError(f"changes its size: from {old} to {new} pixels")
        duration = float((frame.duration or 0) * (frame.time_base or 0))
        yield None if frame.time is None else float(frame.time), duration, picture


def _frames(container: Any, stream: Any, in_file_order: bool) -> Iterator[Any]:
    """Yields the decoded frames of a stream at their presentation times, with their alpha where it has some."""
    decoder = stream.codec_context
    if tag(stream, "alpha_mode") == "1" and decoder.name in _DECODERS_WITH_ALPHA:
        decoder = av.CodecContext.create(_DECODERS_WITH_ALPHA[decoder.name], "r")
    in_turn = shown_in_turn(container)
    # A frame names the packet that let it out only where frames are not decoded side by side.
    decoder.thread_type = "SLICE" if in_turn and decoder.has_b_frames else "AUTO"
    decoder.options = _BOUNDS
    times: collections.deque[int] = collections.deque()
    for packet in _decodable(container.demux(stream)):
        if in_file_order and packet.size and not packet.is_discard:
            times.append(packet.pts)
        for frame in decoder.decode(packet):
            if frame.is_corrupt:
                raise UnreadableClipError("is damaged: the decoder had to conceal a part of a frame")
            _check_size(frame.width, frame.height)
            if in_turn:
                frame.pts = frame.dts
            elif in_file_order:
                frame.pts = times.popleft() if times else None
            yield frame


def _decodable(packets: Iterator[Any]) -> Iterator[Any]:
    """Yields packets without the empty ones, which decoders refuse, except for the last, which ends the stream."""
    packet = None
    for packet in packets:
        if packet.size:
            yield packet
    if packet is not None and not packet.size:
        yield packet


def _deinterlaced(frames: Iterator[Any], interlaced: Interlaced, note: Callable[[str], None]) -> Iterator[Any]:
    """Yields frames, from the first interlaced one on through a filter that leaves the progressive ones alone."""
    graph = None
    for frame in frames:
        if frame.interlaced_frame:
            if interlaced == "skip":
                raise UnreadableClipError("is interlaced")
            note("deinterlaced" if interlaced == "deinterlace" else "interlaced, kept so")
            if interlaced == "deinterlace" and graph is None:
                graph = _filter(frame)
        if graph is None:
            yield frame
        else:
            graph.push(frame)
            yield from _pull(graph)
    if graph is not None:
        graph.push(None)
        yield from _pull(graph)


def _filter(frame: Any) -> Any:
    """Returns a graph that deinterlaces frames such as this one, giving one frame for each."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base, name="in"
    )
    deinterlace = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    sink = graph.add("buffersink")
    source.link_to(deinterlace)
    deinterlace.link_to(sink)
    graph.configure()
    return graph


def _pull(graph: Any) -> Iterator[Any]:
    """Yields what a filter graph has ready."""
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def display_matrix(frame: Any) -> tuple[int, ...] | None:
    """Returns the nine numbers of a frame's display matrix (ISO/IEC 14496-12, 8.3.2), None where it has none."""
    for data in SideDataContainer(frame):  # `frame.side_data` would make a cycle of references
        if data.type.name == "DISPLAYMATRIX":
            return tuple(np.frombuffer(bytes(data), np.int32)[:9].tolist())
    return None


def upright(picture: Image.Image, matrix: tuple[int, ...] | None, aspect: Any = None) -> Image.Image:
    """Returns a picture with square pixels, turned and mirrored as a player shows it.

    Args:
        picture: as it is stored.
        matrix: a, b, u, c, d, v, x, y, w: the point (p, q) is shown at (a p + c q + x, b p + d q + y). Its lengths do
            not count, only where the axes point.
        aspect: width of a stored pixel over its height (None or 0: 1).

    Raises:
        UnreadableClipError: the matrix is none of the eight that turn by quarters and mirror, or the pixels are more
            than ten times as wide as high or as high as wide.
    """
    if aspect and aspect != 1:
        if not 1 / _WIDEST_PIXEL <= aspect <= _WIDEST_PIXEL:
            raise UnreadableClipError(f"has damaged sizes: its pixels are {float(aspect):g} times as wide as high")
        width = max(1, round(picture.width * float(aspect)))
        _check_size(width, picture.height)
        picture = picture.resize((width, picture.height))
    if matrix is None:
        return picture
    a, b, _, c, d, *_ = matrix
    tolerance = 0.01 * max(map(abs, (a, b, c, d)))
    signs = tuple(0 if abs(value) <= tolerance else 1 if value > 0 else -1 for value in (a, b, c, d))
    if signs not in _TURNS:
        raise UnreadableClipError(f"is turned by no quarter of a circle: its display matrix is ({a}, {b}; {c}, {d})")
    turn = _TURNS[signs]
    return picture if turn is None else picture.transpose(turn)


_TURNS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # Pillow turns counter-clockwise
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
