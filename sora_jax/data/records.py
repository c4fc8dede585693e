"""The stored form of a clip, and the index that lets a data set be planned without touching its frames.

A record is one clip: its frames as separate pictures (JPEG or PNG), so that a few of them can be decoded without the
others, and its caption, class, rate and size. Beside the records of a split stands `index-<split>.json`, with
everything but the frames, in the order of the records.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from sora_jax.array_types import NumpyArray
from sora_jax.data.errors import UnreadableClipError
from sora_jax.data.picture_files import BROKEN_PICTURE, open_picture, upright_size
from sora_jax.files import write_whole

INDEX_VERSION = 2
MOST_BYTES = 2**31 - 2**20
"""Of the frames of a record: a message of protobuf ends at 2 GiB."""


@dataclasses.dataclass(frozen=True)
class ClipRecord:
    """One stored clip.

    Attributes:
        clip_id: unique in its data set, the same whatever the split.
        name: of the file (and the part of it) that the clip came from.
        caption: what it shows; may be empty.
        fps: frames a second.
        height, width: of every frame, in pixels.
        frames: encoded pictures.
        label: index of its class, -1 where it has none.
        notes: what was done to the pictures of its file up to its end, such as a conversion of colours; for the
            report, not stored.
    """

    clip_id: int
    name: str
    caption: str
    fps: float
    height: int
    width: int
    frames: list[bytes]
    label: int = -1
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ClipMetadata:
    """Everything about N clips but their frames.

    Attributes:
        clip_ids: (N,) int64.
        num_frames, height, width: (N,) int32.
        fps: (N,) float32, frames a second.
        labels: (N,) int32, index of each clip's class, -1 where it has none.
        captions, names: N strings each.
    """

    clip_ids: NumpyArray
    num_frames: NumpyArray
    height: NumpyArray
    width: NumpyArray
    fps: NumpyArray
    labels: NumpyArray
    captions: list[str]
    names: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def concatenate(cls, parts: Sequence[ClipMetadata]) -> ClipMetadata:
        """Joins the metadata of several ranges of clips."""
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts] or [np.zeros(0)]).astype(dtype)
            for name, dtype in _DTYPES.items()
        }
        captions = [caption for part in parts for caption in part.captions]
        return cls(**arrays, captions=captions, names=[name for part in parts for name in part.names])

    def select(self, indices: NumpyArray) -> ClipMetadata:
        """Returns the metadata of the clips at `indices`, in that order."""
        rows = np.asarray(indices, np.int64)
        arrays = {name: getattr(self, name)[rows] for name in _DTYPES}
        return ClipMetadata(**arrays, captions=[self.captions[i] for i in rows], names=[self.names[i] for i in rows])


_DTYPES = {
    "clip_ids": np.int64,
    "num_frames": np.int32,
    "height": np.int32,
    "width": np.int32,
    "fps": np.float32,
    "labels": np.int32,
}


def clip_features(picture_format: str = "jpeg", label_names: Sequence[str] = ()) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a clip record.

    Args:
        picture_format: of the frames, `jpeg` or `png`.
        label_names: of the classes, in the order of their indices; without any there is no feature `label`.
    """
    picture = tfds.features.Image(shape=(None, None, 3), encoding_format=picture_format)
    return tfds.features.FeaturesDict(
        {
            "clip_id": np.int64,
            "name": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "fps": np.float32,
            "num_frames": np.int32,
            "height": np.int32,
            "width": np.int32,
            "frames": tfds.features.Sequence(picture),
        }
        | ({"label": tfds.features.ClassLabel(names=list(label_names))} if label_names else {})
    )


def check_record(record: ClipRecord, picture_format: str = "jpeg") -> None:
    """Checks that a record holds what it promises.

    Args:
        record: to be stored.
        picture_format: that its frames are encoded in.

    Raises:
        UnreadableClipError: there is no frame, a frame is not a picture of this format and of the record's size, the
            rate is no positive number, or the text cannot be written in UTF-8.
    """
    if not record.frames:
        raise UnreadableClipError("holds no frame")
    with np.errstate(over="ignore"):
        fps = float(np.float32(record.fps))  # as it is stored
    if not (math.isfinite(fps) and fps > 0):
        raise UnreadableClipError(f"gives no frame rate: {record.fps} frames a second")
    for text in (record.caption, record.name):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnreadableClipError(f"cannot be named in UTF-8: {text!r}") from error
    for i, frame in enumerate(record.frames):
        try:
            with Image.open(io.BytesIO(frame)) as image:
                size, found = (image.width, image.height), image.format
        except BROKEN_PICTURE as error:
            raise UnreadableClipError(f"frame {i} is no picture: {error}") from error
        if size != (record.width, record.height):
            promised = f"the clip is {record.width}x{record.height}"
            raise UnreadableClipError(f"changes its size: frame {i} is {size[0]}x{size[1]} pixels, {promised}")
        if found != picture_format.upper():
            raise UnreadableClipError(f"frame {i} is stored as {found}, not as {picture_format.upper()}")
    if (num_bytes := sum(map(len, record.frames))) > MOST_BYTES:
        raise UnreadableClipError(f"is too large for a record: its {len(record.frames)} frames take {num_bytes} bytes")


def to_example(record: ClipRecord, labelled: bool = False) -> dict[str, Any]:
    """Returns a record as the example that a TFDS builder yields, with its label where the features have one."""
    example = dataclasses.asdict(record)
    del example["notes"]
    if not labelled:
        del example["label"]
    # An image feature takes a file object as what is already encoded.
    return example | {"num_frames": len(record.frames), "frames": [io.BytesIO(frame) for frame in record.frames]}


def parse_example(serialized: bytes) -> dict[str, list[Any]]:
    """Returns the values of a serialised `tf.train.Example` by key, without decoding any picture."""
    features = tf_example_pb2.Example.FromString(serialized).features.feature
    return {
        key: list(getattr(value, value.WhichOneof("kind") or "bytes_list").value) for key, value in features.items()
    }


def from_example(serialized: bytes) -> ClipRecord:
    """Reads back a serialised record of `clip_features`."""
    values = parse_example(serialized)
    return ClipRecord(
        clip_id=values["clip_id"][0],
        name=values["name"][0].decode(),
        caption=values["caption"][0].decode(),
        fps=values["fps"][0],
        height=values["height"][0],
        width=values["width"][0],
        frames=values["frames"],
        label=values["label"][0] if "label" in values else -1,
    )


def label_words(name: str) -> str:
    """Returns the name of a class as words: `tabby_cat` as "tabby cat"."""
    return re.sub(r"[_\s]+", " ", name).strip()


def metadata_from_rows(rows: list[dict[str, Any]]) -> ClipMetadata:
    """Gathers one dictionary a clip (keys `clip_ids, num_frames, height, width, fps, labels, caption, name`)."""
    columns = {name: np.array([row[name] for row in rows], dtype) for name, dtype in _DTYPES.items()}
    return ClipMetadata(**columns, captions=[row["caption"] for row in rows], names=[row["name"] for row in rows])


def picture_size(encoded: bytes) -> tuple[int, int]:
    """Returns (height, width) of an encoded picture, upright, from its header."""
    with open_picture(io.BytesIO(encoded)) as image:
        width, height = upright_size(image)
        return height, width


def write_index(directory: epath.PathLike, split: str, metadata: ClipMetadata) -> None:
    """Writes `index-<split>.json` beside the records, whole or not at all."""
    columns = {name: getattr(metadata, name).tolist() for name in _DTYPES}
    text = json.dumps(
        {"version": INDEX_VERSION, **columns, "captions": metadata.captions, "names": metadata.names},
        ensure_ascii=False,
    )
    write_whole(epath.Path(directory) / f"index-{split}.json", text)


def read_index(directory: epath.PathLike, split: str) -> ClipMetadata | None:
    """Reads `index-<split>.json`; None where there is none, another version wrote it or it is damaged (a warning)."""
    path = epath.Path(directory) / f"index-{split}.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        if values.pop("version", None) != INDEX_VERSION:
            return None
        arrays = {name: np.array(values[name], dtype) for name, dtype in _DTYPES.items()}
        return ClipMetadata(**arrays, captions=values["captions"], names=values["names"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} is damaged ({error}); it is made again from the records.", stacklevel=2)
        return None
