"""Colours of videos: matrix, range, HDR and wide gamuts brought to sRGB, transparency over white."""

import json

import av
import numpy as np
import pytest
from video_files import QUARTERS, write_video, yuv_frame

from sora_jax.data.builders import clip_dataset, folder
from sora_jax.data.builders.parts import Encoding
from sora_jax.data.decode import UnreadableClipError
from sora_jax.data.video_color import to_picture, to_srgb
from sora_jax.data.videos import decode_video, iterate_video

BT709, UNSPECIFIED, SRGB, PQ, HLG = 1, 2, 13, 16, 18
BT470M, FILM, BT2020, DCI_P3, DISPLAY_P3 = 4, 8, 9, 11, 12
LUMA = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}
LUMA |= {9: (0.2627, 0.0593)}  # of red and blue, by the code of the matrix (ISO/IEC 23091-2)
TO_2020 = np.array([[0.627404, 0.329283, 0.043313], [0.069097, 0.919541, 0.011362], [0.016391, 0.088013, 0.895595]])
"""Linear BT.709 to linear BT.2020 (ITU-R BT.2087, 2)."""
COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [230, 230, 230], [255, 255, 255], [0, 0, 0], [90] * 3])


def light_of(srgb):
    values = np.asarray(srgb, np.float64) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def pq_of(light):
    """ITU-R BT.2100, the inverse of the PQ EOTF, with white at 203 cd/m2."""
    power = np.clip(light * 203 / 10000, 0, 1) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg_of(light):
    """ITU-R BT.2100, the inverse OOTF of gamma 1.2 and the OETF of HLG, with white at 203 of 1000 cd/m2."""
    light = light * 203 / 1000
    luminance = light @ np.array([0.2627, 0.6780, 0.0593])
    scene = light * np.maximum(luminance, 1e-9)[..., None] ** (1 / 1.2 - 1)
    upper = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * np.maximum(scene, 0)), upper)


def ycbcr(rgb, matrix, bits=8, full=False):
    """Quantised planes of R'G'B' in 0 ... 1, 4:4:4 (ISO/IEC 23091-2, 8.3)."""
    red, blue = LUMA[matrix]
    y = rgb @ np.array([red, 1 - red - blue, blue])
    chroma = [(rgb[..., 2] - y) / (2 - 2 * blue), (rgb[..., 0] - y) / (2 - 2 * red)]
    unit, half = 1 << (bits - 8), 1 << (bits - 1)
    whole = (1 << bits) - 1
    scales = (whole, 0, whole) if full else (219 * unit, 16 * unit, 224 * unit)
    return [np.round(y * scales[0] + scales[1]), *(np.clip(np.round(c * scales[2] + half), 0, whole) for c in chroma)]


def signal(colours, height=16, width=16):
    """(H, W * number, 3): each colour as a patch."""
    return np.repeat(np.repeat(colours[None], height, 0), width, 1)


def patches(picture, count, width=16):
    values = np.asarray(picture).astype(int)
    return np.stack([values[values.shape[0] // 2, i * width + width // 2] for i in range(count)])


def ignore(kind):
    raise AssertionError(f"nothing is converted here, but {kind}")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", LUMA)
def test_a_tagged_matrix_and_range_are_applied(matrix, full):
    planes = ycbcr(signal(COLOURS / 255), matrix, full=full)
    frame = yuv_frame("yuv444p", planes, colorspace=matrix, color_range=2 if full else 1)
    np.testing.assert_allclose(patches(to_picture(frame, ignore), len(COLOURS)), COLOURS, atol=2)


@pytest.mark.parametrize(
    ("height", "width", "matrix"),
    [(576, 720, 6), (480, 1279, 6), (577, 720, 1), (720, 1280, 1), (16, 1280, 1), (1280, 720, 1)],
)
def test_a_video_that_names_no_matrix_has_that_of_its_size(height, width, matrix):
    red = np.broadcast_to(COLOURS[0] / 255, (height, width, 3))
    frame = yuv_frame("yuv444p", ycbcr(red, matrix), colorspace=UNSPECIFIED, color_range=1)
    np.testing.assert_allclose(np.asarray(to_picture(frame, ignore))[5, 5], COLOURS[0], atol=2)


@pytest.mark.parametrize(("transfer", "encode"), [(PQ, pq_of), (HLG, hlg_of)], ids=["PQ", "HLG"])
def test_hdr_is_the_inverse_of_bt2100(transfer, encode):
    codes = np.round(encode(light_of(COLOURS) @ TO_2020.T) * 65535).astype(np.uint16)
    np.testing.assert_allclose(to_srgb(codes, transfer, BT2020), COLOURS, atol=1)


@pytest.mark.parametrize(("transfer", "value"), [(PQ, 0.58068), (HLG, 0.75)], ids=["PQ", "HLG"])
def test_the_white_of_hdr(transfer, value):
    """ITU-R BT.2408, table 1: reference white is at 58% of PQ and 75% of HLG; what is brighter is clipped."""
    grey = np.round(np.array([value - 0.02, value, value + 0.02, 1.0]) * 65535).astype(np.uint16)
    found = to_srgb(np.repeat(grey[:, None], 3, 1), transfer, BT2020)
    assert 220 < found[0].min() < 250
    assert (found[1:] >= 254).all()


@pytest.mark.parametrize(
    ("primaries", "code", "expected"),
    [
        # sRGB's red, green and blue as CSS Color 4 gives them in display-p3 and rec2020 (here with the sRGB curve).
        (DISPLAY_P3, (0.917488, 0.200287, 0.138561), (255, 0, 0)),
        (DISPLAY_P3, (0.458402, 0.985265, 0.298295), (0, 255, 0)),
        (DISPLAY_P3, (0.0, 0.0, 0.959588), (0, 0, 255)),
        (DISPLAY_P3, (1.0, 0.0, 0.0), (255, 0, 0)),  # outside of sRGB
        (BT2020, tuple(1.055 * v ** (1 / 2.4) - 0.055 for v in TO_2020[:, 0]), (255, 0, 0)),
        *((primaries, (0.5, 0.5, 0.5), (128, 128, 128)) for primaries in (BT470M, FILM, BT2020, DCI_P3, DISPLAY_P3)),
    ],
)
def test_wide_gamuts(primaries, code, expected):
    codes = np.round(np.array(code) * 65535).astype(np.uint16)
    np.testing.assert_allclose(to_srgb(codes, BT709, primaries).astype(int), expected, atol=1)


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("full", [False, True])
def test_converted_white_is_white_at_every_depth(bits, full):
    form = "yuv444p" if bits == 8 else f"yuv444p{bits}le"
    planes = ycbcr(signal(COLOURS / 255), 9, bits, full)
    frame = yuv_frame(form, planes, colorspace=9, color_range=2 if full else 1, color_primaries=BT2020)
    notes = []
    greys = patches(to_picture(frame, notes.append), len(COLOURS))[3:]
    np.testing.assert_allclose(greys, COLOURS[3:], atol=1)
    assert greys[1].tolist() == [255, 255, 255]  # exactly: 16-bit codes of some formats end below 65535
    assert notes == ["converted from BT.2020 to sRGB"]


def test_primaries_that_hdr_leaves_out_are_bt2020():
    planes = ycbcr(pq_of(light_of(signal(COLOURS)) @ TO_2020.T), 9, 10)
    frame = yuv_frame("yuv444p10le", planes, colorspace=UNSPECIFIED, color_range=1, color_trc=PQ)
    frame.color_primaries = BT2020
    tagged = np.asarray(to_picture(frame, lambda kind: None))
    np.testing.assert_allclose(patches(tagged, len(COLOURS)), COLOURS, atol=4)
    frame.color_primaries, frame.colorspace = UNSPECIFIED, 9
    np.testing.assert_array_equal(np.asarray(to_picture(frame, lambda kind: None)), tagged)


@pytest.mark.parametrize(
    ("tag", "code", "message"),
    [
        ("colorspace", 14, "the matrix is ICtCp"),
        ("colorspace", 10, "constant luminance"),
        ("color_trc", 8, "the transfer is linear light"),
        ("color_trc", 9, "the transfer is logarithmic"),
        ("color_trc", 17, "SMPTE 428"),
    ],
)
def test_colours_that_are_not_converted_are_refused(tag, code, message):
    frame = yuv_frame("yuv444p", ycbcr(signal(COLOURS / 255), 1), **{"colorspace": BT709, tag: code})
    with pytest.raises(UnreadableClipError, match=f"not converted.*{message}"):
        to_picture(frame, ignore)


@pytest.mark.parametrize("code", [0, 3, 19, 255])
def test_reserved_codes_are_taken_for_unspecified(code):
    frame = yuv_frame("yuv444p", ycbcr(signal(COLOURS / 255), 1), colorspace=BT709, color_range=1)
    frame.color_trc = frame.color_primaries = code
    np.testing.assert_allclose(patches(to_picture(frame, ignore), len(COLOURS)), COLOURS, atol=2)


@pytest.mark.parametrize(
    ("suffix", "codec", "form", "options"),
    [
        ("webm", "libvpx-vp9", "yuva420p", {}),
        ("webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
        ("mkv", "libvpx-vp9", "yuva420p", {}),
        ("mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        ("mov", "qtrle", "argb", {}),
        ("mov", "png", "rgba", {}),
        ("mkv", "ffv1", "bgra", {}),
    ],
)
def test_transparent_pixels_are_laid_over_white(tmp_path, suffix, codec, form, options):
    pixels = np.zeros((32, 48, 4), np.uint8)
    pixels[:, :16] = (200, 30, 30, 255)
    pixels[:, 16:32] = (200, 30, 30, 128)
    path = write_video(tmp_path / f"a.{suffix}", [pixels] * 3, codec=codec, form=form, **options)
    frames, _ = decode_video(str(path))
    assert frames.shape == (3, 32, 48, 3)
    np.testing.assert_allclose(frames[0, 16, 8].astype(int), (200, 30, 30), atol=4)
    np.testing.assert_allclose(frames[0, 16, 24].astype(int), (227, 142, 142), atol=4)
    np.testing.assert_allclose(frames[0, 16, 40].astype(int), (255, 255, 255), atol=2)


def test_transparency_is_found_after_a_copy_of_the_streams(tmp_path):
    """FFmpeg's copy of WebM into Matroska writes the name of the tag in capitals."""
    pixels = np.zeros((32, 48, 4), np.uint8)
    path = write_video(tmp_path / "a.webm", [pixels] * 2, codec="libvpx-vp9", form="yuva420p")
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.metadata["ALPHA_MODE"] = "1"
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    with av.open(str(tmp_path / "b.mkv")) as container:
        assert "ALPHA_MODE" in container.streams.video[0].metadata
    frames, _ = decode_video(str(tmp_path / "b.mkv"))
    assert frames.min() > 250


def test_hdr_with_transparency():
    planes = [*ycbcr(pq_of(light_of(signal(COLOURS)) @ TO_2020.T), 9, 10), np.full((16, 16 * len(COLOURS)), 512)]
    frame = yuv_frame("yuva444p10le", planes, colorspace=9, color_range=1, color_trc=PQ, color_primaries=BT2020)
    found = patches(to_picture(frame, lambda kind: None), len(COLOURS))
    np.testing.assert_allclose(found, (COLOURS + 255) / 2, atol=2)


def hdr_video(path, encode, transfer):
    # Below 64 pixels, x265 writes beyond its memory; for fewer frames than it reorders, its times are not set.
    picture, count = QUARTERS.repeat(2, 0).repeat(2, 1), 6
    planes = ycbcr(encode(light_of(picture) @ TO_2020.T), 9, 10)
    planes = [planes[0], planes[1][::2, ::2], planes[2][::2, ::2]]
    params = f"log-level=error:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc:range=limited"
    frames = [yuv_frame("yuv420p10le", planes) for _ in range(count)]
    return write_video(path, frames, codec="libx265", form="yuv420p10le", **{"crf": "4", "x265-params": params})


def test_a_preparation_counts_what_it_converts(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    hdr_video(source / "phone.mov", hlg_of, "arib-std-b67")
    hdr_video(source / "film.mov", pq_of, "smpte2084")
    write_video(source / "mac.mkv", [QUARTERS] * 2, tags={"color_primaries": DISPLAY_P3, "color_trc": SRGB})
    write_video(source / "plain.mkv", [QUARTERS] * 2)
    write_video(source / "scan.mp4", [QUARTERS] * 3, codec="libx264", flags="+ildct+ilme", **{"x264-params": "tff=1"})
    write_video(source / "log.mkv", [QUARTERS] * 2, tags={"color_trc": 9})
    names = sorted(path.name for path in source.iterdir())
    lines = [json.dumps({"file": name, "caption": name}) for name in names]
    (source / "captions.jsonl").write_text("\n".join(lines))
    tasks, skipped = folder.make_tasks(str(source), 0.0)
    output = str(tmp_path / "out")
    report = clip_dataset.prepare(folder.ClipFolder, tasks, folder.Converter(), Encoding(48), output, 0, skipped)
    assert report["num_converted"] == {
        "converted from HLG to sRGB": 1,
        "converted from PQ to sRGB": 1,
        "converted from Display P3 to sRGB": 1,
        "deinterlaced": 1,
    }
    assert {"file": "phone.mov", "change": "converted from HLG to sRGB"} in report["converted"]
    assert report["skip_reasons"] == {"has colours that are not converted": 1}
    for name in ("phone.mov", "film.mov"):
        rate, frames = iterate_video(str(source / name))
        found = np.stack([np.asarray(frame) for frame in frames])
        assert rate == 10 and found.shape == (6, 64, 96, 3)
        corners = QUARTERS[8::16, 12::24].astype(int)
        np.testing.assert_allclose(found[0, 16::32, 24::48].astype(int), corners, atol=5)
