"""Sources: random access to frames, metadata without decoding, and data sets of other makers."""

import dataclasses
import errno
import io
import json
import os
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sora_jax.data.decode import decode_frames
from sora_jax.data.layout import DEFAULT_FPS
from sora_jax.data.sources import ClipSource, find_dataset, open_source


def picture(level, height=6, width=8):
    return np.full((height, width, 3), level, np.uint8)


def jpeg(level, **size):
    buffer = io.BytesIO()
    Image.fromarray(picture(level, **size)).save(buffer, "JPEG")
    buffer.seek(0)
    return buffer


def build(directory, features, splits, name="toy"):
    """Writes a data set with TFDS alone, as another maker would, and returns its directory."""

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: iter(enumerate(examples)) for split, examples in splits.items()}

        def _generate_examples(self):
            raise AssertionError("not called")

    Toy.name = name
    builder = Toy(data_dir=directory, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


@pytest.fixture
def clips(tmp_path):
    """Five clips of 1 to 5 frames; frame t of clip i is of the grey 40 i + 5 t."""
    features = {
        "frames": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")),
        "caption": tfds.features.Text(),
        "fps": np.float32,
    }

    def examples(count):
        for i in range(count):
            frames = [jpeg(40 * i + 5 * t, width=8 + i) for t in range(i + 1)]
            yield {"frames": frames, "caption": f"clip {i}", "fps": 10 + i}

    return build(tmp_path, features, {"train": examples(5), "unseen": examples(2)})


def test_metadata_and_frames_belong_together(clips):
    source = open_source(clips, "train")
    meta = source.metadata
    assert len(source) == 5 and sorted(meta.captions) == [f"clip {i}" for i in range(5)]
    for index, caption in enumerate(meta.captions):
        i = int(caption.split()[1])  # TFDS shuffles
        assert (meta.num_frames[index], meta.height[index], meta.width[index]) == (i + 1, 6, 8 + i)
        assert meta.fps[index] == 10 + i
        order = [i, 0, i // 2]
        frames = decode_frames(source.read_frames(index, order), 6, 8 + i)
        np.testing.assert_allclose(frames.mean((1, 2, 3)), [40 * i + 5 * t for t in order], atol=1)
    assert meta.num_frames.dtype == np.int32 and meta.fps.dtype == np.float32


def test_opening_again_reads_no_record_and_reading_decodes_none(clips, monkeypatch):
    first = open_source(clips, "train")

    def refuse(*args, **kwargs):
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr("sora_jax.data.sources.open_records", refuse)
    second = open_source(clips, "train")
    assert second.metadata.captions == first.metadata.captions
    monkeypatch.undo()
    monkeypatch.setattr(Image, "open", refuse)
    assert len(second.read_frames(0, [0])) == 1


def test_a_wrong_or_missing_index_is_made_again(clips, tmp_path):
    expected = open_source(clips, "train").metadata
    index = tmp_path / "toy/2.0.0/index-train.json"
    unseen = open_source(clips, "unseen")
    assert index.exists() and len(unseen) == 2
    index.write_text((tmp_path / "toy/2.0.0/index-unseen.json").read_text())
    assert open_source(clips, "train").metadata.names == expected.names


@pytest.mark.parametrize("text", ['{"version": 2, "clip_ids": [3, 1', '{"version": 2, "clip_ids": [3, 1]}', "[]"])
def test_a_damaged_index_is_named_and_made_again(clips, tmp_path, text):
    expected = open_source(clips, "train").metadata
    index = tmp_path / "toy/2.0.0/index-train.json"
    whole = index.read_text()
    index.write_text(text)
    with pytest.warns(UserWarning, match=r"index-train\.json is damaged .* made again"):
        assert open_source(clips, "train").metadata.names == expected.names
    assert index.read_text() == whole


@pytest.mark.parametrize("kept", [None, 0, 1 << 16, -10], ids=["missing", "empty", "half", "cut"])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_damaged_file_of_records_is_named(clips, tmp_path, kept, indexed):
    if indexed:
        open_source(clips, "train")
    (file,) = (tmp_path / "toy/2.0.0").glob("toy-train.array_record*")
    content = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(content[:kept])
    with pytest.raises(ValueError, match=f"{file.name} is missing or damaged, prepare the data set again: .+"):
        open_source(clips, "train").read_frames(2, [0])


def test_an_open_source_pickles_small_and_reads_on(clips):
    source = open_source(clips, "train")
    unread = pickle.dumps(source)
    expected = source.read_frames(2, [0])
    assert pickle.dumps(source) == unread  # an open file is not carried over
    copy = pickle.loads(unread)
    assert copy.read_frames(2, [0]) == expected


def test_splits_combine_as_in_tfds(clips):
    whole = open_source(clips, "train")
    part = open_source(clips, "train[1:3]")
    assert part.metadata.captions == whole.metadata.captions[1:3]
    assert part.read_frames(0, [0]) == whole.read_frames(1, [0])
    both = open_source(clips, "train[:1]+unseen")
    assert len(both) == 3
    assert both.metadata.captions[1:] == open_source(clips, "unseen").metadata.captions
    last = int(both.metadata.num_frames[2]) - 1
    assert both.read_frames(2, [last]) == open_source(clips, "unseen").read_frames(1, [last])


def test_indices_out_of_range_are_named(clips):
    source = open_source(clips, "train")
    with pytest.raises(IndexError, match=r"0 \.\.\. 4, got 5"):
        source.read_frames(5, [0])
    with pytest.raises(IndexError, match="got -1"):
        source.read_frames(0, [-1])


def test_bad_paths_and_splits_are_named(clips, tmp_path):
    with pytest.raises(ValueError, match=r"'validation'.*train, unseen"):
        open_source(clips, "validation")
    with pytest.raises(ValueError, match="absent"):
        open_source(str(tmp_path / "absent"), "train")
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        open_source("", "train")


def test_a_directory_above_the_only_data_set_will_do(clips, tmp_path):
    assert str(find_dataset(str(tmp_path))) == clips
    build(tmp_path, {"image": tfds.features.Image()}, {"train": [{"image": jpeg(0)}]}, name="other")
    with pytest.raises(ValueError, match=r"several data sets.*other.*toy"):
        find_dataset(str(tmp_path))


def test_labelled_pictures_become_captioned_stills(tmp_path):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["tabby_cat", "dog"])}
    examples = [{"image": jpeg(50 * i), "label": i % 2} for i in range(4)]
    source = open_source(build(tmp_path, features, {"train": examples}), "train")
    assert sorted(source.metadata.captions) == ["dog", "dog", "tabby cat", "tabby cat"]
    assert source.metadata.num_frames.tolist() == [1] * 4
    assert source.label_names == ("tabby cat", "dog")
    assert [source.label_names[label] for label in source.metadata.labels] == source.metadata.captions
    levels = {int(decode_frames(source.read_frames(i, [0]), 6, 8).mean()) for i in range(4)}
    assert levels == {0, 50, 100, 150}


def test_labels_stand_beside_captions_and_those_out_of_range_are_none(tmp_path):
    features = {
        "image": tfds.features.Image(),
        "caption": tfds.features.Text(),
        "coarse_label": tfds.features.ClassLabel(names=["animal"]),
        "label": tfds.features.ClassLabel(names=["tabby_cat", "dog", "red fox"]),
    }
    labels = [2, 0, -1, 1]  # -1 is what TFDS gives a test split without labels
    examples = [
        {"image": jpeg(0), "caption": f"picture {i}", "label": label, "coarse_label": 0}
        for i, label in enumerate(labels)
    ]
    path = build(tmp_path, features, {"train": examples})
    for source in (open_source(path), open_source(path)):  # from the records, then from the index
        assert source.label_names == ("tabby cat", "dog", "red fox")
        meta = source.metadata
        assert dict(zip(meta.captions, meta.labels.tolist(), strict=True)) == {
            f"picture {i}": label for i, label in enumerate(labels)
        }
        assert meta.labels.dtype == np.int32
    part = open_source(path, "train[1:3]")
    assert part.metadata.labels.tolist() == meta.labels[1:3].tolist()
    assert meta.select(np.array([3, 0])).labels.tolist() == [meta.labels[3], meta.labels[0]]
    names = tmp_path / "toy/2.0.0/label.labels.txt"
    names.write_text("tabby_cat\ndog\n")  # a class fewer than the records count
    (tmp_path / "toy/2.0.0/index-train.json").unlink()
    assert sorted(open_source(path).metadata.labels.tolist()) == [-1, -1, 0, 1]
    assert "tensorflow" not in sys.modules


def test_classes_without_names_go_by_their_numbers(tmp_path):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}
    path = build(tmp_path, features, {"train": [{"image": jpeg(0), "label": 2}]})
    (tmp_path / "toy/2.0.0/label.labels.txt").unlink(missing_ok=True)
    source = open_source(path)
    assert source.label_names == ("0", "1", "2") and source.metadata.labels.tolist() == [2]


def test_a_data_set_without_labels_has_none(clips):
    source = open_source(clips)
    assert source.label_names == () and source.metadata.labels.tolist() == [-1] * 5


def test_an_index_from_before_there_were_labels_is_made_again(tmp_path, monkeypatch):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
    path = build(tmp_path, features, {"train": [{"image": jpeg(0), "label": i % 2} for i in range(3)]})
    labels = open_source(path).metadata.labels.tolist()
    index = tmp_path / "toy/2.0.0/index-train.json"
    old = json.loads(index.read_text())
    assert old.pop("labels") == labels and sorted(labels) == [0, 0, 1]
    index.write_text(json.dumps(old | {"version": 1}))

    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))  # no PermissionError: a read-only mount

    with monkeypatch.context() as patch:
        patch.setattr("sora_jax.data.sources.write_index", refuse)
        with pytest.warns(UserWarning, match=r"takes no index of train \(Read-only file system\): it is made again"):
            assert open_source(path).metadata.labels.tolist() == labels
        patch.setattr("sora_jax.data.sources.open_records", refuse)  # no second pass, and nothing is told twice
        assert open_source(path).metadata.labels.tolist() == labels
    assert json.loads(index.read_text())["version"] == 1
    assert open_source(path).metadata.labels.tolist() == labels
    assert json.loads(index.read_text())["version"] == 2


def test_a_video_feature_is_read(tmp_path):
    # Constructing Video needs TensorFlow. It is a Sequence(Image) in the records, and differs in features.json.
    image = tfds.features.Image(shape=(6, 8, 3), encoding_format="jpeg")
    features = {"video": tfds.features.Sequence(image), "text": tfds.features.Text()}
    path = build(tmp_path, features, {"test": [{"video": [jpeg(9 * t) for t in range(3)], "text": "greys"}]})
    content = json.loads((tmp_path / "toy/2.0.0/features.json").read_text())
    shape = {"dimensions": ["-1", "6", "8", "3"]}
    content["featuresDict"]["features"]["video"] = {
        "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
        "video": {"dtype": "uint8", "encodingFormat": "jpeg", "shape": shape},
    }
    (tmp_path / "toy/2.0.0/features.json").write_text(json.dumps(content))
    source = open_source(path, "test")
    assert source.metadata.captions == ["greys"] and source.metadata.fps.tolist() == [DEFAULT_FPS]
    np.testing.assert_allclose(decode_frames(source.read_frames(0, [0, 2]), 6, 8).mean((1, 2, 3)), [0, 18], atol=1)


def test_a_data_set_without_pictures_says_what_it_has(tmp_path):
    path = build(tmp_path, {"sound": tfds.features.Text()}, {"train": [{"sound": "x"}]})
    with pytest.raises(ValueError, match="sound: Text"):
        ClipSource(path, "train")


def test_metadata_selects_rows_in_order(clips):
    meta = open_source(clips, "train").metadata
    chosen = meta.select(np.array([3, 1]))
    assert chosen.captions == [meta.captions[3], meta.captions[1]]
    assert chosen.width.tolist() == [meta.width[3], meta.width[1]]
    assert {f.name for f in dataclasses.fields(chosen)} >= {"clip_ids", "num_frames", "height", "width", "fps"}


def test_tensorflow_is_not_imported(clips):
    open_source(clips, "train").read_frames(0, [0])
    assert "tensorflow" not in sys.modules
