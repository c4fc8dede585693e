"""Small video files for tests, written with PyAV."""

import struct
from fractions import Fraction

import av
import numpy as np

MS = Fraction(1, 1000)
QUARTERS = np.zeros((32, 48, 3), np.uint8)
QUARTERS[:16, :24], QUARTERS[:16, 24:] = (200, 30, 30), (30, 200, 30)
QUARTERS[16:, :24], QUARTERS[16:, 24:] = (30, 30, 200), (230, 230, 230)


def greys(levels, height=32, width=48):
    return [np.full((height, width, 3), level, np.uint8) for level in levels]


def write_video(
    path, frames, times=None, last=None, rate=10, codec="ffv1", form=None, tags=None, muxer=None, **options
):
    """Encodes RGB or RGBA frames, or `av.VideoFrame`s; `times` and the duration of the `last` are milliseconds."""
    form = form or {"ffv1": "bgr0", "mjpeg": "yuvj420p"}.get(codec, "yuv420p" if times else "yuv444p")
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        first = frames[0]
        if isinstance(first, av.VideoFrame):
            stream.height, stream.width = first.height, first.width
        else:
            stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = form
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        stream.codec_context.time_base = MS if times else Fraction(1, rate)
        packets = []
        for i, frame in enumerate(frames):
            if not isinstance(frame, av.VideoFrame):
                frame = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[-1] == 4 else "rgb24")
            if frame.format.name != form:
                frame = frame.reformat(format=form)
            frame.pts, frame.time_base = (times[i], MS) if times else (i, Fraction(1, rate))
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if last is not None:  # without B-frames the packets are in the order of the frames
            for packet, begin, end in zip(packets, times, [*times[1:], times[-1] + last], strict=True):
                packet.duration = round(Fraction(end - begin, 1000) / packet.time_base)
        for packet in packets:
            container.mux(packet)
    return path


def write_streams(path, streams):
    """Writes several video streams, each (codec, height, width, number of frames, level, disposition), and a tone."""
    with av.open(str(path), "w") as container:
        made = []
        for codec, height, width, *_, disposition in streams:
            stream = container.add_stream(codec, rate=10)
            stream.height, stream.width = height, width
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "rgb24" if codec == "png" else "yuv420p"
            stream.disposition = disposition
            made.append(stream)
        audio = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        packets = [*audio.encode(sound), *audio.encode()]
        for stream, (_, height, width, count, level, _) in zip(made, streams, strict=True):
            for frame in greys([level] * count, height, width):
                packets += stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
            packets += stream.encode()
        for packet in packets:
            container.mux(packet)
    return path


def set_display_matrix(path, numbers):
    """Puts a display matrix into the track header of an mp4 (ISO/IEC 14496-12, 8.3.2; version 0)."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    data[place : place + 36] = struct.pack(">9i", *numbers)
    path.write_bytes(data)
    return path


def yuv_frame(form, planes, **tags):
    """Returns a frame of these planes, (H, W) integers each, with tags such as `colorspace`."""
    frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], form)
    for plane, values in zip(frame.planes, planes, strict=True):
        dtype = np.uint16 if frame.format.components[0].bits > 8 else np.uint8
        rows = np.zeros((plane.height, plane.line_size // np.dtype(dtype).itemsize), dtype)
        rows[:, : values.shape[1]] = values
        plane.update(rows.tobytes())
    for name, value in tags.items():
        setattr(frame, name, value)
    return frame
