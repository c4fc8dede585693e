"""Writes records as the ArrayRecord files of a TFDS data set, at a memory that does not grow with the set.

A file of records is written under a name of its own, so that what a killed process leaves is in nobody's way, and
renamed when it is whole. After a part comes a JSON file that says what is in it: a part that has one is finished.
The parts of a data set are its shards, or `write_shards` copies them to shards in the order of a hash.

Neither TensorFlow nor a TFDS builder takes part: TFDS's own shuffler needs TensorFlow above 1 GiB.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.utils import shard_utils
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from sora_jax.array_types import NumpyArray
from sora_jax.files import write_whole

_OPTIONS = "group_size:1,uncompressed"  # one record can be read alone; pictures and noise pack badly
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # records are read singly
_OPEN_READERS = 256  # that are kept; systems allow a process about a thousand open files


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What a finished file of N records holds.

    Attributes:
        path: of the file.
        clip_ids: (N,) int64.
        sizes: (N,) int64, bytes of each serialised record.
        skipped: source files that were left out of it, as `file` and `reason`.
        converted: source files whose pictures were changed, as `file` and `change`.
    """

    path: epath.Path
    clip_ids: NumpyArray
    sizes: NumpyArray
    skipped: list[dict[str, str]]
    converted: list[dict[str, str]]

    @classmethod
    def read(cls, path: epath.Path) -> Part:
        """Reads what is known of a finished part; its records stay where they are."""
        values = json.loads(_summary_path(path).read_text())
        ids, sizes = (np.array(values[key], np.int64) for key in ("clip_ids", "sizes"))
        return cls(path, ids, sizes, values["skipped"], values["converted"])

    def __len__(self) -> int:
        return len(self.clip_ids)


def is_finished(path: epath.Path) -> bool:
    """Whether the part at `path` is whole."""
    return _summary_path(path).exists()


def forget_summary(path: epath.Path) -> None:
    """Removes the JSON file of a part that has become a shard of a finished data set."""
    _summary_path(path).unlink(missing_ok=True)


def _summary_path(path: epath.Path) -> epath.Path:
    return path.parent / f"{path.name}.json"


def serialize(features: Any, example: Mapping[str, Any]) -> bytes:
    """Returns an example as the record that is stored: the same bytes in every process.

    Protobuf writes the keys of an example in an order that each process draws anew, unless it is asked for a fixed one.
    """
    record = tf_example_pb2.Example.FromString(features.serialize_example(example))
    return record.SerializeToString(deterministic=True)


def write_part(
    path: epath.Path,
    records: Iterable[tuple[int, bytes]],
    skipped: Sequence[dict[str, str]] = (),
    converted: Sequence[dict[str, str]] = (),
) -> None:
    """Writes a part, whole or not at all.

    Args:
        path: of the part.
        records: the id and the serialised record of each clip; read one at a time.
        skipped: source files that are left out, as `file` and `reason`; read after the records.
        converted: source files whose pictures are changed, as `file` and `change`; read after the records.

    Raises:
        OSError: the file cannot be written, because the disk is full for example.
    """
    ids, sizes = array.array("q"), array.array("q")
    with _RecordWriter(path) as writer:
        for clip_id, record in records:
            writer.write(record)
            ids.append(clip_id)
            sizes.append(len(record))
    content = {"clip_ids": ids.tolist(), "sizes": sizes.tolist()}
    content |= {"skipped": list(skipped), "converted": list(converted)}
    write_whole(_summary_path(path), json.dumps(content))


class _RecordWriter(contextlib.AbstractContextManager):
    """An ArrayRecord file, which appears at `path` where its context ends without an exception."""

    def __init__(self, path: epath.Path):
        self._path, self._temporary = path, path.parent / f"{path.name}.{uuid.uuid4().hex}.incomplete"
        with naming_output(path):
            self._writer = array_record_module.ArrayRecordWriter(str(self._temporary), _OPTIONS)

    def write(self, record: bytes) -> None:
        """Appends a record."""
        with naming_output(self._path):
            self._writer.write(record)

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            with naming_output(self._path) if kind is None else contextlib.suppress(RuntimeError):
                self._writer.close()
            if kind is None:
                self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_output(path: epath.Path) -> Iterator[None]:
    """Turns what goes wrong in writing a file into an OSError that names it and why.

    ArrayRecord tells a system's error in the words of a RuntimeError: the error number is read from them.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except RuntimeError as error:
        codes = {os.strerror(code): code for code in errno.errorcode}
        reason = max((text for text in codes if text in str(error)), key=len, default=None)
        if reason is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        raise OSError(codes[reason], reason, str(path)) from error


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The records of a split that stand in its shards.

    Attributes:
        name: of the split.
        lengths: records of each shard.
        num_bytes: of all its serialised records.
    """

    name: str
    lengths: list[int]
    num_bytes: int


def shard_name(dataset: str, split: str, index: int, count: int) -> str:
    """Returns the name that TFDS gives a shard."""
    return f"{dataset}-{split}.array_record-{index:05d}-of-{count:05d}"


def split_of_parts(name: str, parts: Sequence[Part]) -> Split:
    """Returns a split whose shards are these parts, in their order."""
    return Split(name, [len(part) for part in parts], sum(int(part.sizes.sum()) for part in parts))


def write_shards(directory: epath.Path, dataset: str, split: str, parts: Sequence[Part]) -> Split:
    """Copies the records of parts to the shards of a split, record by record, in the order in which TFDS has them.

    That is by a hash of clip id and split, so a slice such as `train[:100]` is a fair sample. A shard that is there is
    not written again.

    Args:
        directory: of the shards.
        dataset: its name.
        split: its name.
        parts: finished ones, with a record at least among them.

    Raises:
        ValueError: two records have the same clip id, or a part is damaged.
        OSError: a shard cannot be written.
    """
    ids, sizes = (np.concatenate([getattr(p, k) for p in parts]) for k in ("clip_ids", "sizes"))
    owners = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    rows = np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts])
    order = _hash_order(ids, split)
    reader = functools.lru_cache(_OPEN_READERS)(lambda owner: _open_reader(parts[owner].path))
    count = shard_utils.ShardConfig.calculate_number_shards(int(sizes.sum()), len(ids))
    ends = shard_utils.get_shard_boundaries(len(ids), count)
    with tqdm(total=len(ids), desc=f"writing {split}", unit="clip", delay=1.0) as bar:
        for i, (start, end) in enumerate(itertools.pairwise((0, *ends))):
            path = directory / shard_name(dataset, split, i, count)
            if not path.exists():
                with _RecordWriter(path) as writer:
                    for place in order[start:end]:
                        writer.write(
                            _read_record(reader(int(owners[place])), int(rows[place]), parts[owners[place]].path)
                        )
                        bar.update(1)
    return Split(split, np.diff((0, *ends)).tolist(), int(sizes.sum()))


def _hash_order(clip_ids: NumpyArray, split: str) -> NumpyArray:
    """Returns the order of records in TFDS's shuffle."""
    hasher = hashing.Hasher(split)
    keys = np.array([divmod(hasher.hash_key(int(clip_id)), 2**64) for clip_id in clip_ids], np.uint64)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    same = np.flatnonzero(np.diff(clip_ids[order]) == 0)
    if same.size:
        raise ValueError(f"clip ids must be unique in a split, {split} has {clip_ids[order[same[0]]]} twice.")
    return order


def _open_reader(path: epath.Path) -> Any:
    try:
        return array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)
    except RuntimeError as error:
        raise _damaged(path, error) from error


def _read_record(reader: Any, row: int, path: epath.Path) -> bytes:
    """Reads one record of the part at `path`; ArrayRecord checks that it is the one that was written."""
    try:
        (record,) = reader.read([row])
    except (RuntimeError, IndexError) as error:
        raise _damaged(path, error) from error
    return record


def _damaged(path: epath.Path, why: object) -> ValueError:
    return ValueError(f"{path} is damaged ({why}); remove {_summary_path(path)} and start again.")


def write_metadata(
    directory: epath.Path, dataset: str, version: str, features: Any, splits: Sequence[Split], description: str
) -> None:
    """Writes what makes the shards in a directory a data set that TFDS opens.

    Args:
        directory: of the shards, called as `shard_name` says.
        dataset: its name.
        version: its version.
        features: of its records.
        splits: all of them.
        description: in a sentence.
    """
    template = {"dataset_name": dataset, "filetype_suffix": "array_record", "data_dir": directory}
    infos = [
        tfds.core.SplitInfo(
            split.name,
            split.lengths,
            split.num_bytes,
            filename_template=tfds.core.ShardedFileTemplate(split=split.name, **template),
        )
        for split in splits
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=infos,
        version=version,
        check_data=False,
        description=description,
    )
