"""A data set is known by what it holds, wherever it lies."""

import json
import os
import shutil
import types

import pytest
import tensorflow_datasets as tfds
from test_sources import build, jpeg

from sora_jax.data import identity
from sora_jax.data.identity import data_fingerprints
from sora_jax.data.images import StillsConfig
from sora_jax.data.latents import LatentDataConfig
from sora_jax.data.toy import SwissRollConfig

FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "caption": tfds.features.Text(),
    "label": tfds.features.ClassLabel(names=["cat", "dog"]),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    examples = {
        split: [{"image": jpeg(9 * i + shift), "caption": f"picture {i}", "label": i % 2} for i in range(4)]
        for split, shift in (("train", 0), ("unseen", 5))
    }
    path = build(tmp_path_factory.mktemp("original"), FEATURES, examples)
    of(path)  # writes the indices
    return path


@pytest.fixture
def copied(original, tmp_path):
    return shutil.copytree(original, tmp_path / "elsewhere")


def of(path, *splits):
    return data_fingerprints(StillsConfig(path=str(path)), splits or ("train", "unseen"))


def test_place_dates_and_what_lies_beside_do_not_matter(original, copied):
    found = of(original)
    assert set(found) == {"train", "unseen"} and found["train"] != found["unseen"]
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in found.values())
    for path in copied.iterdir():
        os.utime(path, (1, 1))
    (copied / "index-train.json").unlink()
    (copied / "report.json").write_text('{"fingerprint": "of something else"}')
    (copied / "captions-0123").mkdir()
    assert of(copied) == of(copied.parent) == found


def test_parts_and_sums_of_splits_are_known_by_the_whole_splits(original):
    assert of(original, "train[1:3]+unseen", "train") == of(original)
    assert of(original, "unseen[:1]") == {"unseen": of(original)["unseen"]}
    with pytest.raises(ValueError, match="split 'absent' cannot be read"):
        of(original, "absent")


@pytest.mark.parametrize("changed", [0, 2, 3])
def test_another_picture_matters_and_preparing_again_does_not(original, tmp_path, changed):
    def prepared(directory, level):
        pictures = [jpeg(level if i == changed else 9 * i) for i in range(4)]
        rows = [{"image": image, "caption": f"picture {i}", "label": i % 2} for i, image in enumerate(pictures)]
        return of(build(tmp_path / directory, FEATURES, {"train": rows}), "train")["train"]

    assert prepared("again", 9 * changed) == of(original)["train"] != prepared("other", 9 * changed + 40)


def test_captions_and_names_of_classes_matter(original, copied):
    index = json.loads((copied / "index-train.json").read_text())
    assert index["captions"][0].startswith("picture")
    index["captions"][0] = "another"
    (copied / "index-train.json").write_text(json.dumps(index))
    found = of(copied)
    assert found["train"] != of(original)["train"] and found["unseen"] == of(original)["unseen"]
    (copied / "label.labels.txt").write_text("cat\nwolf\n")
    assert of(copied)["unseen"] != of(original)["unseen"]


def test_a_missing_file_is_named(copied):
    (file,) = copied.glob("*-unseen.array_record*")
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name}.* is missing or damaged, prepare the data set again"):
        of(copied)


@pytest.mark.parametrize(("changed", "noticed"), [(0, True), (1, False), (2, True), (3, False), (4, True)])
def test_large_splits_are_known_by_records_evenly_spaced(monkeypatch, changed, noticed):
    monkeypatch.setattr(identity, "MOST_BYTES", 30)  # of 50
    monkeypatch.setattr(identity, "LEAST_RECORDS", 1)
    monkeypatch.setattr(identity, "open_records", lambda files: files)
    monkeypatch.setattr(identity, "read_record", lambda records, files, index: records[index])
    monkeypatch.setattr(identity, "parse_example", lambda record: {"image": [record]})
    one = [b"0123456789"] * 5
    other = [b"9876543210" if i == changed else record for i, record in enumerate(one)]
    splits = [
        types.SimpleNamespace(num_examples=5, num_bytes=50, file_instructions=records) for records in (one, other)
    ]
    assert (identity._contents(splits[0]) != identity._contents(splits[1])) == noticed


def test_generated_examples_have_none():
    assert data_fingerprints(SwissRollConfig(), ("train", "held_out")) == {}


def test_the_scaling_factor_of_latents_matters(original, copied, monkeypatch):
    """Latents are the numbers of the records times a factor that stands beside them."""

    def report(factor):
        request = {"autoencoder": {"scaling_factor": factor}, "dtype": "float32"}
        (copied / "report.json").write_text(json.dumps({"shape": [2, 2, 4, 4, 3], "request": request}))
        return data_fingerprints(LatentDataConfig(path=str(copied)), ("train",))["train"]

    assert report(0.5) == report(0.5) != report(0.25)
