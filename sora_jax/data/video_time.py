"""When the pictures of a video are shown: read from its packets, which costs a fraction of decoding them.

Every packet has a time of its own. The *rate* is that of the video's motion, not the average over its pauses
(`frame_rate`); the `Clock` lays decoded frames out at that rate, holding one over a pause. A corrupt timestamp cannot
ask for more than a multiple of the pictures that a file holds, and a file that ends before what it declares is refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from sora_jax.data.decode import STILL_FPS, UnreadableClipError

FASTEST_FPS = 1000.0
"""Pictures that follow each other faster than this have damaged timestamps."""

MOST_COPIES = 1000
"""Frames that a video may ask for, on average, for each picture it holds, where its header gives such a length."""

MOST_UNVOUCHED_COPIES = 100
"""The same where no header gives a length."""

_NEAR = 0.25  # intervals that differ by less than this share are alike
_SLIGHT = 0.01  # rates that differ by less than this share are the same
_BURST_SHARE = 0.05  # of the intervals must be as short as a burst's for the rate to follow it
_FASTEST_BURST = 1 / 125  # seconds; shorter intervals among longer ones are jitter, not motion
_LEAST_SHARE = 0.9  # a video that ends before this share of what its header promises is truncated
_MOST_OVER = 1.1, 1.0  # share and seconds that the packets may go beyond the length in the header

# Containers whose lengths are written, not estimated from the timestamps or the size.
_WITH_LENGTH = {"mov", "matroska", "avi", "asf", "flv", "ivf", "mxf"}


@dataclasses.dataclass
class Packets:
    """What the packets of one stream say, in the order of the file.

    Attributes:
        shown: presentation times in seconds, NaN where a packet has none.
        decoded: decoding times in seconds, NaN where a packet has none.
        last: presentation time (seconds) and duration (seconds, 0 where unknown) of the packet shown last.
        num_bytes: of all packets.
    """

    shown: list[float] = dataclasses.field(default_factory=list)
    decoded: list[float] = dataclasses.field(default_factory=list)
    last: tuple[float, float] = (-math.inf, 0.0)
    num_bytes: int = 0

    def add(self, packet: Any) -> None:
        """Counts a packet in."""
        base = packet.time_base or 0
        shown = math.nan if packet.pts is None else float(packet.pts * base)
        self.shown.append(shown)
        self.decoded.append(math.nan if packet.dts is None else float(packet.dts * base))
        if shown > self.last[0]:
            self.last = shown, float((packet.duration or 0) * base)
        self.num_bytes += packet.size


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the frames of a video are laid out.

    Attributes:
        fps: frames a second of the result.
        timed: the frames have times of their own; else they follow each other at `fps`.
        num_pictures: packets, each of which holds a picture at most.
        end: time in seconds until which the last picture stands by the header, None where it says nothing reliable.
        most_frames: bound of the result.
    """

    fps: float
    timed: bool
    num_pictures: int
    end: float | None
    most_frames: int


def plan(path: str, container: Any, stream: Any, packets: Packets) -> Schedule:
    """Decides how a video is laid out.

    Args:
        path: of the file.
        container, stream: of PyAV, after all packets were read.
        packets: of the stream.

    Returns:
        The schedule. A video of one picture is a still, whatever it lasts: its rate is `STILL_FPS`.

    Raises:
        UnreadableClipError: the file is truncated, gives no rate, or its timestamps are absurd.
    """
    count = len(packets.shown)
    if not count:
        raise UnreadableClipError("holds no frame")
    kind = container.format.name.split(",")[0]
    whole = _is_whole(path, kind, stream, count)
    times = _times(packets)
    if count == 1:
        return Schedule(STILL_FPS, True, 1, None, 1)
    nominal = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    fps = frame_rate(times, nominal)
    if fps > FASTEST_FPS * (1 + _SLIGHT):
        raise UnreadableClipError(f"has damaged timestamps: {fps:g} pictures a second")
    if not times:
        return Schedule(fps, False, count, None, MOST_UNVOUCHED_COPIES * count)
    natural = packets.last[0] + max(packets.last[1], 1 / fps) if math.isfinite(packets.last[0]) else times[-1][-1]
    promised, longest = _promised_ends(container, stream) if kind in _WITH_LENGTH else (None, None)
    if longest is not None and natural > _MOST_OVER[0] * longest + _MOST_OVER[1]:
        raise UnreadableClipError(
            f"has damaged timestamps: they run to {natural:.2f} seconds, the header says {longest:.2f}"
        )
    start = min(segment[0] for segment in times)
    if promised is not None and not whole and natural - start < _LEAST_SHARE * (promised - max(start, 0.0)):
        raise UnreadableClipError(f"is truncated: {natural - start:.2f} of {promised:.2f} seconds are there")
    most = (MOST_UNVOUCHED_COPIES if longest is None else MOST_COPIES) * count
    return Schedule(fps, True, count, promised if whole else None, most)


def frame_rate(times: Sequence[Sequence[float]], nominal: Sequence[float]) -> float:
    """Returns the rate of a video's motion in frames a second.

    A constant-rate video keeps the rate that its file gives. Else the rate is that of its regular intervals (those like
    the one before or after them): of the median one, or, where at least 5% of them are less than half as long, of
    these, so that a burst of pictures between stills is kept. Pauses and single jittery intervals do not count. Where
    this comes within 1% of a rate that the file gives, it is that.

    Args:
        times: ascending times in seconds, one list for each stretch in which they run on; empty: there are none.
        nominal: the average rate and the rate that the file gives, as far as there are any, in frames a second.

    Raises:
        UnreadableClipError: there is neither.
    """
    for rate in nominal:
        if times and all(_is_constant(segment, rate) for segment in times):
            return rate
    intervals = np.concatenate([np.diff(np.asarray(segment, np.float64)) for segment in times] or [np.zeros(0)])
    intervals = intervals[intervals > 0]
    if not intervals.size:
        if not nominal:
            raise UnreadableClipError("gives no frame rate")
        return nominal[0]
    alike = np.abs(np.diff(intervals)) <= _NEAR * np.minimum(intervals[1:], intervals[:-1])
    regular = intervals[np.append(alike, False) | np.append(False, alike)]
    if not regular.size:
        regular = np.array([np.mean(intervals) if intervals.size > 2 else np.min(intervals)])
    middle = float(np.median(regular))
    bursts = np.sort(regular)[int(_BURST_SHARE * (regular.size - 1)) :]
    bursts = bursts[(bursts < middle / 2) & (bursts >= _FASTEST_BURST)]
    step = float(bursts[0]) if bursts.size else middle
    near = regular[np.abs(regular - step) <= _NEAR * step]
    fitted = 1 / float(np.mean(near))
    return next((rate for rate in nominal if abs(rate / fitted - 1) < _SLIGHT), fitted)


class Clock:
    """Gives each decoded frame the first interval of 1 / fps in which it is shown.

    At time i / fps stands the last frame shown by then, with half a frame's tolerance for rounding. The first interval
    belongs to the first picture. Frames without a time, and those whose time runs backwards, follow the one before.
    """

    def __init__(self, schedule: Schedule):
        self._schedule = schedule
        self._start: float | None = None
        self._shift = 0.0  # what is added to times that run backwards
        self._now = 0.0
        self._duration = 0.0
        self._slot = 0

    def place(self, time: float | None, duration: float) -> int:
        """Returns the interval at which a frame begins.

        Args:
            time: when it is shown, in seconds; None: not known.
            duration: how long, in seconds; 0: not known.

        Raises:
            UnreadableClipError: the time is absurd.
        """
        step = 1 / self._schedule.fps
        time = None if time is None or not self._schedule.timed else time + self._shift
        if self._start is None:
            self._start = self._now = 0.0 if time is None else time
        else:
            if time is None or time < self._now - step / 2:
                self._shift += 0.0 if time is None else self._now + step - time
                time = self._now + step
            self._now = max(self._now, time)
            self._slot = self._bounded(max(1, self._slot, round((self._now - self._start) * self._schedule.fps)))
        self._duration = duration
        return self._slot

    def end(self) -> int:
        """Returns the number of intervals of the whole video: its last picture stands as long as the file says."""
        schedule, natural = self._schedule, self._slot + 1
        if schedule.num_pictures == 1 or self._start is None:
            return natural
        lasts = (self._now + self._duration - self._start) * schedule.fps
        natural = max(natural, math.ceil(lasts - 0.5 - 1e-6))
        if schedule.end is not None and not self._shift:
            promised = round((schedule.end - self._start) * schedule.fps)
            natural = promised if promised >= natural + 2 else natural  # less is rounding
        return self._bounded(natural)

    def _bounded(self, slot: int) -> int:
        if slot > self._schedule.most_frames:
            raise UnreadableClipError(
                f"has damaged timestamps: they ask for {slot} frames at {self._schedule.fps:.4g} a second "
                f"from {self._schedule.num_pictures} pictures"
            )
        return slot


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


def _is_constant(times: Sequence[float], rate: float) -> bool:
    """Whether the i-th of these times lies within half a frame of i / rate."""
    return bool((np.abs((np.asarray(times) - times[0]) * rate - np.arange(len(times))) < 0.5).all())


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
    stream_end = None
    if stream.duration and stream.time_base:
        stream_end = float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    else:
        stream_end = parse_clock(stream.metadata.get("DURATION", ""))  # Matroska and WebM
    file_end = None
    if container.duration and container.duration > 0:
        file_end = (container.duration + (container.start_time or 0)) / 1e6
    if stream_end is None and len(container.streams) == 1:
        stream_end = file_end
    ends = [end for end in (stream_end, file_end) if end is not None and end > 0]
    return (stream_end if stream_end and stream_end > 0 else None), max(ends, default=None)


def parse_clock(text: str) -> float | None:
    """Reads "00:00:05.000000000" as seconds; None where the text is no such time."""
    parts = text.split(":")
    try:
        hours, minutes, seconds = int(parts[0]), int(parts[1]), float(parts[2])
    except (ValueError, IndexError):
        return None
    total = hours * 3600 + minutes * 60 + seconds if len(parts) == 3 else math.nan
    return total if math.isfinite(total) and min(hours, minutes, seconds) >= 0 else None
