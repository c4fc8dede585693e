"""Decoding pictures and animations: geometry, timing, transparency, and truncated files."""

import io

import numpy as np
import pytest
from picture_samples import tiff
from PIL import Image

from sora_jax.data.decode import UnreadableClipError, decode_frames
from sora_jax.data.records import picture_size


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


@pytest.mark.parametrize("size", [(40, 20), (5, 3)], ids=["whole", "draft"])
def test_a_stored_jpeg_is_turned_as_its_exif_says(size):
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row of what is stored is the right side of what is shown
    stored = np.zeros((20, 40, 3), np.uint8)
    stored[:10] = 255
    data = encode(stored, "JPEG", exif=exif)
    assert picture_size(data) == (40, 20)
    assert picture_size(tiff(stored, 2, extra=[(274, 3, 1, 6), (700, 1, 4, 0x20202020)])) == (40, 20)  # and XMP
    frame = decode_frames([data], *size)[0]
    assert frame.shape == (*size, 3)
    assert frame[:, -1].min() > 240 and frame[:, 0].max() < 15
    stored[::2], stored[1::2] = 255, 0  # stripes that a draft at half the size would lose
    (frame,) = decode_frames([encode(stored, "JPEG", exif=exif, quality=95)], 10, 20)
    assert frame[:, 1::2].min() > 200 and frame[:, ::2].max() < 55


def test_a_broken_frame_is_named():
    good = encode(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UnreadableClipError, match="frame 1 of 2"):
        decode_frames([good, good[:40]], 8, 8)
    with pytest.raises(ValueError, match="0 x 8"):
        decode_frames([good], 0, 8)
