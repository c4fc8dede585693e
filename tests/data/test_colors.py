"""Deep pictures, colour spaces and transparency, against formulas in float64."""

import io
import struct

import numpy as np
import pytest
from picture_samples import FIXTURES, QUARTERS, centers, png, quarters, tiff
from PIL import Image, ImageCms

from sora_jax.data.colors import matrix_profile, to_srgb
from sora_jax.data.decode import UnreadableClipError, decode_frames
from sora_jax.data.pictures import read_picture

GREY = np.asarray(Image.fromarray(quarters()).convert("L"))
P3 = (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.3127, 0.3290)
# Of linear Display P3 to linear sRGB (W3C, CSS Color 4, sample code).
P3_TO_SRGB = np.array(
    [
        [1.2249401762805598, -0.2249401762805598, 0.0],
        [-0.042056954709688163, 1.0420569547096881, 0.0],
        [-0.019637554590334432, -0.078636045550631889, 1.0982736001409663],
    ]
)


def to_linear(values):
    values = np.asarray(values) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def from_linear(light):
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def in_p3(colors):
    """Returns what colours of sRGB are called in Display P3, (..., 3) uint8."""
    return np.rint(from_linear(to_linear(colors) @ np.linalg.inv(P3_TO_SRGB).T)).astype(np.uint8)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data):
    return np.asarray(read_picture(io.BytesIO(data)))


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def twelve_bits():
    """Returns rows of (H, W) grey in 12 bits, packed."""
    values = np.rint(GREY / 255 * 4095).astype(int)
    bits = (values[..., None] >> np.arange(11, -1, -1)) & 1
    return np.packbits(bits.reshape(len(values), -1).astype(np.uint8), axis=1)


WIDE = GREY.astype(np.uint16) * 257
DEEP = {
    "PNG": saved(Image.fromarray(WIDE), "PNG"),
    "TIFF": saved(Image.fromarray(WIDE), "TIFF"),
    "big-endian TIFF": saved(Image.frombytes("I;16B", GREY.shape[::-1], WIDE.astype(">u2").tobytes()), "TIFF"),
    "JPEG 2000": saved(Image.fromarray(WIDE), "JPEG2000"),
    "PGM": saved(Image.fromarray(WIDE), "PPM"),
    "10-bit PGM": b"P5 96 64 1023\n" + np.rint(GREY / 255 * 1023).astype(">u2").tobytes(),
    "12-bit TIFF": tiff(twelve_bits(), 1, bits=12),
    "white is zero": tiff(65535 - WIDE, 0),
    "float": tiff(GREY.astype(np.float32) / 255, 1, sample_format=3),
    "float, white is zero": tiff(1 - GREY.astype(np.float32) / 255, 0, sample_format=3),
    "with alpha": png(np.stack([WIDE, np.full_like(WIDE, 65535)], -1).astype(">u2"), 4),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_looks_like_eight_bits(name):
    np.testing.assert_allclose(read(DEEP[name]).astype(int), GREY[..., None].repeat(3, -1), atol=1)


@pytest.mark.parametrize(
    "data",
    [
        png((quarters().astype(np.uint16) * 257).astype(">u2")),
        tiff(quarters().astype(np.uint16) * 257, 2),
        b"P6 96 64 65535\n" + (quarters().astype(np.uint16) * 257).astype(">u2").tobytes(),
    ],
    ids=["PNG", "TIFF", "PPM"],
)
def test_deep_colour_looks_like_eight_bits(data):
    np.testing.assert_allclose(read(data).astype(int), quarters(), atol=1)


@pytest.mark.parametrize(
    ("pixels", "sample_format", "message"),
    [
        (GREY.astype(np.float32), 3, "floating-point grey of 49 ... 230"),
        (GREY.astype(np.float32) / -255, 3, "floating-point grey of -0.9"),
        (np.where(GREY == 49, np.nan, 0.5).astype(np.float32), 3, "floating-point grey of nan"),
        (np.where(GREY == 49, np.inf, 0.5).astype(np.float32), 3, "floating-point grey of 0.5 ... inf"),
        (GREY.astype(np.int32) * 257, 2, "32-bit or signed integers, 12593 ... 59110"),
        (GREY.astype(np.uint32) * 257, 1, "32-bit or signed integers"),
        (GREY.astype(np.int16), 2, "32-bit or signed integers"),
    ],
)
def test_an_unknown_range_is_refused(pixels, sample_format, message):
    with pytest.raises(UnreadableClipError, match=rf"unknown range: .*{message}"):
        read(tiff(pixels, 1, sample_format=sample_format))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_profile_is_converted(kind):
    stored = Image.fromarray(in_p3(quarters()))
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    data = saved(stored, kind, icc_profile=matrix_profile(P3, None), **options.get(kind, {}))
    assert np.abs(centers(np.asarray(stored)) - QUARTERS).max() > 40
    np.testing.assert_allclose(centers(read(data)), QUARTERS, atol=8 if kind in ("JPEG", "AVIF") else 3)
    np.testing.assert_array_equal(decode_frames([data], 64, 96)[0], read(data))


def test_alpha_is_kept_beside_a_profile():
    stored = np.dstack([in_p3(quarters()), np.full(GREY.shape, 51, np.uint8)])
    data = saved(Image.fromarray(stored), "PNG", icc_profile=matrix_profile(P3, None))
    np.testing.assert_allclose(centers(read(data)), 255 + (np.array(QUARTERS) - 255) * 0.2, atol=1.5)


def test_the_profile_of_grey_is_converted():
    light = (GREY / 255.0) ** 1.8  # a curve of its own
    curve = bytearray(matrix_profile(P3, 1.8))
    curve[16:20] = b"GRAY"
    profile = bytes(curve).replace(b"rTRC", b"kTRC")
    data = saved(Image.fromarray(GREY), "PNG", icc_profile=profile)
    np.testing.assert_allclose(read(data)[..., 0].astype(int), from_linear(light), atol=1.5)
    alpha = Image.merge("LA", (Image.fromarray(GREY), Image.new("L", GREY.shape[::-1], 255)))
    np.testing.assert_array_equal(read(saved(alpha, "PNG", icc_profile=profile)), read(data))


@pytest.mark.parametrize("profile", [srgb_profile(), matrix_profile((0.64, 0.33, 0.3, 0.6, 0.15, 0.06, *P3[6:]), None)])
def test_pixels_of_srgb_stay_as_they_are(profile):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.info["icc_profile"] = profile
    notes = []
    np.testing.assert_array_equal(to_srgb(image, notes.append), pixels)
    grey = saved(image.convert("L"), "PNG", icc_profile=profile)  # grey of an RGB space, as editors write it
    np.testing.assert_array_equal(read(grey)[..., 0], image.convert("L"))
    assert notes == []


@pytest.mark.parametrize(
    ("mode", "profile", "message"),
    [
        ("RGB", b"no profile at all" * 20, "cannot open profile"),
        ("RGB", srgb_profile()[:300], "damaged colour profile"),
        ("RGB", b"", "it is not whole"),
        ("CMYK", srgb_profile(), "it is of RGB, the picture of CMYK"),
    ],
)
def test_a_damaged_profile_is_named(mode, profile, message):
    image = Image.fromarray(quarters()).convert(mode)
    image.info["icc_profile"] = profile
    with pytest.raises(UnreadableClipError, match=message):
        to_srgb(image)


def test_a_conversion_is_noted():
    image = Image.fromarray(in_p3(quarters()))
    image.info["icc_profile"] = matrix_profile(P3, None)
    notes = []
    to_srgb(image, notes.append)
    assert notes == ["converted from another RGB to sRGB"]


def cmyk_profile():
    """Returns a profile (ICC.1:2010, lut8Type) in which black ink takes L* from 100 to 0, and the others to 80."""
    ramp = bytes(range(256))
    corners = [0 if ink & 1 else 100 - 20 * bool(ink) for ink in range(16)]  # black varies fastest
    values = b"".join(bytes([round(lightness * 2.55), 128, 128]) for lightness in corners)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    lut += ramp * 4 + values + ramp * 3
    head = struct.pack(">I4sI4s4s4s", 0, bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ") + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    profile = head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut
    return struct.pack(">I", len(profile)) + profile[4:]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])  # Adobe's JPEG stores CMYK inverted
def test_the_profile_of_cmyk_is_converted(kind):
    inks = np.zeros((64, 96, 4), np.uint8)
    inks[:32, 48:, 1], inks[32:, :48, 3], inks[32:, 48:, 3] = 255, 255, 51
    data = saved(Image.frombytes("CMYK", (96, 64), inks.tobytes()), kind, icc_profile=cmyk_profile())
    lightness = np.array([100, 80, 0, 80])
    light = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    np.testing.assert_allclose(centers(read(data)), from_linear(light)[:, None].repeat(3, 1), atol=4)


def test_cmyk_and_lab():
    image = Image.fromarray(quarters())
    for kind in ("JPEG", "TIFF"):  # Adobe's JPEG stores CMYK inverted
        options = {"quality": 98} if kind == "JPEG" else {}
        np.testing.assert_allclose(centers(read(saved(image.convert("CMYK"), kind, **options))), QUARTERS, atol=3)
    lab = np.zeros((64, 96, 3), np.uint8)
    lab[:] = (128, 20, 256 - 30)  # L* 50.2, a* 20, b* -30: CIE 1976, signed bytes
    fy = (128 / 255 * 100 + 16) / 116
    f = np.array([fy + 20 / 500, fy, fy + 30 / 200])
    xyz = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * (0.9642, 1.0, 0.8249)
    # Of XYZ of D50 to linear sRGB (Bradford).
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    np.testing.assert_allclose(read(tiff(lab, 8))[5, 5], from_linear(np.array(matrix) @ xyz), atol=2)


def chunk(*numbers):
    return b"".join(round(number * 100_000).to_bytes(4, "big") for number in numbers)


WHITE_FIRST = (*P3[6:], *P3[:6])


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([(b"gAMA", chunk(1.0))], from_linear(np.array(QUARTERS) / 255)),
        ([(b"gAMA", chunk(1 / 1.8))], from_linear((np.array(QUARTERS) / 255) ** 1.8)),
        ([(b"gAMA", chunk(0.45455))], QUARTERS),
        ([(b"gAMA", chunk(1.0)), (b"sRGB", b"\0")], QUARTERS),
        ([(b"gAMA", chunk(0.45455)), (b"cHRM", chunk(*WHITE_FIRST))], from_linear(to_linear(QUARTERS) @ P3_TO_SRGB.T)),
        ([(b"cICP", bytes([12, 13, 0, 1]))], from_linear(to_linear(QUARTERS) @ P3_TO_SRGB.T)),
        ([(b"cICP", bytes([1, 13, 0, 1])), (b"gAMA", chunk(1.0))], QUARTERS),
    ],
    ids=["linear", "1.8", "2.2", "sRGB counts first", "cHRM", "cICP", "cICP counts first"],
)
def test_png_chunks(chunks, expected):
    np.testing.assert_allclose(centers(read(png(quarters(), chunks=chunks))), expected, atol=1.5)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([(b"cICP", bytes([9, 16, 0, 1]))], "high dynamic range: PQ"),
        ([(b"cICP", bytes([9, 18, 0, 1]))], "high dynamic range: HLG"),
        ([(b"cICP", bytes([99, 13, 0, 1]))], "unknown colours: code points 99, 13"),
        ([(b"gAMA", chunk(0.45455)), (b"cHRM", chunk(*[0.3] * 8))], "unknown colours: its primaries"),
        ([(b"iCCP", b"x\0\0not zlib")], "damaged colour profile: it is not whole"),
    ],
)
def test_colours_that_cannot_be_shown_are_named(chunks, message):
    with pytest.raises(UnreadableClipError, match=message):
        read(png(quarters(), chunks=chunks))


@pytest.mark.parametrize("name", ["grid.avif", "grid_turned.heic"])
def test_code_points_of_photos(name):
    data = (FIXTURES / name).read_bytes()
    mark = b"colrnclx\0\1\0\x0d"
    assert data.count(mark) == 1
    seen = read(data)
    wide = read(data.replace(mark, b"colrnclx\0\x0c\0\x0d"))
    np.testing.assert_allclose(wide, from_linear(to_linear(seen) @ P3_TO_SRGB.T), atol=1.5)
    with pytest.raises(UnreadableClipError, match="high dynamic range: PQ"):
        read(data.replace(mark, b"colrnclx\0\x09\0\x10"))


def test_transparent_colours():
    grey = centers(read(saved(Image.fromarray(WIDE), "PNG", transparency=49 * 257)))
    np.testing.assert_allclose(grey, np.array([81, 130, 255, 230])[:, None].repeat(3, 1), atol=1)
    deep = (quarters().astype(np.uint16) * 257).astype(">u2")
    deep[:32, 48:] = 0x1234
    clear = (b"tRNS", deep[0, -1].tobytes())
    np.testing.assert_allclose(
        centers(read(png(deep, chunks=[clear]))), [QUARTERS[0], (255, 255, 255), *QUARTERS[2:]], atol=1
    )


def test_premultiplied_alpha():
    # 200 at a fifth is stored as 40.
    stored = np.dstack([np.full((*GREY.shape, 3), 40), np.full(GREY.shape, 51)]).astype(np.uint8)
    np.testing.assert_allclose(centers(read(tiff(stored, 2, extra=[(338, 3, 1, 1)]))), 244, atol=1)
