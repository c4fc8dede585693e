import os
import re

import av
import numpy as np
import pytest
from PIL import Image

from sora_jax.data.videos import decode_video
from sora_jax.files import check_writable, write_whole
from sora_jax.generation.video_io import (
    contact_sheet,
    viewing_scale,
    write_image,
    write_video,
)


def coloured(num_frames, height, width):
    """Frames of one colour each."""
    levels = np.linspace(40, 220, num_frames).astype(np.uint8)
    return np.stack([np.full((height, width, 3), (level, 255 - level, 90), np.uint8) for level in levels])


@pytest.mark.parametrize("shape", ((1, 8, 8), (7, 16, 24), (5, 33, 47)))
@pytest.mark.parametrize("scale", (None, 1, 3))
def test_mp4_keeps_frames_rate_size_and_colours(tmp_path, shape, scale):
    frames = coloured(*shape)
    path = write_video(tmp_path / "new" / "clip.mp4", frames, 7.5, scale)
    factor = viewing_scale(*shape[1:], scale)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 7.5
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    height, width = (n * factor + n * factor % 2 for n in shape[1:])
    assert read.shape == (shape[0], height, width, 3)
    np.testing.assert_allclose(read.mean(axis=(1, 2)), frames.mean(axis=(1, 2)), atol=4)
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_small_clips_are_shown_large():
    assert viewing_scale(48, 32) == 6 and viewing_scale(256, 10) == 1 and viewing_scale(1000, 700) == 1
    assert viewing_scale(48, 32, 2) == 2
    with pytest.raises(ValueError, match="scale must be a whole number of at least 1, got 0"):
        viewing_scale(48, 32, 0)


@pytest.mark.parametrize("fps", (0.01, 0.0123, 0.7, 23.976, 997.3, 1000.0))
def test_an_mp4_tells_the_rate_that_was_asked_for(tmp_path, fps):
    with av.open(str(write_video(tmp_path / "clip.mp4", coloured(2, 8, 8), fps, 1))) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-3)


def test_the_largest_scale_is_what_the_encoder_takes(tmp_path):
    write_video(tmp_path / "clip.mp4", coloured(1, 1, 1024), 8.0, 16)
    with pytest.raises(ValueError, match="scale must be at most 16 for 1 x 1024 pixels, got 17"):
        write_video(tmp_path / "clip.mp4", coloured(1, 1, 1024), 8.0, 17)


def test_png_holds_the_very_pixels(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    read = np.asarray(Image.open(write_image(tmp_path / "a.png", image)))
    np.testing.assert_array_equal(read, image)
    enlarged = np.asarray(Image.open(write_image(tmp_path / "b.png", image, 3)))
    assert enlarged.shape == (15, 21, 3)
    np.testing.assert_array_equal(enlarged[1::3, 1::3], image)


def test_bad_frames_write_nothing(tmp_path):
    for frames in (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3))):
        with pytest.raises(ValueError, match="frames must be"):
            write_video(tmp_path / "clip.mp4", frames, 8.0)
    for fps in (0, 0.0004, float("nan"), 1e12):
        with pytest.raises(
            ValueError, match=f"fps must be between 0.01 and 1000 in a video, got {re.escape(f'{fps:g}')}"
        ):
            write_video(tmp_path / "clip.mp4", coloured(2, 8, 8), fps)
    assert not list(tmp_path.iterdir())


def test_where_files_can_be_written_is_known_before(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path, directory in (("new/deep/x.json", False), ("file", False), ("new/deep", True), (".", True)):
        check_writable("--json", tmp_path / path, directory)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    for path, directory in (("file", True), ("file/x.json", False), ("file/deep/x.json", False)):
        with pytest.raises(ValueError, match=rf"--json '.*{path}' cannot be written: '.*/file' is a file"):
            check_writable("--json", tmp_path / path, directory)
    with pytest.raises(ValueError, match="is a directory; name a file"):
        check_writable("--json", tmp_path)
    monkeypatch.setattr(os, "access", lambda place, mode: str(place) != str(tmp_path))
    with pytest.raises(ValueError, match=f"no permission to write in '{tmp_path}'"):
        check_writable("--json", tmp_path / "new" / "x.json")


def test_a_file_is_written_into_a_new_directory(tmp_path):
    assert write_whole(tmp_path / "new" / "deep" / "x.json", b"{}").read_bytes() == b"{}"


def test_sheet_has_a_row_a_clip_and_frames_across():
    shapes = {"frog": (6, 8, 8), "wide": (2, 4, 8), "big": (1, 90, 90)}
    clips = [coloured(*shape) for shape in shapes.values()]
    sheet = contact_sheet(clips, list(shapes), columns=4, cell=32)
    assert sheet.dtype == np.uint8 and sheet.shape == (4 + 3 * (18 + 32 + 4), 4 + 4 * (32 + 4), 3)
    frames = lambda row, column: sheet[4 + row * 54 + 18 :][:32, 4 + column * 36 :][:, :32]  # noqa: E731
    for column, frame in enumerate((0, 2, 3, 5)):  # evenly spaced, with the first and the last
        assert (frames(0, column) == clips[0][frame][0, 0]).all()
    assert (frames(1, 0)[:16] == clips[1][0][0, 0]).all() and (frames(1, 0)[16:] == 255).all()
    assert (frames(1, 2) == 255).all()
    assert (frames(2, 0) == clips[2][0][0, 0]).all()
    for row in range(3):
        assert (sheet[4 + row * 54 :][:18] < 128).any(), "a caption is drawn"


def test_images_with_short_captions_stand_side_by_side():
    images = [coloured(1, 8, 8) + np.uint8(20 * i) for i in range(5)]
    sheet = contact_sheet(images, [f"n {i}" for i in range(5)], columns=3, cell=32)
    assert sheet.shape == (4 + 2 * 54, 4 + 3 * 36, 3)
    for i, image in enumerate(images):
        cell = sheet[4 + i // 3 * 54 :, 4 + i % 3 * 36 :][: 18 + 32, :32]
        assert (cell[18:] == image[0][0, 0]).all() and (cell[:18] < 128).any()
    assert (sheet[58:, 76:] == 255).all()
    below = contact_sheet(images, ["a caption\nof more than one cell"] * 5, columns=3, cell=32)
    assert below.shape == (4 + 5 * 54, 4 + 2 * 36, 3)


def test_a_long_caption_is_cut_to_the_sheet():
    short = contact_sheet([coloured(2, 8, 8)], ["x"], cell=32)
    long = contact_sheet([coloured(2, 8, 8)], ["a very long caption\nthat does not fit " * 5], cell=32)
    assert short.shape == long.shape
    for clips, captions in (([], []), ([coloured(2, 8, 8)], [])):
        with pytest.raises(ValueError, match="a caption for each"):
            contact_sheet(clips, captions)


@pytest.mark.parametrize("scale", [1, 24])
def test_a_written_video_keeps_its_colours_at_any_size(tmp_path, scale):
    """A file that names no matrix is read as BT.601 or BT.709 by its size; both sides must agree."""
    colours = np.array([[[200, 30, 30], [30, 200, 30]], [[30, 30, 200], [230, 230, 230]]], np.uint8)
    frames = colours.repeat(16, 0).repeat(24, 1)[None].repeat(2, 0)
    path = write_video(tmp_path / "a.mp4", frames, 10, scale)
    read, fps = decode_video(str(path))
    assert read.shape == (2, 32 * scale, 48 * scale, 3) and fps == 10
    centres = read[0, 8 * scale :: 16 * scale, 12 * scale :: 24 * scale].astype(int)
    np.testing.assert_allclose(centres, colours, atol=3)
