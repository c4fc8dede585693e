"""When the pictures of a video are shown: read from its packets, which costs a fraction of decoding them.

Every packet has a time of its own. A video of a constant rate keeps it; another gets the rate that `constant_rate`
finds for its pictures, and `lay_out` holds a picture over a pause. A corrupt timestamp cannot ask for more than a
multiple of the pictures that a file holds, and a file that ends before what it declares is refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from sora_jax.data.decode import LEAST_FRAMES, MOST_COPIES, STILL_FPS, UnreadableClipError, constant_rate

FASTEST_FPS = 1000.0
"""Pictures that follow each other faster than this have damaged timestamps."""

_LEAST_KEPT, _MOST_REPEATED = 0.98, 1.05  # pictures kept, and frames a picture, at a rate that fits
_SLIGHT = 0.01  # rates that differ by less than this share are the same
_LEAST_SHARE = 0.9  # a video that ends before this share of what its header promises is truncated
_MOST_OVER = 1.1, 1.0  # share and seconds that the packets may go beyond the length in the header

# Containers whose lengths are written, not estimated from the timestamps or the size.
_WITH_LENGTH = {"mov", "matroska", "avi", "asf", "flv", "ivf", "mxf"}

# Containers that say when a packet is decoded, not when its picture is shown.
_WITHOUT_PRESENTATION = {"avi", "asf"}


@dataclasses.dataclass
class Packets:
    """What the packets of one stream say, in the order of the file.

    An empty packet means the picture before it again; it has a time, but nothing to decode.

    Attributes:
        in_turn: the container has no presentation times; see `shown_in_turn`.
        shown: presentation times in seconds, NaN where a packet has none.
        decoded: decoding times in seconds, NaN where a packet has none.
        last: presentation time (seconds) and duration (seconds, 0 where unknown) of the packet shown last.
        num_hidden: packets that an edit list hides; they have no times here.
        repeats: the packet shown last is empty.
    """

    in_turn: bool = False
    shown: list[float] = dataclasses.field(default_factory=list)
    decoded: list[float] = dataclasses.field(default_factory=list)
    last: tuple[float, float] = (-math.inf, 0.0)
    num_hidden: int = 0
    repeats: bool = False

    def add(self, packet: Any) -> None:
        """Counts a packet in."""
        if packet.is_discard:
            self.num_hidden += 1
            return
        base = packet.time_base or 0
        ticks = packet.dts if self.in_turn else packet.pts
        shown = math.nan if ticks is None else float(ticks * base)
        self.shown.append(shown)
        self.decoded.append(math.nan if packet.dts is None else float(packet.dts * base))
        if shown > self.last[0]:
            self.last = shown, float((packet.duration or 0) * base)
            self.repeats = not packet.size


def shown_in_turn(container: Any) -> bool:
    """Whether a container of PyAV says when a packet is decoded, but not when its picture is shown.

    PyAV then makes presentation times up, in the order of the file. A picture is shown when it comes out of the
    decoder: at the decoding time of the packet that lets it out.
    """
    return _kind(container) in _WITHOUT_PRESENTATION


def _kind(container: Any) -> str:
    """Returns the first of the names of a container's format."""
    return container.format.name.split(",")[0]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the frames of a video are laid out.

    Attributes:
        fps: frames a second of the result.
        timed: the frames have times of their own; else they follow each other at `fps`.
        num_pictures: packets, each of which holds a picture at most.
        end: time in seconds until which the last picture stands by the header, None where it says nothing reliable.
        held: time in seconds until which empty packets hold the last picture.
        in_file_order: the times ascend in the order of the file although the pictures may not, as a copy of AVI makes
            them: the first picture has the first time, and so on.
    """

    fps: float
    timed: bool
    num_pictures: int
    end: float | None = None
    held: float = -math.inf
    in_file_order: bool = False


def plan(path: str, container: Any, stream: Any, packets: Packets) -> Schedule:
    """Decides how a video is laid out.

    Args:
        path: of the file.
        container: of PyAV, after all packets were read.
        stream: of the container.
        packets: of the stream.

    Returns:
        The schedule. A video of one picture is a still, whatever it lasts: its rate is `STILL_FPS`.

    Raises:
        UnreadableClipError: the file is truncated, gives no rate, or its timestamps are absurd.
    """
    count = len(packets.shown)
    if not count:
        raise UnreadableClipError("holds no frame")
    kind = _kind(container)
    whole = _is_whole(path, kind, stream, count + packets.num_hidden)
    if count == 1:
        return Schedule(STILL_FPS, True, 1)
    times = _times(packets)
    promised, longest = _promised_ends(container, stream) if kind in _WITH_LENGTH else (None, None)
    last, duration = packets.last if times else (0.0, 0.0)
    if whole and promised is not None:
        duration = max(duration, promised - last)
    nominal = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    fps = frame_rate(times, duration, nominal)
    if fps > FASTEST_FPS * (1 + _SLIGHT):
        raise UnreadableClipError(f"has damaged timestamps: {fps:g} pictures a second")
    if not times:
        return Schedule(fps, False, count)
    if longest is not None and last > _MOST_OVER[0] * longest + _MOST_OVER[1]:
        raise UnreadableClipError(
            f"has damaged timestamps: they run to {last:.2f} seconds, the header says {longest:.2f}"
        )
    end, start = last + max(packets.last[1], 1 / fps), min(stretch[0] for stretch in times)
    if promised is not None and not whole and end - start < _LEAST_SHARE * (promised - max(start, 0.0)):
        raise UnreadableClipError(f"is truncated: {end - start:.2f} of {promised:.2f} seconds are there")
    reorders = stream.codec_context.name in ("h264", "hevc") and stream.codec_context.has_b_frames
    return Schedule(
        fps,
        True,
        count,
        end=promised if whole else None,
        held=end if packets.repeats else -math.inf,
        in_file_order=reorders and all(a < b for a, b in itertools.pairwise(packets.shown)),
    )


def frame_rate(times: Sequence[Sequence[float]], duration: float, nominal: Sequence[float]) -> float:
    """Returns the rate that a video is laid out at, in frames a second.

    A video whose pictures lie close to a rate that its file gives keeps that: at most 2% of them are lost at it, and at
    most 5% of its frames are repeated. Else it is the rate of `constant_rate`, or one that the file gives where this
    comes within 1% of it.

    Args:
        times: ascending times in seconds, one list for each stretch in which they run on; empty: there are none.
        duration: of the last picture in seconds, 0 where unknown.
        nominal: the average rate and the rate that the file gives, as far as there are any, in frames a second.

    Raises:
        UnreadableClipError: there is no rate, or the times are too uneven for one.
    """
    for rate in nominal:
        if all(_is_near(stretch, rate) for stretch in times):
            return rate
    intervals = [interval for stretch in times for interval in np.diff(stretch).tolist()]
    if not intervals:
        raise UnreadableClipError("gives no frame rate")
    last = duration or float(np.median(intervals))
    try:
        _, found = constant_rate([1000 * seconds for seconds in (*intervals, last)])
    except UnreadableClipError as error:
        raise UnreadableClipError(f"has damaged timestamps or too long a pause: {error}") from error
    return next((rate for rate in nominal if abs(rate / found - 1) < _SLIGHT), found)


_Picture = TypeVar("_Picture")


def lay_out(frames: Iterable[tuple[float | None, float, _Picture]], schedule: Schedule) -> Iterator[_Picture]:
    """Yields the picture shown at each i / fps, holding two of them at a time.

    As in `constant_rate`, each picture has the nearest instant to its time that is free, and is lost where it would
    have been replaced by then; the first instant is the first picture's. Pictures without a time, and those whose time
    runs backwards, follow the one before at the rate. The last one stands as long as the file says.

    Args:
        frames: the time and the duration (0 where unknown) of each picture in seconds, and the picture.
        schedule: of the video.

    Raises:
        UnreadableClipError: the times ask for more frames than `constant_rate` allows, or there is no picture.
    """
    fps, step, most = schedule.fps, 1 / schedule.fps, max(LEAST_FRAMES, MOST_COPIES * schedule.num_pictures)
    shown, begun, waiting = None, 0, None  # the picture that stands from instant `begun` on, and the one after it
    start: float | None = None
    now = shift = lasts = 0.0

    def bounded(instant: int) -> int:
        if instant > most:
            raise UnreadableClipError(
                f"has damaged timestamps: at {fps:.4g} frames a second its {schedule.num_pictures} pictures are more "
                f"than {most} frames"
            )
        return instant

    def settle(until: float) -> Iterator[_Picture]:
        """Lets the waiting picture stand, unless another replaces it by then; yields the one before it."""
        nonlocal shown, begun
        if waiting is not None:
            instant = bounded(max(begun + 1, int((waiting[0] - start) * fps + 0.5)))
            if instant < (until - start) * fps:
                yield from itertools.repeat(shown, instant - begun)
                shown, begun = waiting[1], instant

    for time, duration, picture in frames:
        time = None if time is None or not schedule.timed else time + shift
        if start is None:
            start = now = 0.0 if time is None else time
            shown = picture
        else:
            if time is not None and time < now - step / 2:
                shift += now + step - time
                time = None
            now = now + step if time is None else max(now, time)
            yield from settle(now)
            waiting = now, picture
        lasts = duration if schedule.timed else 0.0  # else the demuxer's durations belong to another rate
    if start is None:
        raise UnreadableClipError("holds no frame")
    end = now + max(lasts, step)
    if schedule.end is not None and not shift and (schedule.end - end) * fps >= 1.5:  # less is rounding
        end = schedule.end
    if not shift:
        end = max(end, schedule.held)
    yield from settle(end)
    # Half a frame more, as pulled-down film has, is no other frame.
    count = begun + 1 if schedule.num_pictures == 1 else max(begun + 1, int((end - start) * fps + 0.5 - 1e-6))
    yield from itertools.repeat(shown, bounded(count) - begun)


def _times(packets: Packets) -> list[list[float]]:
    """Returns the times of the pictures, ascending, in stretches; none where most packets lack one of their own."""
    shown = packets.shown if not all(map(math.isnan, packets.shown)) else packets.decoded
    known = [time for time in shown if math.isfinite(time)]
    if 2 * len(set(known)) <= len(shown):
        return [] if len(shown) > 1 else [known]
    breaks = [
        i
        for i, (before, after) in enumerate(itertools.pairwise(packets.decoded), 1)
        if after < before  # decoding never goes back: here another stretch of time begins
    ]
    edges = [0, *breaks, len(shown)]
    stretches = (sorted({t for t in shown[a:b] if math.isfinite(t)}) for a, b in itertools.pairwise(edges))
    return [stretch for stretch in stretches if stretch]


def _is_near(times: Sequence[float], rate: float) -> bool:
    """Whether hardly a picture is lost or repeated where those of these ascending times are laid out at a rate."""
    count = len(times)
    if (np.abs((np.asarray(times) - times[0]) * rate - np.arange(count)) < 0.5).all():
        return True  # the i-th lies within half a frame of i / rate: none is
    if (times[-1] - times[0]) * rate > _MOST_REPEATED * count:
        return False
    kept = set(lay_out(((time, 0.0, i) for i, time in enumerate(times)), Schedule(rate, True, count)))
    return len(kept) >= _LEAST_KEPT * count


def _is_whole(path: str, kind: str, stream: Any, num_packets: int) -> bool:
    """Returns True where the file is known to be whole, False where it cannot be known.

    Raises:
        UnreadableClipError: the file lacks what it declares.
    """
    if kind == "mov":
        if len(stream.index_entries) > num_packets:
            raise UnreadableClipError(f"is truncated: holds {num_packets} of {len(stream.index_entries)} frames")
        return True
    size = os.path.getsize(path)
    if kind == "flv":
        return _ends_with_a_tag(path, size)
    declared = _declared_size(path, kind)
    if declared is None:
        return False
    if size < declared:
        raise UnreadableClipError(f"is truncated: {size} of {declared} bytes are there")
    return True


def _declared_size(path: str, kind: str) -> int | None:
    """Returns the size of a file by its own header, in bytes; None where it gives none."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if kind == "avi" and head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little") or None
    if kind == "asf":
        place = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))  # the file properties object
        if place >= 0 and not int.from_bytes(head[place + 88 : place + 92], "little") & 1:  # a broadcast gives no size
            return int.from_bytes(head[place + 40 : place + 48], "little") or None
    if kind == "matroska":
        length, place = _vint(head, 4)  # of the EBML header, whose id has four bytes
        place += length or 0
        if head[place : place + 4] == bytes.fromhex("18538067"):
            length, place = _vint(head, place + 4)
            return None if length is None else place + length
    return None


def _ends_with_a_tag(path: str, size: int) -> bool:
    """Whether the last four bytes of an FLV file are the length of the tag before them."""
    with open(path, "rb") as file:
        file.seek(max(0, size - 4))
        length = int.from_bytes(file.read(), "big")
        file.seek(max(0, size - 4 - length))
        tag = file.read(4)
    return len(tag) == 4 and tag[0] in (8, 9, 18) and int.from_bytes(tag[1:], "big") + 11 == length


def _vint(data: bytes, place: int) -> tuple[int | None, int]:
    """Reads the variable-length integer of EBML at `place`; returns it (None: unknown) and the place behind it."""
    first = data[place] if place < len(data) else 0
    size = 9 - first.bit_length()
    value = int.from_bytes(data[place : place + size], "big") & ((1 << 7 * size) - 1)
    return (None if value == (1 << 7 * size) - 1 or size > 8 else value), place + size


def _promised_ends(container: Any, stream: Any) -> tuple[float | None, float | None]:
    """Returns the times in seconds at which the header says that the stream and the whole file end, None: not said."""
    stream_end = file_end = None
    if stream.duration and stream.time_base:
        stream_end = float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    else:
        stream_end = parse_clock(tag(stream, "duration"))  # Matroska and WebM
    if container.duration and container.duration > 0:
        file_end = container.duration / 1e6
        if stream_end is None and len(container.streams) == 1:
            stream_end = file_end  # FLV and Matroska count it from zero, wherever the pictures begin
        file_end += max(0, container.start_time or 0) / 1e6
    ends = [end for end in (stream_end, file_end) if end is not None and end > 0]
    return (stream_end if stream_end and stream_end > 0 else None), max(ends, default=None)


def tag(stream: Any, name: str) -> str:
    """Returns a tag of a stream of PyAV, "" where it has none; muxers differ in the case of its name, given lower."""
    return next((value for key, value in stream.metadata.items() if key.lower() == name), "")


def parse_clock(text: str) -> float | None:
    """Reads "00:00:05.000000000" as seconds; None where the text is no such time."""
    parts = text.split(":")
    try:
        hours, minutes, seconds = map(float, parts)
    except ValueError:
        return None
    total = hours * 3600 + minutes * 60 + seconds
    return total if math.isfinite(total) and min(hours, minutes, seconds) >= 0 else None
