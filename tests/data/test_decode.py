"""Decoding pictures and animations: geometry, timing, transparency, and truncated files."""

import io

import numpy as np
import pytest
from PIL import Image

from sora_jax.data.decode import STILL_FPS, UnreadableClipError, decode_frames
from sora_jax.data.pictures import decode_animation


def encode(array, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


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
