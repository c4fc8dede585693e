"""A data set is known by what it holds, wherever it lies."""

import json
import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_sources import build, jpeg

from sora_jax.config import StillsConfig, SwissRollConfig
from sora_jax.data import identity
from sora_jax.data.identity import data_fingerprints
from sora_jax.data.latents import LatentDataConfig

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
    (copied / "report.json").write_text('{"content_fingerprint": "of something else"}')
    (copied / "captions-0123").mkdir()
    assert of(copied) == of(copied.parent) == found


def test_parts_and_sums_of_splits_are_known_by_the_whole_splits(original):
    assert of(original, "train[1:3]+unseen", "train") == of(original)
    assert of(original, "unseen[:1]") == {"unseen": of(original)["unseen"]}
    with pytest.raises(ValueError, match="split 'absent' cannot be read"):
        of(original, "absent")


@pytest.mark.parametrize("place", [0, 0.5, -1], ids=["head", "middle", "tail"])
def test_any_byte_of_a_small_data_set_matters(original, copied, place):
    (file,) = copied.glob("*-train.array_record*")
    content = bytearray(file.read_bytes())
    content[int(place * len(content)) if place >= 0 else -1] ^= 1
    file.write_bytes(content)
    before, now = of(original), of(copied)
    assert now["train"] != before["train"] and now["unseen"] == before["unseen"]


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
    with pytest.raises(ValueError, match=rf"{file.name}.* is missing, prepare the data set again"):
        of(copied)


@pytest.mark.parametrize(
    ("place", "noticed"), [(0, True), (99, True), (100, False), (500, True), (700, False), (-1, True)]
)
def test_large_files_are_known_by_blocks_and_their_length(tmp_path, monkeypatch, place, noticed):
    monkeypatch.setattr(identity, "READ_WHOLE", 999)
    monkeypatch.setattr(identity, "BLOCK", 100)
    monkeypatch.setattr(identity, "NUM_BLOCKS", 3)  # at 0, 450 and 900 of 1,000 bytes
    content = bytearray(np.random.default_rng(0).bytes(1000))
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_bytes(content)
    content[place] ^= 255
    files[1].write_bytes(content)
    one, other = (identity._contents([identity.epath.Path(file)], [1000])[0] for file in files)
    assert (one != other) == noticed


def test_generated_examples_have_none():
    assert data_fingerprints(SwissRollConfig(), ("train", "held_out")) == {}


def test_the_scaling_factor_of_latents_matters(original, copied, monkeypatch):
    """Latents are the numbers of the records times a factor that stands beside them."""

    def report(factor):
        request = {"autoencoder": {"scaling_factor": factor}, "dtype": "float32"}
        (copied / "report.json").write_text(json.dumps({"shape": [2, 2, 4, 4, 3], "request": request}))
        return data_fingerprints(LatentDataConfig(path=str(copied)), ("train",))["train"]

    assert report(0.5) == report(0.5) != report(0.25)
