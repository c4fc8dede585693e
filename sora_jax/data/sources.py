"""Random access to prepared clips: all metadata at once, and a few frames of one clip at a time.

A data set that `experiments/prepare_data.py` wrote, or any prepared TFDS data set in ArrayRecord that has a picture
(`Image`) or a video (`Video`, `Sequence(Image)`) a record, is read through the same `ClipSource`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source
from etils import epath
from tensorflow_datasets.core import dataset_info as tfds_info
from tqdm import tqdm

from sora_jax.array_types import NumpyArray
from sora_jax.data.layout import RecordLayout, StatesLayout
from sora_jax.data.records import ClipMetadata, metadata_from_rows, parse_example, read_index, write_index

# Indices of data sets that cannot be written to, by path and split: a run opens a split several times.
_UNWRITTEN: dict[tuple[str, str], ClipMetadata] = {}


class Layout(Protocol):
    """Where the records of a data set hold what the index says of them.

    Attributes:
        label_names: of the classes, in the order of their indices; () where the data set has no labels.
    """

    label_names: tuple[str, ...]

    def row(self, index: int, serialized: bytes) -> dict[str, Any]:
        """Returns the metadata of one record, as `sora_jax.data.records.metadata_from_rows` takes them."""


class RecordSource:
    """The records of one split, by index, and what is known of all of them.

    Only its location and metadata are pickled: a worker process opens the records itself, at its first read.

    Args:
        path: directory of a prepared TFDS data set, or one above it that holds a single data set.
        split: name of a split, or what TFDS makes of names (`train[:100]`, `train+unseen`).
        layout: of its records.

    Attributes:
        metadata: of every clip, in the order of the indices.
        label_names: of the classes that `metadata.labels` counts, as words; () where the data set has no labels.
        null_states: (m, D), token states of the empty caption; None where the records hold no states of captions.

    Raises:
        ValueError: no data set at `path`, an unknown split, records that are not ArrayRecord, or a file of records is
            missing or damaged, which is named.
    """

    def __init__(self, path: str, split: str, layout: Layout):
        self.path = str(find_dataset(path))
        self.split = split
        self.label_names: tuple[str, ...] = layout.label_names
        self._states = StatesLayout.read(self.path)
        self.null_states = None if self._states is None else self._states.null
        self._records: Any = None
        self._last: tuple[int, dict[str, Any]] | None = None
        splits = read_splits(self.path)
        spans = split_spans(splits, split, self.path)
        self._files = [
            instruction
            for name, start, stop in spans
            for instruction in splits[f"{name}[{start}:{stop}]"].file_instructions
        ]
        indices = {name: self._index(name, splits[name], layout) for name, _, _ in spans}
        parts = [indices[name].select(np.arange(start, stop)) for name, start, stop in spans]
        self.metadata = ClipMetadata.concatenate(parts)

    def __len__(self) -> int:
        return len(self.metadata)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None, "_last": None}

    def record(self, index: int) -> dict[str, Any]:
        """Reads the values of a record by key, still encoded; the last one read is kept.

        Raises:
            IndexError: `index` is out of range.
            ValueError: the file of the record is missing or damaged; the message names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"clip index must be in 0 ... {len(self) - 1}, got {index}.")
        if self._last is None or self._last[0] != index:
            if self._records is None:
                self._records = open_records(self._files)
            self._last = index, parse_example(read_record(self._records, self._files, int(index)))
        return self._last[1]

    def caption_states(self, index: int) -> NumpyArray:
        """Returns the token states (m, D) of a clip's caption, where the records hold them."""
        return self._states.of(self.record(index))

    def _index(self, split: str, info: Any, layout: Layout) -> ClipMetadata:
        """Reads the index of a whole split, or makes it by one pass over the records and keeps it beside them.

        Where that cannot be written to, this process alone keeps it, and says so.
        """

        def whole(metadata: ClipMetadata | None) -> bool:
            counted = metadata is not None and (self._states is None or metadata.caption_tokens is not None)
            return counted and len(metadata) == info.num_examples

        metadata = read_index(self.path, split)
        if whole(metadata):
            return metadata
        metadata = _UNWRITTEN.get((self.path, split))
        kept = whole(metadata)
        if not kept:
            files = info.file_instructions
            records = open_records(files)
            progress = tqdm(range(len(records)), desc=f"indexing {split}", unit="clip", delay=2.0)
            metadata = metadata_from_rows([self._row(layout, i, read_record(records, files, i)) for i in progress])
        try:
            write_index(epath.Path(self.path), split, metadata)
        except OSError as error:
            _UNWRITTEN[self.path, split] = metadata
            reason = error.strerror or error
            if not kept:
                warnings.warn(
                    f"{self.path} takes no index of {split} ({reason}): it is made again at each start.", stacklevel=5
                )
        return metadata

    def _row(self, layout: Layout, index: int, serialized: bytes) -> dict[str, Any]:
        """Returns the metadata of a record, with the tokens of its caption where it holds their states."""
        row = layout.row(index, serialized)
        if self._states is not None:
            row["caption_tokens"] = len(self._states.of(parse_example(serialized)))
        return row


class ClipSource(RecordSource):
    """The pictures and videos of one split, by index; see `RecordSource`.

    Args:
        path: directory of the data set.
        split: of it.

    Raises:
        ValueError: as of `RecordSource`; or no picture or video feature; the message says what there is.
    """

    def __init__(self, path: str, split: str = "train"):
        self._layout = RecordLayout.read(str(find_dataset(path)))
        super().__init__(path, split, self._layout)

    def read_frames(self, index: int, frame_indices: Sequence[int]) -> list[bytes]:
        """Reads some frames of a clip, still encoded.

        Args:
            index: of the clip, 0 ... len - 1.
            frame_indices: of the frames, 0 ... num_frames - 1, in any order.

        Returns:
            One encoded picture for each frame index.

        Raises:
            IndexError: `index` or a frame index is out of range.
            ValueError: the file of the clip is missing or damaged; the message names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"clip index must be in 0 ... {len(self) - 1}, got {index}.")
        count = int(self.metadata.num_frames[index])
        if bad := [i for i in frame_indices if not 0 <= i < count]:
            raise IndexError(f"frame indices of clip {index} must be in 0 ... {count - 1}, got {bad[0]}.")
        frames = self.record(index)[self._layout.frames]
        return [frames[i] for i in frame_indices]


def open_source(path: str, split: str = "train") -> ClipSource:
    """Opens one split of a prepared data set; see `ClipSource`."""
    return ClipSource(path, split)


def split_names(path: str) -> list[str]:
    """Returns the names of the splits of a prepared data set; ValueError where there is none at `path`."""
    return list(read_splits(str(find_dataset(path))))


def find_dataset(path: str) -> epath.Path:
    """Returns the directory of the TFDS data set at `path`, or of the only one below it (`<name>/<version>`).

    Raises:
        ValueError: there is none, or more than one.
    """
    if not path:
        raise ValueError("data.path is empty: name the directory that experiments/prepare_data.py printed.")
    root = epath.Path(path)
    for pattern in ("", "*", "*/*"):
        directories = [root] if not pattern else sorted(root.glob(pattern)) if root.exists() else []
        found = [d for d in directories if (d / "dataset_info.json").exists() and "incomplete." not in d.name]
        if len(found) > 1:
            raise ValueError(f"{path!r} holds several data sets, name one: {', '.join(map(str, found))}.")
        if found:
            return found[0]
    raise ValueError(
        f"{path!r} holds no prepared TFDS data set (no dataset_info.json); run experiments/prepare_data.py."
    )


def read_splits(path: str) -> Any:
    """Returns the TFDS `SplitDict` of a data set.

    `tfds.builder_from_directory` would also construct the features, which for `Video` imports TensorFlow.
    """
    proto = tfds_info.read_proto_from_builder_dir(path)
    if proto.file_format != "array_record":
        raise ValueError(
            f"the data set at {path} is stored as {proto.file_format or 'tfrecord'}; prepare it with "
            'file_format="array_record" (tfds build --file_format=array_record).'
        )
    return tfds_info.get_split_dict_from_proto(proto, data_dir=path, file_format=proto.file_format)


def split_spans(splits: Any, split: str, path: str) -> list[tuple[str, int, int]]:
    """Returns the (name, first record, end) ranges that a split specification stands for."""
    try:
        instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(f"split {split!r} cannot be read from {path}; its splits are {', '.join(splits)}.") from error
    ends = {name: info.num_examples for name, info in splits.items()}
    spans = [(i.splitname, i.from_ or 0, ends[i.splitname] if i.to is None else i.to) for i in instructions]
    return [span for span in spans if span[1] < span[2]]


def open_records(files: Sequence[Any]) -> Any:
    """Returns the serialised records of TFDS file instructions by index."""
    return array_record_data_source.ArrayRecordDataSource(files)


def read_record(records: Any, files: Sequence[Any], index: int) -> bytes:
    """Returns one of the serialised records that `open_records(files)` gave; ValueError where its file is damaged."""
    try:
        if record := records[index]:
            return record
        damage = f"record {index} is empty"
    except RuntimeError as error:
        damage = str(error)
    file = files[int(np.searchsorted(np.cumsum([f.take for f in files]), index, side="right"))]
    raise ValueError(f"{file.filename} is missing or damaged, prepare the data set again: {damage}")
