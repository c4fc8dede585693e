"""Files of pictures and animations: what they are, which picture of them is meant, and which way up."""

import io
import subprocess
import sys
import zlib

import av
import numpy as np
import pytest
from picture_samples import FIXTURES, QUARTERS, centers, orientation, png, quarters, tiff
from PIL import EpsImagePlugin, Image

from sora_jax.data.decode import STILL_FPS, UnreadableClipError
from sora_jax.data.media import open_media
from sora_jax.data.pictures import decode_animation, iterate_animation, open_animation, read_picture

TURNS = {  # EXIF's orientation: what is shown of stored (H, W, C)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


def read(path):
    """Returns what `open_media` makes of a file: (T, H, W, 3) and the rate."""
    fps, frames = open_media(str(path))
    return np.stack([np.asarray(frame) for frame in frames]), fps


def colored(*colors, size=(96, 64)):
    return [Image.new("RGB", size, color) for color in colors]


def assert_still(path, pixels, atol=0):
    frames, fps = read(path)
    assert fps == STILL_FPS and len(frames) == 1
    assert frames[0].shape == pixels.shape
    np.testing.assert_allclose(centers(frames[0]), centers(pixels), atol=atol)


@pytest.mark.parametrize(
    ("kind", "suffix", "atol"),
    [
        *[("JPEG", suffix, 3) for suffix in (".jfif", ".jpe", ".png", ".mp4", "")],
        *[("PNG", suffix, 0) for suffix in (".jpg", ".mp4", ".tga", ".txt", "")],
        *[("JPEG2000", suffix, 1) for suffix in (".jp2", ".j2k", ".avi")],
        *[("AVIF", suffix, 3) for suffix in (".avif", ".mp4", ".heic")],
        *[(kind, suffix, 0) for kind, suffix in (("TGA", ".tga"), ("PPM", ".ppm"), ("BMP", ".webm"), ("TIFF", ".jpg"))],
        *[(kind, suffix, 0) for kind, suffix in (("PCX", ".pcx"), ("SGI", ".rgb"), ("QOI", ".qoi"), ("DDS", ".mov"))],
    ],
)
def test_a_picture_is_known_by_its_content(tmp_path, kind, suffix, atol):
    path = tmp_path / f"still{suffix}"
    Image.fromarray(quarters()).save(path, kind, **({"quality": 95} if kind in ("JPEG", "AVIF") else {}))
    assert_still(path, quarters(), atol)


@pytest.mark.parametrize("suffix", [".jpg", ".tga", ".gif", ""])
def test_a_video_is_known_by_its_content(tmp_path, suffix):
    colors = [(200, 30, 30), (30, 30, 200), (30, 200, 30)]
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(video(colors))
    frames, fps = read(path)
    assert fps == pytest.approx(10)
    np.testing.assert_allclose(frames[:, 5, 5], colors, atol=2)


def video(colors):
    """Returns a Matroska file of a frame of each colour, ten a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        for frame in colored(*colors):
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.png", b"a note\n" * 50),
        ("a.txt", b"a note\n" * 50),
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'></svg>"),
        ("a.pdf", b"%PDF-1.4\n%" + bytes(100)),
        ("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
        ("a.gif", b"GIF89a"),
        ("a.ppm", b"P2 is a path of the metro"),
        ("a.ffconcat", b"ffconcat version 1.0\nfile b.mp4\n"),
        ("._a.jpg", bytes.fromhex("00051607") + bytes(100)),
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50)),
        ("empty.png", b""),
        ("float_rgb.tif", tiff(quarters().astype(np.float32), 2, sample_format=3)),
    ],
)
def test_what_is_no_picture_is_left_out_with_a_reason(tmp_path, monkeypatch, name, data):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # calling it would raise TypeError
    (tmp_path / "b.mp4").write_bytes(video([(0, 0, 0)]))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnreadableClipError, match=r"not a video|not read|cannot be decoded|damaged|is empty"):
        read(tmp_path / name)
    with pytest.raises(UnreadableClipError, match="cannot be opened: No such file"):
        read(tmp_path / "gone.png")


@pytest.mark.parametrize("value", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "APNG", "animated WEBP"])
def test_exif_turns_every_format(tmp_path, kind, value):
    path, stored = tmp_path / "turned", Image.fromarray(quarters())
    options = {"lossless": True} if "WEBP" in kind else {"quality": 95}
    if kind in ("APNG", "animated WEBP"):
        options |= {"save_all": True, "append_images": [Image.new("RGB", (96, 64))], "duration": 100}
    stored.save(path, kind.removeprefix("animated ").replace("APNG", "PNG"), exif=orientation(value), **options)
    frames, _ = read(path)
    assert len(frames) == (2 if "append_images" in options else 1)
    expected = TURNS[value](quarters())
    assert frames[0].shape == expected.shape
    np.testing.assert_allclose(centers(frames[0]), centers(expected), atol=3)
    if len(frames) == 1:
        with path.open("rb") as stream:
            np.testing.assert_array_equal(read_picture(stream), frames[0])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_turns_nothing(tmp_path):
    Image.fromarray(quarters()).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\xff", quality=95)
    assert_still(tmp_path / "a.jpg", quarters(), 3)


def test_a_photo_of_tiles_is_whole_and_turned_once():
    assert_still(FIXTURES / "grid.avif", quarters(128, 256), 2)
    # Both its own property and its EXIF ask for the same turn.
    assert_still(FIXTURES / "grid_turned.heic", TURNS[6](quarters(64, 128)), 2)


def test_a_picture_within_a_picture_is_no_moment(tmp_path):
    large = Image.fromarray(quarters(128, 192))
    small = large.resize((48, 32))
    grey = Image.new("RGB", large.size, "gray")
    for name, others, exif in (
        ("preview", [small], 1),
        ("turned", [small], 6),
        ("gain", [grey], 1),
        ("3", [grey] * 2, 1),
    ):
        large.save(tmp_path / name, "MPO", save_all=True, append_images=others, quality=95, exif=orientation(exif))
        assert_still(tmp_path / name, TURNS[exif](quarters(128, 192)), 3)
    large.resize((64, 64)).save(tmp_path / "a.ico", sizes=[(16, 16), (64, 64), (32, 32)])
    assert_still(tmp_path / "a.ico", quarters(64, 64), 1)


@pytest.mark.parametrize("pages", [[0, 1], [1, 0], [0, 0], [1, 0, 2, 1]])
def test_the_largest_page_of_a_tiff_is_meant(tmp_path, pages):
    images = [quarters(), quarters(32, 48), quarters()[:, ::-1]]
    pictures = [Image.fromarray(np.ascontiguousarray(images[i])) for i in pages]
    pictures[0].save(tmp_path / "a.tif", save_all=True, append_images=pictures[1:])
    assert_still(tmp_path / "a.tif", quarters())


def test_reduced_copies_and_masks_are_no_pages(tmp_path):
    for kind in (1, 4):
        (tmp_path / "a.tif").write_bytes(tiff(quarters(), 2, extra=[(254, 4, 1, kind)]))
        with pytest.raises(UnreadableClipError, match="raw photo: a TIFF of nothing but reduced copies"):
            read(tmp_path / "a.tif")
    (tmp_path / "a.tif").write_bytes(tiff(quarters(), 2, extra=[(254, 4, 1, 2)]))  # a page of many
    assert_still(tmp_path / "a.tif", quarters())
    (tmp_path / "a.dng").write_bytes(tiff(quarters(), 2, extra=[(50706, 1, 4, 0x401)]))
    with pytest.raises(UnreadableClipError, match="raw photo: a camera's DNG"):
        read(tmp_path / "a.dng")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_an_animation_keeps_its_own_times(tmp_path, kind):
    frames = colored("red", "lime", "blue", "white")
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 95}}.get(kind, {})
    frames[0].save(
        tmp_path / "a", kind, save_all=True, append_images=frames[1:], duration=[100, 200, 300, 400], **options
    )
    shown, fps = read(tmp_path / "a")
    assert fps == pytest.approx(10)
    expected = [(255, 0, 0), *[(0, 255, 0)] * 2, *[(0, 0, 255)] * 3, *[(255, 255, 255)] * 4]
    np.testing.assert_allclose(shown[:, 5, 5], expected, atol=4)


def test_a_picture_that_stands_comes_as_the_same_object(tmp_path):
    first, second = colored("red", "blue")
    first.save(tmp_path / "a.png", save_all=True, append_images=[second], duration=[50, 150])
    fps, frames = open_animation(str(tmp_path / "a.png"))
    frames = list(frames)
    assert fps == pytest.approx(20) and len(frames) == 4
    assert frames[1] is frames[2] is frames[3] and frames[3].getpixel((0, 0)) == (0, 0, 255)
    assert frames[0].getpixel((0, 0)) == (255, 0, 0)  # what comes later changes nothing that came


@pytest.mark.parametrize(("duration", "fps"), [(0, 10), (10, 10), (20, 50)])
def test_the_shortest_times_are_those_of_browsers(tmp_path, duration, fps):
    first, second = colored("red", "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second], duration=duration)
    assert open_animation(str(tmp_path / "a.gif"))[0] == pytest.approx(fps)


def test_the_default_picture_of_an_apng_is_no_moment(tmp_path):
    frames = colored("white", "red", "blue")
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], duration=100, default_image=True)
    shown, _ = read(tmp_path / "a.png")
    np.testing.assert_array_equal(shown[:, 5, 5], [(255, 0, 0), (0, 0, 255)])


def test_frames_of_two_sizes_are_refused(tmp_path):
    first, second = colored("red", "blue", size=(16, 8))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second], duration=100)
    data = bytearray((tmp_path / "a.gif").read_bytes())
    descriptor = data.rindex(b"\x2c\0\0\0\0\x10\0\x08\0")  # of the second frame, which moves 20 pixels to the right
    data[descriptor + 1] = 20
    (tmp_path / "a.gif").write_bytes(data)
    with pytest.raises(UnreadableClipError, match="changes its size: frame 1 is 36x8 pixels, the clip is 16x8"):
        read(tmp_path / "a.gif")


def test_an_animation_keeps_alpha_and_timing(tmp_path):
    frames = [Image.new("RGBA", (20, 10), (level, 0, 0, 128)) for level in (10, 100, 200)]
    path = tmp_path / "a.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[40, 80, 40], lossless=True)
    decoded, fps = decode_animation(str(path))
    assert fps == pytest.approx(25.0)
    assert [f.getpixel((0, 0)) for f in decoded] == [(v, 0, 0, 128) for v in (10, 100, 100, 200)]


@pytest.mark.parametrize("kind", ["webp", "gif", "png", "avif", "tiff", "jpeg", "bmp", "jpeg2000", "ppm", "tga"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
def test_a_truncated_picture_is_refused(tmp_path, kind, share):
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)) for _ in range(5)]
    path = tmp_path / f"a.{kind}"
    moves = kind in ("webp", "gif", "png", "avif")
    frames[0].save(path, kind, **({"save_all": True, "append_images": frames[1:], "duration": 50} if moves else {}))
    assert len(decode_animation(str(path))[0]) == (5 if moves else 1)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UnreadableClipError):
        decode_animation(str(path))
    with pytest.raises(UnreadableClipError):
        read(path)


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("name", ["grid.avif", "grid_turned.heic"])
def test_a_truncated_photo_is_refused_and_not_shown_as_a_tile(tmp_path, name, share):
    data = (FIXTURES / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UnreadableClipError):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("pixels", "color_type", "message"),
    [
        (np.zeros((100_000, 1), np.uint8), 0, "too large: 1 x 100000 pixels; a side has 1 to 65535"),
        (np.zeros((8, 0, 3), np.uint8), 2, "damaged PNG"),
        (np.zeros((8, 8), np.uint8), 3, "a palette without one"),
    ],
)
def test_impossible_pictures_are_refused(tmp_path, pixels, color_type, message):
    (tmp_path / "a.png").write_bytes(png(pixels, color_type))
    with pytest.raises(UnreadableClipError, match=message):
        read(tmp_path / "a.png")


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    header = bytearray(png(np.zeros((1, 1), np.uint8), 0))
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(header)
    with pytest.raises(UnreadableClipError, match=r"too large: Image size \(3600000000 pixels"):
        read(tmp_path / "a.png")


def test_pillow_warns_nobody(tmp_path):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")  # beyond 89 million pixels, Pillow warns
    code = (
        "import sys; from sora_jax.data.picture_files import open_picture as o; print(o(open(sys.argv[1], 'rb')).size)"
    )
    command = [sys.executable, "-W", "always::UserWarning", "-W", "always::RuntimeWarning", "-c", code]
    result = subprocess.run([*command, str(tmp_path / "large.png")], capture_output=True, text=True, check=True)
    assert result.stdout == "(10000, 9000)\n" and not result.stderr


def test_an_animation_is_no_picture_to_be_scored(tmp_path):
    first, second = colored(QUARTERS[0], QUARTERS[1])
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second], duration=100)
    with (tmp_path / "a.webp").open("rb") as stream, pytest.raises(UnreadableClipError, match="animation of 2 frames"):
        read_picture(stream)
    assert len(list(iterate_animation(str(tmp_path / "a.webp")))) == 2


# One straight after the other


def encoded(levels, kind, size=(64, 48), **options):
    files = []
    for level in levels:
        stream = io.BytesIO()
        Image.new("RGB", size, (level,) * 3).save(stream, kind, **options)
        files.append(stream.getvalue())
    return files


@pytest.mark.parametrize("suffix", ["mjpeg", "jpg"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM", "WEBP"])
def test_pictures_one_after_the_other_are_a_video(tmp_path, kind, suffix):
    levels = [0, 60, 120, 180, 240]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"".join(encoded(levels, kind)))
    frames, _ = read(path)
    assert frames.shape == (5, 48, 64, 3)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), levels, atol=4)


def test_progressive_jpegs_with_exif_may_be_a_video(tmp_path):
    path = tmp_path / "a.mjpeg"
    files = encoded([0, 250], "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")
    path.write_bytes(b"".join(files))
    assert len(read(path)[0]) == 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM", "WEBP"])
@pytest.mark.parametrize(
    "trailer",
    [bytes(1000), b"\xff", b"\0\0\0\x18ftypmp42" + bytes(200), b"\xff\xd8\xff", b"\x89PNG", b"a note\n"],
    ids=["zeros", "a byte", "a film", "the begin of a JPEG", "the begin of a PNG", "text"],
)
def test_what_else_follows_a_picture_leaves_it_a_still(tmp_path, kind, trailer):
    path = tmp_path / "a.picture"
    path.write_bytes(encoded([90], kind)[0] + trailer)
    frames, fps = read(path)
    assert len(frames) == 1 and fps == STILL_FPS


def jpeg_with(segment, jpeg):
    return jpeg[:2] + segment[:2] + (len(segment)).to_bytes(2, "big") + segment[2:] + jpeg[2:]


@pytest.mark.parametrize(
    ("segment", "size"),
    [
        (b"\xff\xe2MPF\0MM\0*\0\0\0\x08", (64, 48)),
        (b"\xff\xe1http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><Container:Directory/></x:xmpmeta>", (64, 48)),
        (b"\xff\xe4nothing", (32, 24)),
    ],
    ids=["announced by MPF", "announced by XMP", "a preview"],
)
def test_a_jpeg_with_another_as_its_part_is_a_still(tmp_path, segment, size):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_with(segment, encoded([90], "JPEG")[0]) + encoded([200], "JPEG", size)[0])
    frames, fps = read(path)
    assert len(frames) == 1 and fps == STILL_FPS and abs(frames.mean() - 90) < 3
