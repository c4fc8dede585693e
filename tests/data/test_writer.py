"""Records to data sets: TFDS's own order at any size, a digest of the content, output that cannot be written."""

import contextlib
import dataclasses
import errno
import io
import os
import resource
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from PIL import Image
from tensorflow_datasets.core import shuffle
from tensorflow_datasets.core.utils import shard_utils

from sora_jax.data.builders import clip_dataset, folder, parts, writer
from sora_jax.data.builders.parts import CLIP_ID_STRIDE, ClipTask, Encoding
from sora_jax.data.records import ClipRecord, clip_features, parse_example, to_example
from sora_jax.data.sources import ClipSource


def picture(value, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 7)).save(buffer, "JPEG")
    return buffer.getvalue()


def convert(task, encoding):
    """Two clips of a file whose frames are told by its name."""
    for piece in range(2):
        frames = [picture(int(task.name) * 2 + piece)] * (piece + 1)
        yield ClipRecord(task.file_id * CLIP_ID_STRIDE + piece, f"{task.name}#{piece}", task.caption, 5.0, 6, 8, frames)


def tasks_of(directory, count=20):
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (directory / str(i)).touch()
    splits = ["unseen" if i % 5 == 0 else "train" for i in range(count)]
    return [ClipTask(i, str(i), str(directory / str(i)), f"caption {i}", split) for i, split in enumerate(splits)]


def prepare(tasks, output, convert=convert, **kwargs):
    return clip_dataset.prepare(folder.ClipFolder, tasks, convert, Encoding(), str(output), **kwargs)


def stored(report, split):
    files = sorted(str(p) for p in epath.Path(report["path"]).glob(f"*-{split}.array_record-*"))
    with ArrayRecordDataSource(files) as records:
        return list(records)


def test_records_are_those_that_a_tfds_builder_writes(tmp_path):
    """Data sets of before were written by such a builder: they open, and the new ones have their records in order."""
    tasks = tasks_of(tmp_path / "files")

    class ClipFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "clip_folder"

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=clip_features())

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", "unseen")}

        def _generate_examples(self, split):
            for task in tasks:
                for record in convert(task, Encoding()) if task.split == split else ():
                    yield record.clip_id, to_example(record)

    builder = ClipFolder(data_dir=tmp_path / "old", file_format="array_record")
    builder.download_and_prepare()
    report = prepare(tasks, tmp_path / "new")
    ours = tfds.builder_from_directory(report["path"])
    assert ours.info.features.keys() == builder.info.features.keys()
    for split in ("train", "unseen"):
        theirs = stored({"path": str(builder.data_path)}, split)
        assert [parse_example(record) for record in theirs] == [parse_example(r) for r in stored(report, split)]
        assert ours.info.splits[split].num_examples == builder.info.splits[split].num_examples
        assert ours.info.splits[split].num_bytes == builder.info.splits[split].num_bytes
        old, new = ClipSource(str(builder.data_path), split), ClipSource(report["path"], split)
        assert old.metadata.names == new.metadata.names and old.read_frames(1, [0]) == new.read_frames(1, [0])


def test_records_are_the_same_bytes_in_every_process(tmp_path):
    """The keys of an example stand sorted, where protobuf would write them in an order of the process."""
    record = stored(prepare(tasks_of(tmp_path / "files", 2), tmp_path / "data"), "train")[0]
    keys = [b"caption", b"clip_id", b"fps", b"frames", b"height", b"name", b"num_frames", b"width"]
    places = [record.index(b"\n" + bytes([len(key)]) + key) for key in keys]  # of a field 1 of this length
    assert places == sorted(places)


def test_no_size_needs_tensorflow(tmp_path, monkeypatch):
    """TFDS's shuffler needs it where a split has more bytes than this."""
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
    assert prepare(tasks_of(tmp_path / "files"), tmp_path / "data")["splits"]["train"]["num_clips"] == 16


def test_many_shards_hold_what_one_does(tmp_path, monkeypatch):
    tasks = tasks_of(tmp_path / "files")
    one = prepare(tasks, tmp_path / "one")
    monkeypatch.setattr(shard_utils.ShardConfig, "calculate_number_shards", lambda *_: 3)
    monkeypatch.setattr(writer, "_OPEN_READERS", 1)
    monkeypatch.setattr(parts, "PART_SIZE", 3)
    three = prepare(tasks, tmp_path / "three")
    names = [p.name for p in epath.Path(three["path"]).glob("*-train.array_record-*")]
    assert sorted(names) == [f"clip_folder-train.array_record-0000{i}-of-00003" for i in range(3)]
    assert stored(one, "train") == stored(three, "train")
    source, whole = ClipSource(three["path"], "train[3:20]"), ClipSource(one["path"], "train")
    assert source.metadata.names == whole.metadata.names[3:20]
    assert [source.read_frames(i, [0]) for i in range(17)] == [whole.read_frames(i + 3, [0]) for i in range(17)]


def test_an_interrupted_preparation_ends_as_a_whole_one(tmp_path, monkeypatch):
    tasks = tasks_of(tmp_path / "files")
    whole = prepare(tasks, tmp_path / "whole")
    monkeypatch.setattr(parts, "PART_SIZE", 3)

    def stopping(task, encoding):
        if task.name == "13":
            raise KeyboardInterrupt
        return convert(task, encoding)

    with pytest.raises(KeyboardInterrupt):
        prepare(tasks, tmp_path / "broken", stopping)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "write_metadata", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(tasks, tmp_path / "broken")
    ended = prepare(tasks, tmp_path / "broken")
    assert all(stored(ended, split) == stored(whole, split) for split in ("train", "unseen"))


def test_a_part_that_was_damaged_is_named(tmp_path, monkeypatch):
    tasks = tasks_of(tmp_path / "files")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(writer, "write_shards", lambda *_: (_ for _ in ()).throw(OSError))
        prepare(tasks, tmp_path / "data")
    (part,) = (tmp_path / "data").rglob("train-00000.array_record")
    content = bytearray(part.read_bytes())
    place = content.index(b"caption 7")
    content[place + 8 : place + 9] = b"8"
    part.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000\.array_record is damaged .*remove .*\.json and start again"):
        prepare(tasks, tmp_path / "data")
    part.with_name(f"{part.name}.json").unlink()
    assert prepare(tasks, tmp_path / "data")["splits"]["train"]["num_clips"] == 16


def test_an_id_that_comes_twice_is_named(tmp_path):
    def twice(task, encoding):
        (record, _) = convert(task, encoding)
        yield from (record, record)

    with pytest.raises(ValueError, match="clip ids must be unique in a split, train has 0 twice"):
        prepare([dataclasses.replace(t, split="train") for t in tasks_of(tmp_path, 1)], tmp_path / "data", twice)


@contextlib.contextmanager
def files_of_at_most(size):
    """No file may grow larger, as on a disk that is full: the system refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("stage", ["parts", "shards", "summaries"])
def test_output_that_cannot_be_written_is_named_and_goes_on(tmp_path, monkeypatch, stage):
    tasks = tasks_of(tmp_path / "files")
    if stage == "shards":
        stop = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(writer, "write_shards", stop)
            prepare(tasks, tmp_path / "data")
    limit = 10 if stage == "summaries" else 1000
    with files_of_at_most(limit), pytest.raises(OSError) as caught:
        if stage == "summaries":
            writer.write_whole(epath.Path(tmp_path) / "data.json", 100 * "x")
        prepare(tasks, tmp_path / "data")
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.rglob("*.incomplete")) and not list(tmp_path.rglob("report.json"))
    if stage != "summaries":
        assert {"parts": "/parts/unseen-0", "shards": "1.0.0/clip_folder-unseen.array"}[stage] in caught.value.filename
    assert prepare(tasks, tmp_path / "data")["splits"]["train"]["num_clips"] == 16


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_array_record_tells_errors_of_the_system_in_words(tmp_path, code):
    words = f"write() failed: {os.strerror(code)}; writing /x; at byte 2097152; Failed to close chunk_writer"
    with pytest.raises(OSError) as caught, writer.naming_output(epath.Path("/out/a")):
        raise RuntimeError(words)
    assert (caught.value.errno, caught.value.filename) == (code, "/out/a")
    with pytest.raises(OSError, match="/out/a cannot be written: nobody knows"):
        with writer.naming_output(epath.Path("/out/a")):
            raise RuntimeError("nobody knows")


LARGE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, pathlib
from test_writer import *
from sora_jax.data.builders.latents import LatentOptions, prepare_latents

noise = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)).save(noise, "JPEG", quality=100)

def stills(task, encoding):
    yield ClipRecord(task.file_id * CLIP_ID_STRIDE, task.name, task.caption, 1.0, 600, 600, [noise.getvalue()])

root, count = pathlib.Path(sys.argv[2]), int(sys.argv[3])
report = prepare(tasks_of(root / "files", count), root / "data", stills)
encode = lambda images: (np.repeat(images, 8, -1), np.repeat(np.abs(images), 8, -1))
prepare_latents(report["path"], encode, (64, 64, 24), {}, str(root / "latents"), LatentOptions(64, part_size=16), 4)
print(sum(report["num_bytes"].values()) >> 20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_set(tmp_path):
    sizes, peaks = [], []
    for count in (40, 240):
        command = [sys.executable, "-c", LARGE, os.path.dirname(__file__), str(tmp_path / str(count)), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        size, peak = map(int, done.stdout.split())
        sizes.append(size), peaks.append(peak)
    assert sizes[1] > 150 and sizes[1] == pytest.approx(6 * sizes[0], rel=0.1)
    assert peaks[1] < 1.15 * peaks[0], peaks
